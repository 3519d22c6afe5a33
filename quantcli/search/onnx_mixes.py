"""Mixes of ways to store the layers of a graph, by estimates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf

from quantcli.planning.recipe import Recipe
from quantcli.search.budget import FLOAT
from quantcli.search.choices import Group, Mix, total
from quantcli.search.onnx_ways import Ways
from quantcli.search.solver import Column, best_mix, best_mixes

Limits = Mapping[Column, float]

#: Steps in which the noise that is allowed is tried: a grid, so that another budget meets mixes measured before.
_STEP_DB, _LEAST_DB = 0.75, -30.0
#: So many of them: the last one allows hardly any noise.
LEVELS = 141
#: Steps between points of a frontier.
_SHOWN_EVERY = 4
#: A mix may be so much larger than the smallest one where that saves work.
AS_SMALL = 1.02
#: A mix that is slower than a single scheme has to have no more than this share of its bytes.
WORTH_TIME = 0.9


def noise_at(level: int) -> float:
    """The noise by signal that a level allows."""
    return float(10 ** (-(_LEAST_DB + level * _STEP_DB) / 10))


def level_of(noise: float) -> int:
    """The first level that allows no more than this noise."""
    level = math.ceil((-10 * math.log10(noise) - _LEAST_DB) / _STEP_DB)
    return min(LEVELS - 1, max(0, level))


@dataclass(frozen=True)
class Mixes:
    """The choices of every layer, with what they cost, and the mixes that the solver finds among them."""

    ways: Ways
    groups: list[Group]

    def recipe_of(self, mix: Mix) -> Recipe:
        """A mix as an ordinary recipe."""
        return self.ways.recipe_of(self.groups, mix)

    def cost(self, mix: Mix) -> float:
        """The noise of a mix, estimated."""
        return total(self.groups, mix, "cost")

    def nbytes(self, mix: Mix) -> float:
        """Bytes of the artifact, estimated."""
        return total(self.groups, mix, "nbytes") + self.ways.rest

    def work(self, mix: Mix) -> float:
        """What a run takes, in multiplications of a float convolution."""
        return total(self.groups, mix, "milliseconds")

    @cached_property
    def nothing(self) -> list[Mix]:
        """The mix that quantizes nothing, which is no conversion."""
        numbers = [{choice.label: n for n, choice in enumerate(group.choices)}.get(FLOAT) for group in self.groups]
        return [] if None in numbers else [tuple(number for number in numbers if number is not None)]

    def smallest(self, limits: Limits) -> Mix | None:
        """The smallest mix within limits; of those that are about as small, the one with the least work."""
        smallest = best_mix(self.groups, "nbytes", limits, without=self.nothing)
        if smallest is None:
            return None
        size = AS_SMALL * self.nbytes(smallest) - self.ways.rest
        within = {**limits, "nbytes": min(size, limits.get("nbytes", inf))}
        return best_mix(self.groups, "milliseconds", within, without=self.nothing) or smallest

    def least_bytes(self) -> Mix:
        """The smallest mix of all."""
        mix = best_mix(self.groups, "nbytes", {}, without=self.nothing)
        assert mix is not None
        return mix

    def least_work(self, limits: Limits) -> Mix | None:
        """The mix within limits whose runs take least."""
        return best_mix(self.groups, "milliseconds", limits, without=self.nothing)

    def at(self, level: int, limits: Limits) -> Mix | None:
        """The smallest mix within limits and one level of noise, from 0 to `LEVELS` - 1, the least noise last.

        Where none has so little noise it is the one that has least; None: none is within the limits.
        """
        mix = self.smallest({**limits, "cost": noise_at(level)})
        return best_mix(self.groups, "cost", limits, without=self.nothing) if mix is None else mix

    def levels(self) -> list[Mix]:
        """Mixes for less and less noise, from the smallest of all to the one that loses least, each once."""
        mixes = dict.fromkeys(self.at(level, {}) for level in range(0, LEVELS, _SHOWN_EVERY))
        return [mix for mix in mixes if mix is not None]

    def least_noise(self, limits: Limits, count: int) -> Iterator[Mix]:
        """The mixes of the least noise within limits, the best first."""
        return (mix for mix in best_mixes(self.groups, "cost", limits, count=count) if mix not in self.nothing)

    def neighbours(self, mix: Mix, limits: Limits) -> Iterator[Mix]:
        """Mixes within limits in which one layer is stored otherwise."""
        for number, group in enumerate(self.groups):
            for other in range(len(group.choices)):
                near = (*mix[:number], other, *mix[number + 1 :])
                within = all(total(self.groups, near, name) <= most for name, most in limits.items())
                if other != mix[number] and within and near not in self.nothing:
                    yield near
