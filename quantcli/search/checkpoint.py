"""A budget on a checkpoint: which scheme for which layer, found by estimates, held to measurements, judged apart."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from quantcli.planning.recipe import Recipe
from quantcli.search.budget import Budget
from quantcli.search.choices import Found, Mix, total
from quantcli.search.judge import KL
from quantcli.search.limits import limits_of
from quantcli.search.solver import best_mix, best_mixes
from quantcli.search.trials import CheckpointTrials
from quantcli.search.unmet import loses_too_much, too_large

#: Attempts to meet a limit on outputs, each at a cost that the one before shows to be better.
_ATTEMPTS = 6
#: A smaller artifact is looked for while the limit is used up to no more than this share.
_USED = 0.85
#: By so much a planned size may be more than that of the artifact.
_SLACK_BYTES = 2048
#: Points of the frontier.
_POINTS = 9


@dataclass
class CheckpointSearch:
    """One search for one budget; ``is_repeated``: what an earlier one found did not keep it."""

    trials: CheckpointTrials
    budget: Budget
    is_repeated: bool = False

    def run(self) -> Found:
        """Find a recipe that keeps the budget.

        Raises:
            BudgetError: there is none, or too few samples show that there is one.
            UsageError: a target refuses all mixes, or the data gives no such metric.
            InputError: the data does not suit the model.
        """
        self._require_room()
        mix = self._for_outputs() if self.budget.judges_outputs else self._for_size()
        recipe = self.trials.ways.recipe_of(self.trials.groups, mix)
        return Found(recipe, self._details(mix, recipe), self._warnings())

    def _require_room(self) -> None:
        """Raise BudgetError, before any work, where not even the smallest mix keeps the ceiling on bytes."""
        if self.budget.max_size is None:
            return
        smallest = best_mix(self.trials.unpriced, "nbytes", {})
        assert smallest is not None
        least = self.trials.nbytes(smallest)
        if least > self.budget.max_size:
            raise too_large(self.budget, least, [])

    def _limit(self) -> float:
        """What the groups' bytes may sum up to, so that the whole artifact keeps the ceiling."""
        assert self.budget.max_size is not None
        limit = float(self.budget.max_size)
        smallest = self._extreme("nbytes")
        # What all mixes have beside the groups; names in recipe and headers differ by a little, which is repaired.
        limit -= self.trials.nbytes(smallest) - total(self.trials.groups, smallest, "nbytes")
        while True:
            mix = best_mix(self.trials.groups, "cost", {"nbytes": limit}) or smallest
            excess = self.trials.nbytes(mix) - self.budget.max_size
            if excess <= 0 or mix == smallest:
                return limit
            limit -= excess

    def _for_size(self) -> Mix:
        """The mix of the least loss under a ceiling on bytes; no worse than one scheme for all, where that fits."""
        limit = self._limit()
        mixes = list(best_mixes(self.trials.groups, "cost", {"nbytes": limit}, count=self.trials.measured_count()))
        fitting = [mix for mix in mixes if self.trials.nbytes(mix) <= (self.budget.max_size or 0)]
        best = fitting[0]
        for mix in fitting[1:]:
            if not self.trials.clock.is_over() and self.trials.distance(mix) < self.trials.distance(best):
                best = mix
        uniform = self._best_uniform()
        if uniform is None or uniform == best or self.trials.evidence is None or self.trials.clock.is_over():
            return best
        if self.trials.is_surpassed(uniform, best):
            return best
        return uniform if self.trials.is_better(uniform, best) else best

    def _best_uniform(self) -> Mix | None:
        """The best by estimate of the mixes that have one scheme for all layers."""
        assert self.budget.max_size is not None
        # What is planned is a little more than what comes of it. What is too large after all is not published, and the
        # search repeated without this allowance.
        most = self.budget.max_size + (0 if self.is_repeated else _SLACK_BYTES)
        mixes = [mix for mix in self.trials.uniforms() if self.trials.nbytes(mix) <= most]
        return min(mixes, key=lambda mix: total(self.trials.groups, mix, "cost"), default=None)

    def _for_outputs(self) -> Mix:
        """The smallest mix that keeps the limits on outputs, as sure as the samples allow.

        How much an estimated cost may be is found by trying: what is measured tells by how much the next differs.
        """
        least, most = self._extreme("cost"), self._extreme("nbytes")
        low, high = (max(total(self.trials.groups, mix, "cost"), 1e-12) for mix in (least, most))
        limit = min(high, max(low, self.budget.max_kl or high / 4))
        accepted: Mix | None = None
        for _ in range(_ATTEMPTS):
            mix = best_mix(self.trials.groups, "nbytes", {"cost": max(limit, low)}) or least
            used = self._used(mix)
            if used <= 1 and (accepted is None or self.trials.nbytes(mix) < self.trials.nbytes(accepted)):
                accepted = mix
            is_settled = used > _USED or mix == most if used <= 1 else mix == least
            if is_settled or self.trials.clock.is_over():
                break
            low, high = (limit, high) if used <= 1 else (low, limit)
            # In the middle of what is known, or where the loss, in proportion, would just be kept.
            limit = min(max(limit * min(4.0, 0.95 / max(used, 0.05)), low * 1.02), high * 0.98)
        accepted = self._smaller_uniform(accepted)
        if accepted is None and self._used(least) <= 1:
            accepted = least
        if accepted is None:
            limits = limits_of(self.budget, self.trials.drops(least))
            raise loses_too_much(self.budget, limits, self._candidates())
        if self.budget.max_size is not None and self.trials.nbytes(accepted) > self.budget.max_size:
            raise too_large(self.budget, self.trials.nbytes(accepted), self._candidates())
        return accepted

    def _extreme(self, column: Literal["cost", "nbytes"]) -> Mix:
        mix = best_mix(self.trials.groups, column, {})
        assert mix is not None
        return mix

    def _smaller_uniform(self, accepted: Mix | None) -> Mix | None:
        """One scheme for all layers, where that keeps the limits and is smaller than what was found."""
        for mix in sorted(self.trials.uniforms(), key=self.trials.nbytes):
            if accepted is not None and self.trials.nbytes(mix) >= self.trials.nbytes(accepted):
                break
            if not self.trials.clock.is_over() and self._used(mix) <= 1:
                return mix
        return accepted

    def _used(self, mix: Mix) -> float:
        """How much of the limits on outputs a mix uses, with confidence: above 1 one of them is not kept."""
        return max(
            drop.bound / limit if limit > 0 else (0.0 if drop.bound <= 0 else inf)
            for _, limit, drop in limits_of(self.budget, self.trials.drops(mix))
        )

    def _candidates(self, mix: Mix | None = None) -> list[dict[str, Any]]:
        """Mixes of one scheme, those that were judged, and the chosen one, by size."""
        judged = [other for other in self.trials.seen if self.trials.is_compared(other)]
        known = dict.fromkeys([*self.trials.uniforms(), *judged, *([] if mix is None else [mix])])
        rows = [(other, self.trials.row(other)) for other in sorted(known, key=self.trials.nbytes)]
        return [row | {"chosen": other == mix} for other, row in rows]

    def frontier(self) -> list[dict[str, Any]]:
        """Points from the smallest mix to the one that loses least, the best of their size by estimate."""
        smallest, least = (total(self.trials.groups, self._extreme(each), "nbytes") for each in ("nbytes", "cost"))
        sizes = [smallest + (least - smallest) * number / (_POINTS - 1) for number in range(_POINTS)]
        found = (best_mix(self.trials.groups, "cost", {"nbytes": size}) for size in sizes)
        mixes = list(dict.fromkeys(mix for mix in found if mix is not None))
        for mix in mixes:
            if self.trials.evidence is not None and not self.trials.clock.is_over():
                self.trials.drops(mix)
        return [self.trials.row(mix) for mix in mixes]

    def _details(self, mix: Mix, recipe: Recipe) -> dict[str, Any]:
        evidence = self.trials.evidence
        return {
            "asked": self.budget.ceilings,
            "measure": self.trials.store.found.measure,
            "samples": {"searched": len(evidence.searched), "held_out": len(evidence.held_out)} if evidence else None,
            "chosen": self.trials.row(mix),
            "candidates": self._candidates(mix),
            "frontier": self.frontier() if self.budget.pareto else None,
            "recipe": recipe.model_dump(mode="json", exclude_unset=True),
            "search_seconds": round(self.trials.clock.seconds, 3),
        }

    def _warnings(self) -> tuple[str, ...]:
        told = []
        if self.trials.evidence is None:
            told.append(
                "There is no --data, so layers were chosen by the error of their weights alone, which says little of "
                "what a model loses."
            )
        elif self.trials.store.found.measure != KL:
            told.append("The model returns no logits; what is kept small is the error of its first output.")
        return tuple(told)
