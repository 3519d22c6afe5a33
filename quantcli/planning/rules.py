"""A recipe's rules over the layers of any model: which one holds, how a scheme is called, which group size is meant."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate

from quantcli import algorithms
from quantcli.checkpoint.roles import module_of
from quantcli.core.scheme import PRESETS, NumberFormat, Scheme
from quantcli.errors import UsageError
from quantcli.planning.recipe import Recipe, Rule, SchemeSpec
from quantcli.system.text import listed

_WILDCARD = re.compile(r"[*?\[]")
#: Why a layer is left that the user named.
SKIPPED = "skipped as asked"


@dataclass(frozen=True)
class Fate:
    """What becomes of a tensor or layer, by the names that a glob can mean it by; ``reason``: why it stays as it is.

    ``is_layer``: it is the weight of a layer, and no norm or bias beside one.
    """

    names: tuple[str, ...]
    reason: str | None
    is_layer: bool = True

    @property
    def module(self) -> str:
        """What people call it."""
        return module_of(self.names[0]) or self.names[0]


class Rules:
    """The rules of a recipe, of which the first that matches a layer holds; what it skips comes before all others."""

    def __init__(self, recipe: Recipe) -> None:
        self._size = recipe.group_size
        self._rules = [*(Rule(match=glob, skip=True) for glob in recipe.skip), *recipe.rules]
        self._matchers = [Matcher(rule.globs) for rule in self._rules]

    def first(self, *names: str) -> Rule | None:
        """The rule that holds for a layer with these names, or None."""
        pairs = zip(self._rules, self._matchers, strict=True)
        return next((rule for rule, is_meant in pairs if is_meant(*names)), None)

    def require_matches(self, names: Iterable[str], hint: Callable[[str], str]) -> None:
        """Raise UsageError, with a hint, for a glob that means none of the ``names`` of all layers."""
        names = list(names)
        literal = {*names, *map(module_of, names)}
        for glob in (glob for rule in self._rules for glob in rule.globs):
            if glob not in literal and not any(means(glob, name) for name in names):
                raise UsageError(f"{glob!r} matches no layer.", hint(glob))

    def require_obeyed(self, fates: Iterable[tuple[Rule | None, Fate]]) -> list[str]:
        """Warnings of rules that hold for layers which stay as they are, or for none.

        ``fates``: of every tensor or layer, with the rule that holds for it.

        Raises:
            UsageError: a rule that is no skip, and no list, names one of them, or changes nothing at all.
        """
        held: dict[int, list[Fate]] = {}
        for rule, fate in fates:
            held.setdefault(id(rule), []).append(fate)
        warnings = []
        for rule in (rule for rule in self._rules if not rule.skip):
            met = held.get(id(rule), [])
            # A search lists layers by name, and some of them may stay in what it tries.
            if isinstance(rule.match, str):
                _require_named(rule, met)
            left = [fate for fate in met if fate.reason and fate.is_layer]
            what = listed([repr(glob) for glob in rule.globs])
            if not met:
                warnings.append(f"The rule for {what} holds for no layer: rules and skips before it mean them all.")
            elif left:
                names, reasons = listed([fate.module for fate in left]), Counter(fate.reason for fate in left)
                why = "; ".join(str(reason) for reason, _ in reasons.most_common(3))
                warnings.append(f"The rule for {what} means {names} as well, which stays as it is: {why}.")
        return warnings

    def group_size(self, rule: Rule | None) -> int | None:
        """The group size that is asked for where this rule holds, or None."""
        return (rule.group_size if rule else None) or self._size


def _require_named(rule: Rule, met: Sequence[Fate]) -> None:
    """Raise UsageError for the first name in a rule, or for all that it means, where nothing of that changes."""
    by_name: dict[str, list[Fate]] = {}
    for fate in met:
        for name in fate.names:
            for each in {name, module_of(name)}:
                by_name.setdefault(each, []).append(fate)
    for glob, fates in [*((glob, by_name.get(glob, [])) for glob in rule.globs), (None, met)]:
        if fates and all(fate.reason for fate in fates):
            worst = next((fate for fate in fates if fate.is_layer), fates[0])
            name = glob or worst.module
            raise UsageError(
                f"A rule names {name}, which has to stay as it is: {worst.reason}."
                if glob
                else f"The rule for {listed([repr(each) for each in rule.globs])} changes nothing: {name} has to stay "
                f"as it is: {worst.reason}.",
                "Remove the rule, or choose a scheme or a --format that takes this layer.",
            )


class Matcher:
    """Several globs at once, each of which `means` some layers."""

    def __init__(self, globs: Sequence[str]) -> None:
        # A search names layers by the hundred: what has no wildcard is looked up.
        self._names = {glob for glob in globs if not _WILDCARD.search(glob)}
        self._patterns = [re.compile(translate(glob)) for glob in globs if glob not in self._names]

    def __call__(self, *names: str) -> bool:
        """Whether any of the globs means a layer with these names."""
        return any(
            each in self._names or any(pattern.match(each) for pattern in self._patterns)
            for name in names
            for each in (name, module_of(name))
        )


def rule_matches(rule: Rule, names: Iterable[str]) -> bool:
    """Whether a rule means a layer with these names."""
    return Matcher(rule.globs)(*names)


def means(glob: str, name: str) -> bool:
    """Whether a glob means a tensor or node: by its own name, or its module's."""
    return fnmatchcase(name, glob) or fnmatchcase(module_of(name), glob)


def scheme_asked_for(recipe: Recipe) -> str | SchemeSpec:
    """The scheme of a recipe. Raises UsageError where it has none."""
    if recipe.scheme is None:
        raise UsageError("No scheme is given.", f"Choose one with --scheme: {', '.join(PRESETS)}.")
    return recipe.scheme


def label_of(wish: str | SchemeSpec, scheme: Scheme) -> str:
    """Short name of a scheme as it was asked for: the preset's, or the dtype of weights."""
    return wish if isinstance(wish, str) else scheme.weights.dtype


def full_label(label: str, scheme: Scheme | None) -> str | None:
    """A short name with the group size; None for a layer without a scheme."""
    if scheme is None:
        return None
    return f"{label} {scheme.weights.granularity}" if scheme.weights.is_grouped else label


def no_groups(label: str, scheme: Scheme) -> UsageError:
    """What a group size is answered with that a scheme has no use for."""
    kind = scheme.weights.granularity.kind
    return UsageError(f"--group-size does not apply to {label}, whose scales are per {kind}.")


def require_support(algorithm: str, number_format: NumberFormat) -> None:
    """Raise UsageError where an algorithm cannot serve a number format."""
    reason = algorithms.algorithm(algorithm).supports(number_format)
    if reason:
        raise UsageError(f"The algorithm {algorithm} does not fit: {reason}.")
