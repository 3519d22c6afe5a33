"""A budget on an ONNX graph: what becomes of which layer, found by estimates, held to measurements, judged apart.

What a layer costs is the noise that it alone leaves on the outputs; noise adds up, as far as errors are independent.
How much noise a limit on outputs allows is found by trying: mixes are converted as they would be published, and judged.
Of mixes that are as small but for a few hundredths, the one with the least work is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from quantcli.errors import InputError
from quantcli.planning.recipe import Recipe
from quantcli.search.budget import Budget
from quantcli.search.choices import Found, Mix, labels, ways_to_store
from quantcli.search.clock import Clock, Pace
from quantcli.search.judge import KL, metric_of
from quantcli.search.onnx_known import read_off
from quantcli.search.onnx_measured import Measurements
from quantcli.search.onnx_mixes import AS_SMALL, LEVELS, WORTH_TIME, Limits, Mixes
from quantcli.search.onnx_sensitivity import layer_costs
from quantcli.search.onnx_smallest import SmallestSearch
from quantcli.search.onnx_subject import GraphSubject
from quantcli.search.onnx_trials import key_of
from quantcli.search.onnx_ways import Ways, label_of, uniform_recipes
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.search.solver import Column
from quantcli.search.unmet import loses_too_much, too_few_samples, too_large, too_slow

#: Mixes that are the best by estimate, and measured to be told apart.
_MEASURED = 8
#: Of a graph of so few layers, all neighbours of the best mix are measured, too.
_FEW_LAYERS = 12
#: Attempts to fit a ceiling that an estimate of bytes or time just missed.
_ATTEMPTS = 6
#: A mix that is a little larger than another one has to have no more than this share of its work.
_WORTH_WORK = 0.95
#: Where less work is looked for, by the noise of what is accepted: what adds up otherwise than was estimated is tried
#: once more with less.
_LESS_NOISE = (1.0, 0.8)
#: Where what is learned is kept, limits so many times as wide are looked at, too: budgets to come are likely near.
_AROUND = (0.5, 0.7, 1.4, 2.0)
#: No mix is so many times as fast as the fastest single scheme: what kernels take differs by less.
_NEVER_AS_FAST = 4
#: Points of the frontier.
_POINTS = 9


@dataclass
class OnnxSearch:
    """One search for a mix that keeps a budget."""

    subject: GraphSubject
    budget: Budget
    store: SensitivityStore
    measured: Measurements
    tick: Callable[[float], None] = lambda _: None
    clock: Clock = field(default_factory=Clock)
    _mix_of: dict[str, Mix] = field(default_factory=dict)
    _judged_uniforms: list[Recipe] = field(default_factory=list)

    def run(self) -> Found:
        """Find a recipe that keeps the budget.

        Raises:
            BudgetError: there is none, or too few samples show that there is one.
            UsageError: the data gives no such metric.
            InputError: the data does not suit the model.
        """
        if self.budget.judges_outputs:
            self._require_samples()
        self._require_time_in_reach()
        recipe = self._for_outputs() if self.budget.judges_outputs else self._for_room()
        return Found(recipe, self._details(recipe), self._warnings())

    @cached_property
    def pace(self) -> Pace:
        """How long trials take."""
        return Pace(self.clock)

    @cached_property
    def ways(self) -> Ways:
        """What each layer can become, as it is known from before or seen now."""
        known, own = self.store.found, self.subject.recipe
        if not known.graph:
            ways = self.subject.ways
            known.graph, known.rest = dict(ways.layers), ways.rest
            self.store.save()
        return Ways(own, ways_to_store(own, self.budget.allow), known.graph, known.rest)

    @cached_property
    def mixes(self) -> Mixes:
        """What is chosen of, with estimated costs."""
        costs = layer_costs(lambda: self.subject.runs, self.ways, self.store, self.clock.is_half_over, self.tick)
        return Mixes(self.ways, self.ways.groups(costs))

    def _recipe(self, mix: Mix) -> Recipe:
        recipe = self.mixes.recipe_of(mix)
        self._mix_of[key_of(recipe)] = mix
        return recipe

    # Ceilings.

    def _require_samples(self) -> None:
        """Raise BudgetError where even a model that loses nothing would not be seen to keep a limit."""
        for limited in self.measured.best_case(self.budget):
            if limited[2].bound > limited[1]:
                raise too_few_samples(self.budget, limited, [])

    def _fits(self, recipe: Recipe) -> bool:
        return self.budget.max_size is None or self.measured.size(recipe) <= self.budget.max_size

    def _keeps_outputs(self, recipe: Recipe) -> bool:
        return self.measured.keeps(self.budget, recipe)

    def _keeps(self, recipe: Recipe) -> bool:
        """Whether a recipe keeps the ceilings on bytes and on outputs."""
        return self._fits(recipe) and (not self.budget.judges_outputs or self._keeps_outputs(recipe))

    def _room(self) -> dict[Column, float]:
        """What layers may take where bytes are limited, by estimate."""
        if self.budget.max_size is None:
            return {}
        return {"nbytes": float(self.budget.max_size - self.ways.rest)}

    # One scheme for all layers.

    def _converted_uniforms(self) -> list[Recipe]:
        """Those that can be converted, the smallest first."""
        found: list[tuple[int, int, Recipe]] = []
        for recipe in uniform_recipes(self.subject.recipe, self.budget.allow):
            try:
                found.append((self.measured.size(recipe), len(found), recipe))
            except InputError:
                # The scheme applies to nothing here, or what it makes is refused.
                continue
        return [recipe for _, _, recipe in sorted(found, key=lambda each: each[:2])]

    # A limit on outputs: the smallest that keeps it.

    def _for_outputs(self) -> Recipe:
        """The smallest mix that keeps the limits on outputs, as sure as the samples allow.

        What earlier searches know is taken where it is about as small as what could be found.
        """
        is_first = not self.measured.mixes()
        accepted = self._read_off(self.budget)
        if accepted is None:
            accepted = self._smallest(self.budget)
            if not self.measured.runs:
                # All of it was known, and nothing smaller is to be expected.
                accepted = self._read_off(self.budget, is_settled=True) or accepted
            elif accepted is not None and self._fits(accepted):
                accepted = self._faster(accepted)
            if is_first and self.store.path is not None:
                self._look_around()
        if accepted is None:
            safest = self._safest()
            if not self._keeps_outputs(safest):
                raise loses_too_much(self.budget, self.measured.limits(self.budget, safest), self._candidates())
            accepted = safest
        if not self._fits(accepted):
            raise too_large(self.budget, self.measured.size(accepted), self._candidates())
        return self._fast_enough(accepted)

    def _read_off(self, budget: Budget, *, is_settled: bool = False) -> Recipe | None:
        """What is known to keep a budget's limits on outputs and bytes, and small enough; see `read_off`."""
        if not self.measured.mixes():
            return None
        uniforms = [(recipe, self.ways.work_of(label_of(recipe))) for recipe in self._converted_uniforms()]
        return read_off(budget, self.mixes, self.measured, uniforms, self._recipe, is_settled=is_settled)

    def _look_around(self) -> None:
        """Judge what budgets near this one would choose, as far as there is time."""
        for factor in _AROUND:
            near = self.budget.scaled(factor)
            if self.pace.has_time() and self._read_off(near) is None:
                self._smallest(near)

    def _smallest(self, budget: Budget) -> Recipe | None:
        """The smallest that is found to keep the limits on outputs, if any.

        Single schemes are judged first: of mixes, only those that are smaller than the best of them matter.
        """
        uniform = self._smallest_uniform(budget)
        return self._smallest_kept(budget, budget.max_size, {}) if uniform is None else self._smaller(budget, uniform)

    def _safest(self) -> Recipe:
        """The mix that loses least, by estimate."""
        mix = self.mixes.at(LEVELS - 1, {})
        assert mix is not None
        return self._recipe(mix)

    def _smallest_uniform(self, budget: Budget) -> Recipe | None:
        """The smallest artifact of one scheme for all layers that keeps the limits on outputs."""
        for recipe in self._converted_uniforms():
            if not self.pace.has_time():
                break
            if recipe not in self._judged_uniforms:
                self._judged_uniforms.append(recipe)
            with self.pace.trial():
                is_kept = self.measured.keeps(budget, recipe)
            if is_kept:
                return recipe
        return None

    def _smaller(self, budget: Budget, uniform: Recipe) -> Recipe:
        """The smallest mix that is smaller than a single scheme and no slower, or much smaller; or that scheme."""
        size = self.measured.size(uniform)
        as_fast: Limits = {"milliseconds": self.ways.work_of(label_of(uniform))}
        found = self._smallest_kept(budget, size - 1, as_fast)
        return found or self._smallest_kept(budget, int(WORTH_TIME * size), {}) or uniform

    def _faster(self, accepted: Recipe) -> Recipe:
        """A mix that is as small but for a little, with clearly less work and no more noise; or what was accepted.

        One that an earlier search tried comes before one that was not.
        """
        mix, most = self._mix_of.get(key_of(accepted)), int(AS_SMALL * self.measured.size(accepted))
        most = min(most, self.budget.max_size or most)
        work = self.ways.work_of(label_of(accepted)) if mix is None else self.mixes.work(mix)
        noise = self.measured.noise(accepted) if mix is None else self.mixes.cost(mix)
        wanted = [*self.measured.fast(), *((most - self.ways.rest, share * noise) for share in _LESS_NOISE)]
        for room, allowed in wanted:
            mix = self.mixes.least_work({"nbytes": room, "cost": allowed})
            if mix is None or self.mixes.work(mix) > _WORTH_WORK * work:
                continue
            recipe = self._recipe(mix)
            if self.measured.verdict(self.budget, recipe) is None:
                if (room, allowed) in self.measured.fast() or not self.pace.has_time():
                    continue
                self.measured.note_fast(room, allowed)
            with self.pace.trial():
                if self.measured.size(recipe) <= most:
                    is_kept = self._keeps_outputs(recipe)
                    self.measured.note_mix(mix)
                    if is_kept:
                        return recipe
        return accepted

    def _smallest_kept(self, budget: Budget, most: int | None, limits: Limits) -> Recipe | None:
        """The smallest mix within limits that keeps those on outputs, of ``most`` bytes."""
        search = SmallestSearch(budget, self.mixes, self.measured, self.pace, self._recipe, most, limits)
        return search.find(self._judged_uniforms)

    # A limit on bytes or time: the one that loses least.

    def _for_room(self) -> Recipe:
        """The mix of the least loss under a ceiling on bytes, time, or both."""
        recipe = self._fast_enough(self._least_loss({}))
        if self.subject.evidence is None:
            return recipe
        for uniform in self._converted_uniforms():
            if not self.clock.is_over() and self._fits(uniform) and self._loss(uniform) < self._loss(recipe):
                recipe = uniform if self._is_fast(uniform) else recipe
        return recipe

    def _loss(self, recipe: Recipe) -> float:
        drops = self.measured.drops(recipe)
        return drops[KL if KL in drops else metric_of(drops, None)].mean

    def _least_loss(self, limits: Limits) -> Recipe:
        """The mix of the least noise within limits whose artifact keeps the ceiling on bytes.

        Raises:
            BudgetError: there is none.
        """
        room = self._room()
        for _ in range(_ATTEMPTS):
            recipe = self._least_noise({**limits, **room})
            if recipe is None:
                break
            if self._fits(recipe):
                return recipe
            room["nbytes"] -= self.measured.size(recipe) - (self.budget.max_size or 0)
        recipes = [self._recipe(self.mixes.least_bytes()), *self._converted_uniforms()]
        least = min(recipes, key=self.measured.size)
        if self._fits(least):
            return least
        raise too_large(self.budget, self.measured.size(least), self._candidates())

    def _least_noise(self, limits: Limits) -> Recipe | None:
        """Of the best mixes by estimate, and their neighbours, the one whose outputs move least."""
        mixes = list(self.mixes.least_noise(limits, _MEASURED))
        if not mixes:
            return None
        best = min(mixes, key=self._noise)
        while len(self.mixes.groups) <= _FEW_LAYERS and not self.clock.is_over():
            near = min(self.mixes.neighbours(best, limits), key=self._noise, default=best)
            if self._noise(near) >= self._noise(best):
                break
            best = near
        return self._recipe(best)

    def _noise(self, mix: Mix) -> float:
        """How far the outputs move on the samples of the search; by estimate once the time is over."""
        return self.mixes.cost(mix) if self.clock.is_over() else self.measured.noise(self.mixes.recipe_of(mix))

    # A limit on time.

    def _require_time_in_reach(self) -> None:
        """Raise BudgetError where a ceiling on latency is plainly out of reach, before anything is searched for."""
        most, glance = self.budget.max_latency_p50, self.measured.glance
        if most is None:
            return
        uniforms = sorted(self._converted_uniforms(), key=glance)
        if not uniforms or glance(uniforms[0]) <= _NEVER_AS_FAST * most:
            return
        fastest = next(filter(self._keeps, uniforms), None)
        if fastest is not None:
            raise too_slow(self.budget, self.measured.latency(fastest), self._candidates())

    def _is_fast(self, recipe: Recipe) -> bool:
        most = self.budget.max_latency_p50
        return most is None or self.measured.latency(recipe) <= most

    def _fast_enough(self, recipe: Recipe) -> Recipe:
        """A recipe that also keeps the ceiling on latency, as measured. Raises BudgetError where none is found."""
        most = self.budget.max_latency_p50
        if most is None or self._is_fast(recipe):
            return recipe
        fastest, latency = recipe, self.measured.latency
        mix = self._mix_of.get(key_of(recipe))
        work = self.ways.work if mix is None else min(self.ways.work, self.mixes.work(mix))
        # Where not even the mix with the least work is fast enough, none is.
        fastest_mix = self.mixes.least_work({})
        reachable = fastest_mix is not None and latency(self._recipe(fastest_mix)) <= most
        for _ in range(_ATTEMPTS if reachable else 0):
            work *= 0.97 * most / max(most, latency(fastest))
            found = self._within_work(work)
            if found is None or self.clock.is_over():
                break
            fastest = min(fastest, found, key=latency)
            if self._is_fast(fastest):
                return fastest
        fastest = min([fastest, *filter(self._keeps, self._converted_uniforms())], key=latency)
        if self._is_fast(fastest):
            return fastest
        raise too_slow(self.budget, latency(fastest), self._candidates())

    def _within_work(self, work: float) -> Recipe | None:
        """The recipe that is looked for among those of so much work, or None."""
        limits: Limits = {"milliseconds": work}
        if self.budget.judges_outputs:
            return self._smallest_kept(self.budget, self.budget.max_size, limits)
        found = self._least_noise({**limits, **self._room()})
        return found if found is not None and self._fits(found) else None

    # What is said in the end.

    def _row(self, recipe: Recipe) -> dict[str, Any]:
        mix = self._mix_of.get(key_of(recipe))
        if mix is not None:
            told = {"layers": labels(self.mixes.groups, mix), "estimate": self.mixes.cost(mix)}
        else:
            told = {"layers": self.ways.labels_of(label_of(recipe)), "estimate": self.measured.noise(recipe)}
        return self.measured.row(recipe) | told

    def _candidates(self, chosen: Recipe | None = None) -> list[dict[str, Any]]:
        """All recipes whose artifacts were measured, by size."""
        rows = [self._row(recipe) | {"chosen": recipe == chosen} for recipe in self.measured.tried.values()]
        return sorted(rows, key=lambda row: row["size_bytes"])

    def frontier(self) -> list[dict[str, Any]]:
        """Points from the smallest mix to the one that loses least, measured, with their latency."""
        levels = self.mixes.levels()
        step = max(1, (len(levels) - 1) // (_POINTS - 1))
        found = []
        for mix in dict.fromkeys([*levels[::step], levels[-1]]):
            if self.clock.is_over():
                break
            recipe = self._recipe(mix)
            self.measured.drops(recipe)
            self.measured.latency(recipe)
            found.append(self._row(recipe))
        return found

    def _details(self, recipe: Recipe) -> dict[str, Any]:
        evidence = self.subject.evidence
        return {
            "asked": self.budget.ceilings,
            "measure": "noise by signal of the outputs",
            "samples": {"searched": len(evidence.searched), "held_out": len(evidence.held_out)} if evidence else None,
            "chosen": self._row(recipe),
            "candidates": self._candidates(recipe),
            "frontier": self.frontier() if self.budget.pareto else None,
            "recipe": recipe.model_dump(mode="json", exclude_unset=True),
            "search_seconds": round(self.clock.seconds, 3),
        }

    def _warnings(self) -> tuple[str, ...]:
        if self.subject.evidence is not None:
            return ()
        return ("There is no --data, so layers were chosen by how far made-up inputs move the outputs.",)
