"""The chain of algorithms that a recipe asks for, and what each can be told.

A chain is any number of transforms, which move difficulty between layers without changing what the model
computes; then one rounding algorithm, which chooses codes; then `tune`, which learns scales, or `qat`, which learns
everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from quantcli import algorithms
from quantcli.algorithms import ALGORITHMS, named, options_of, recommended
from quantcli.core.scheme import Scheme
from quantcli.errors import UsageError
from quantcli.planning.recipe import Recipe
from quantcli.system.text import suggestion


@dataclass(frozen=True)
class Step:
    """One algorithm of a chain with what it was told."""

    name: str
    options: Any


@dataclass(frozen=True)
class Steps:
    """A whole chain. ``rounding`` is None where `auto` decides it layer by layer."""

    transforms: tuple[Step, ...] = ()
    rounding: Step | None = None
    final: tuple[Step, ...] = field(default=())

    @property
    def all(self) -> tuple[Step, ...]:
        """In order. awq alone is both transform and rounding, and named once."""
        own = (self.rounding,) if self.rounding and self.rounding not in self.transforms else ()
        return (*self.transforms, *own, *self.final)

    @property
    def needs(self) -> frozenset[str]:
        """What the chain wants to know of the data; nothing where it works without."""
        return frozenset[str]().union(*(algorithms.algorithm(step.name).NEEDS for step in self.all))

    def options(self, name: str) -> Any:
        """What an algorithm was told; its defaults where it is not in the chain."""
        own = next((step.options for step in self.all if step.name == name), None)
        return own or options_of(name)()

    def __str__(self) -> str:
        return " + ".join(step.name for step in self.all)


def chain(recipe: Recipe, scheme: Scheme, *, data: bool | None) -> Steps:
    """The algorithms that a recipe asks for, or those recommended; ``data`` None: there is some where it is needed.

    Raises:
        UsageError: they need calibration data and there is none, or there is some and nothing uses it.
    """
    given = named_steps(recipe)
    if not given and data and not scheme.weights.is_cast:
        given = [*recommended(scheme)]
    steps = parse_steps(given)
    if steps.needs and scheme.weights.is_cast:
        raise UsageError(f"{scheme} only casts values, and {steps} is for codes.", "Leave the algorithm out.")
    if steps.final and not steps.rounding and not steps.transforms:
        # What is learned last begins at the best that is known without learning.
        steps = parse_steps([*recommended(scheme), *given])
    static = scheme.is_static
    if (steps.needs or static) and data is False:
        named = [step.name for step in steps.all if algorithms.algorithm(step.name).NEEDS] or ["int8-static"]
        who = f"{' and '.join(named)} {'need' if len(named) > 1 else 'needs'}"
        raise UsageError(f"{who} calibration data.", "Name some with --data; nothing is fetched or made up.")
    if data and not steps.needs and not static:
        who = f"{steps} uses" if given else f"The scheme {scheme} uses"
        other = "" if scheme.weights.dtype not in ("int4", "int8") else ", or choose --algorithm gptq"
        raise UsageError(f"{who} no calibration data.", f"Leave --data out{other}.")
    return steps


def named_steps(recipe: Recipe) -> list[str | dict[str, dict[str, Any] | None]]:
    """The algorithms that a recipe names; none where it leaves the choice."""
    return recipe.steps or ([] if recipe.algorithm == "auto" else [recipe.algorithm])


def parse_steps(given: Sequence[str | Mapping[str, Any]]) -> Steps:
    """A recipe's ``steps`` (or the one algorithm of the command line) as a chain.

    Raises:
        UsageError: an unknown algorithm or option, or an order that makes no sense.
    """
    steps = [_step(each) for each in given]
    names = [step.name for step in steps]
    if len(set(names)) != len(names):
        raise UsageError(f"steps: {' + '.join(names)}: each algorithm can be there once.")
    firsts, lasts = named("transform"), named("training")
    transforms = tuple(step for step in steps if step.name in firsts)
    final = tuple(step for step in steps if step.name in lasts)
    roundings = [step for step in steps if step not in (*transforms, *final)]
    if len(roundings) > 1:
        raise UsageError(
            f"steps: {' + '.join(names)}: {roundings[0].name} and {roundings[1].name} both choose codes.",
            hint="Keep one of them.",
        )
    if len(final) > 1:
        raise UsageError(
            f"steps: {' + '.join(names)}: qat learns scales, too.", hint=f"Keep one of {' and '.join(lasts)}."
        )
    if steps != [*transforms, *roundings, *final]:
        raise UsageError(
            f"steps: {' + '.join(names)}: this order makes no sense.",
            hint=f"{', '.join(firsts)} come first, then one of {', '.join(named('rounding', 'calibrated rounding'))}, "
            f"then one of {', '.join(lasts)}.",
        )
    rounding = roundings[0] if roundings else None
    if rounding is None and transforms and ALGORITHMS[transforms[-1].name].is_rounding:
        rounding = transforms[-1]
    return Steps(transforms, rounding, final)


def training_step(recipe: Recipe) -> Step | None:
    """The step of a recipe that trains, or None."""
    final = parse_steps(named_steps(recipe)).final
    return next((step for step in final if "training" in algorithms.algorithm(step.name).NEEDS), None)


def _step(given: str | Mapping[str, Any]) -> Step:
    name, options = (given, {}) if isinstance(given, str) else next(iter(given.items()))
    algorithms.algorithm(name)
    kind = options_of(name)
    try:
        return Step(name, kind.model_validate(options or {}))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = list(kind.model_fields)
            hint = suggestion(key, known) if known else f"{name} takes no options."
            raise UsageError(f"steps: {name}: unknown option {key!r}.", hint) from error
        raise UsageError(f"steps: {name}: {key}: {problem['msg']}.") from error
