"""The vocabulary of a search: groups of layers, the ways to store each, and a mix of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.planning.recipe import Recipe


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
    rule: tuple[tuple[str, Any], ...]
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


def rules_of(groups: Sequence[Group], mix: Mix) -> list[dict[str, Any]]:
    """A recipe's rules for a mix: one for each way to store, with the layers that are stored so."""
    layers: dict[tuple[tuple[str, Any], ...], list[str]] = {}
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
