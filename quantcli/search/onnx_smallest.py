"""The smallest mix of a graph that keeps limits on outputs: how much noise they allow is found by trying."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log

from quantcli.planning.recipe import Recipe
from quantcli.search.budget import Budget
from quantcli.search.choices import Mix
from quantcli.search.clock import Pace
from quantcli.search.onnx_levels import LevelSearch
from quantcli.search.onnx_measured import Measurements
from quantcli.search.onnx_mixes import AS_SMALL, Limits, Mixes, level_of, noise_at

#: Mixes that may come out larger than was estimated.
_ATTEMPTS = 6


@dataclass
class SmallestSearch:
    """Looks for the smallest mix that keeps the limits on outputs.

    From where what was judged lets expect the limit, levels of noise are tried at growing distances until one is kept
    and one is not, then by halves: what is tried first is of the size that matters, should the time end there. What
    uses a limit up but for a small rest is small enough, as is what is larger by a little than what is to be expected.
    Levels that another budget tried are not tried again.

    Attributes:
        budget: the limits.
        mixes: what is chosen of.
        measured: what is known of recipes.
        pace: whether there is time for another trial.
        recipe_of: notes a mix, and makes its recipe.
        most: bytes that the artifact may have, or None. What was estimated is corrected by what comes out.
        limits: others that a mix has to keep.
    """

    budget: Budget
    mixes: Mixes
    measured: Measurements
    pace: Pace
    recipe_of: Callable[[Mix], Recipe]
    most: int | None
    limits: Limits

    def __post_init__(self) -> None:
        self._expected: float | None = None
        self._room = inf if self.most is None else float(self.most - self.mixes.ways.rest)
        self._mixes: dict[tuple[int, float], Mix | None] = {}
        # Levels stand for mixes, which other limits make others.
        self._named = json.dumps([self.most, self.limits], sort_keys=True)

    def find(self, judged: Sequence[Recipe]) -> Recipe | None:
        """The smallest that was found, or None. ``judged`` are recipes of one scheme, which tell what to expect."""
        outcomes = self._outcomes()
        self._expected = self._expected_noise(judged, outcomes)
        kept = {level: recipe for level, recipe, is_kept in outcomes if is_kept}
        levels = LevelSearch(self._expected)
        for known, _, is_kept in outcomes:
            levels.know(known, is_kept=is_kept)
        too_large = 0
        while (level := levels.next) is not None and not self._is_enough(kept, levels) and self.pace.has_time():
            with self.pace.trial():
                recipe = self._at(level)
                if recipe is None or too_large > _ATTEMPTS:
                    break
                if not self._fits(recipe):
                    too_large += 1
                    continue
                is_kept = self.measured.keeps(self.budget, recipe)
            self.measured.note_level(self._named, level)
            if (mix := self._mix_at(level)) is not None:
                self.measured.note_mix(mix)
            levels.tell(level, is_kept=is_kept)
            outcomes.append((level, recipe, is_kept))
            self._expected = self._expected_noise(judged, outcomes)
            if is_kept:
                kept[level] = recipe
        return min(kept.values(), key=self.measured.size, default=None)

    def _is_enough(self, kept: Mapping[int, Recipe], levels: LevelSearch) -> bool:
        """Whether the limit is used up but for a small rest, or what can be expected yet is hardly smaller."""
        if not kept:
            return False
        if any(map(self._is_used_up, kept.values())):
            return True
        smallest = min(kept, key=lambda level: self.measured.size(kept[level]))
        reachable = max(levels.lowest, level_of(self._expected)) if self._expected else levels.lowest
        return AS_SMALL * self._nbytes(reachable) >= self._nbytes(smallest)

    def _nbytes(self, level: int) -> float:
        """Bytes of the artifact for a level, by estimate."""
        mix = self._mix_at(level)
        return 0.0 if mix is None else self.mixes.nbytes(mix)

    def _mix_at(self, level: int) -> Mix | None:
        key = level, self._room
        if key not in self._mixes:
            limits = self.limits if self.most is None else {**self.limits, "nbytes": self._room}
            self._mixes[key] = self.mixes.at(level, limits)
        return self._mixes[key]

    def _at(self, level: int) -> Recipe | None:
        mix = self._mix_at(level)
        return None if mix is None else self.recipe_of(mix)

    def _fits(self, recipe: Recipe) -> bool:
        """Whether the artifact is small enough; where it is not, the next mix will have to be smaller."""
        if self.most is None or (excess := self.measured.size(recipe) - self.most) <= 0:
            return True
        # By a little more, so that few attempts are needed.
        self._room -= excess + self.most // 4096
        return False

    def _is_used_up(self, recipe: Recipe) -> bool:
        return self.measured.is_used_up(self.budget, recipe)

    def _outcomes(self) -> list[tuple[int, Recipe, bool]]:
        """What is known of levels that earlier searches tried: the recipe, and whether it keeps the limits."""
        found = []
        for level in self.measured.levels(self._named):
            recipe = self._at(level)
            is_kept = None if recipe is None else self.measured.verdict(self.budget, recipe)
            if recipe is not None and is_kept is not None and self._fits(recipe):
                found.append((level, recipe, is_kept))
        return found

    def _expected_noise(self, judged: Sequence[Recipe], outcomes: Sequence[tuple[int, Recipe, bool]]) -> float | None:
        """The noise that would just keep the limits if losses grew with it as in recipes that were judged.

        Of these the one that is nearest to the limits tells; None: none does.
        """
        points = [(self.measured.used(self.budget, recipe), noise_at(level)) for level, recipe, _ in outcomes]
        points += [
            (used, self.measured.noise(recipe))
            for recipe in judged
            if (used := self.measured.used(self.budget, recipe)) > 0
        ]
        expected = [(abs(log(used)), noise / used) for used, noise in points if used > 0 and noise > 0]
        return min(expected)[1] if expected else None
