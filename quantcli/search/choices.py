"""The vocabulary of a search: groups of layers, the ways to store each, and a mix of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.core.scheme import PRESETS
from quantcli.planning.recipe import Recipe, validate
from quantcli.search.budget import FLOAT

#: Sizes of groups to choose from where the user names none, finest first: those that every runtime runs.
_GROUP_SIZES = (32, 64, 128)
#: What a recipe's rule says beside the layers that it means.
Rule = tuple[tuple[str, Any], ...]
SKIP: Rule = (("skip", True),)


def ways_to_store(recipe: Recipe, allow: Sequence[str]) -> dict[str, Rule]:
    """What a recipe's rule says for each way to store a layer, by what people call it, as the user ordered them."""
    ways: dict[str, Rule] = {}
    for name in allow:
        if name == FLOAT:
            ways[FLOAT] = SKIP
        elif PRESETS[name].weights.granularity.kind == "group":
            for size in (recipe.group_size,) if recipe.group_size else _GROUP_SIZES:
                ways[f"{name} group {size}"] = (("scheme", name), ("group_size", size))
        else:
            ways[name] = (("scheme", name),)
    return ways


def chosen_recipe(recipe: Recipe, entries: Mapping[str, Any], rules: Sequence[Mapping[str, Any]] = ()) -> Recipe:
    """A user's recipe with what was chosen: its own rules come before others, and its size of groups is a choice."""
    own = recipe.model_dump(exclude_unset=True)
    own.pop("group_size", None)
    more = {"rules": [*own.get("rules", []), *rules]} if rules else {}
    return validate({**own, **entries, **more}, "the search")


@dataclass(frozen=True)
class Choice:
    """One way to store a group.

    Attributes:
        label: what people call it, such as ``int4 group 64``.
        rule: what a recipe's rule says beside ``match``: ``{"scheme": "int4", "group_size": 64}``, ``{"skip": True}``.
        nbytes: what the group takes in the artifact.
        cost: how far the outputs move, estimated, in the measure of the search; it adds up over groups.
        milliseconds: what the group takes of a run; 0 where latency does not matter.
    """

    label: str
    rule: Rule
    nbytes: int
    cost: float
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Group:
    """Layers that are stored alike, by the names that a recipe's rules match; ``choices`` is never empty."""

    layers: tuple[str, ...]
    choices: tuple[Choice, ...]

    @property
    def name(self) -> str:
        """What people call it."""
        return self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} and {len(self.layers) - 1} more"


#: The number of a choice for every group, in the groups' order.
Mix = tuple[int, ...]


def chosen(groups: Sequence[Group], mix: Mix) -> list[Choice]:
    """The choices of a mix."""
    return [group.choices[number] for group, number in zip(groups, mix, strict=True)]


def total(groups: Sequence[Group], mix: Mix, column: str) -> float:
    """The sum of ``nbytes``, ``cost`` or ``milliseconds`` over a mix."""
    return float(sum(getattr(choice, column) for choice in chosen(groups, mix)))


def labels(groups: Sequence[Group], mix: Mix) -> dict[str, int]:
    """How many layers are stored how, the most frequent first."""
    counts: Counter[str] = Counter()
    for group, choice in zip(groups, chosen(groups, mix), strict=True):
        counts[choice.label] += len(group.layers)
    return dict(counts.most_common())


def rules_of(groups: Sequence[Group], mix: Mix) -> list[dict[str, Any]]:
    """A recipe's rules for a mix: one for each way to store, with the layers that are stored so."""
    layers: dict[Rule, list[str]] = {}
    for group, choice in zip(groups, chosen(groups, mix), strict=True):
        layers.setdefault(choice.rule, []).extend(group.layers)
    return [{"match": names} | dict(rule) for rule, names in layers.items()]


@dataclass(frozen=True)
class Found:
    """What a search ends with: a recipe that needs no search, and what is to be said of how it was found.

    ``details`` go into the report under ``budget``; see docs/budgets.md.
    """

    recipe: Recipe
    details: dict[str, Any]
    warnings: tuple[str, ...] = ()
