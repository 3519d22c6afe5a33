"""A budget on an ONNX graph: what becomes of which layer, found by estimates, held to measurements, judged apart.

What a layer costs is the noise that it alone leaves on the outputs; noise adds up, as far as errors are independent.
How much noise a limit on outputs allows is found by trying: mixes are converted as they would be published, and judged.
Of mixes that are as small but for a few hundredths, the one with the least work is taken.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import inf
from typing import Any

from quantcli.errors import BudgetError, InputError
from quantcli.planning.recipe import Recipe
from quantcli.search.bounds import Drop
from quantcli.search.budget import FLOAT, Budget
from quantcli.search.choices import Found, Group, Mix, chosen, total
from quantcli.search.judge import KL, metric_of, require_kl
from quantcli.search.onnx_sensitivity import layer_costs
from quantcli.search.onnx_subject import GraphSubject
from quantcli.search.onnx_trials import Trial, key_of
from quantcli.search.onnx_ways import ways_to_store
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.search.solver import Column, best_mix, best_mixes
from quantcli.system.text import format_bytes
from quantcli.system.user_functions import is_function

#: Steps in which the noise that is allowed is tried: a grid, so that another budget meets mixes measured before.
_STEP_DB, _MOST_DB = 1.5, 75.0
#: A mix may be so much larger than the smallest one where that saves work.
_AS_SMALL = 1.02
#: Mixes that are the best by estimate, and measured to be told apart.
_MEASURED = 8
#: Attempts to fit a ceiling that an estimate of bytes or time just missed.
_ATTEMPTS = 6
#: Points of the frontier.
_POINTS = 9


@dataclass
class OnnxSearch:
    """One search for a mix that keeps a budget."""

    subject: GraphSubject
    budget: Budget
    store: SensitivityStore
    tick: Callable[[float], None] = lambda _: None
    started: float = field(default_factory=time.monotonic)
    _latency: dict[str, float] = field(default_factory=dict)
    _seen: dict[str, tuple[Recipe, Mix | None]] = field(default_factory=dict)

    def run(self) -> Found:
        """Find a recipe that keeps the budget.

        Raises:
            BudgetError: there is none, or too few samples show that there is one.
            UsageError: the data gives no such metric.
            InputError: the data does not suit the model.
        """
        if self.budget.judges_outputs:
            self._require_samples()
            recipe = self._for_outputs()
        else:
            recipe = self._for_room()
        return Found(recipe, self._details(recipe), self._warnings())

    @cached_property
    def groups(self) -> list[Group]:
        """What is chosen of, with estimated costs."""
        costs = layer_costs(self.subject.runs, self.subject.ways, self.store, self._is_late, self.tick)
        return self.subject.ways.groups(costs)

    def _is_late(self) -> bool:
        """Whether the time for the search is over."""
        limit = self.budget.search_seconds
        return limit is not None and time.monotonic() - self.started > limit

    # What is known of a recipe.

    def _trial(self, recipe: Recipe) -> Trial:
        return self.subject.trials.of(recipe)

    def size_of(self, recipe: Recipe) -> int:
        """Bytes of the artifact, as published."""
        kind = "size of the file" if self.subject.output.suffix == ".onnx" else "size of the folder"
        known = self._known(recipe)
        if kind not in known:
            known[kind] = self._trial(recipe).nbytes
            self.store.save()
        return int(known[kind] or 0)

    def drops_of(self, recipe: Recipe) -> dict[str, Drop]:
        """What every metric loses, on samples that were held out; nothing where there are none."""
        if self.subject.verdicts is None:
            return {}
        known = self._known(recipe)
        if not any(name.endswith(" mean") for name in known):
            known |= _flat(self.subject.verdicts.of(self._trial(recipe).path).drops())
            self.store.save()
        return _restored(known)

    def latency_of(self, recipe: Recipe) -> float:
        """Median of a run in ms, in rounds beside the model. It holds for this machine and moment, and is not kept."""
        key = key_of(recipe)
        if key not in self._latency:
            _, timing = self.subject.stopwatch.of(self._trial(recipe).path)
            self._latency[key] = timing.percentile_ms(50)
        return self._latency[key]

    def _known(self, recipe: Recipe, mix: Mix | None = None) -> dict[str, float | None]:
        key = key_of(recipe)
        self._seen.setdefault(key, (recipe, mix))
        return self.store.found.measured.setdefault(key, {})

    def _recipe(self, mix: Mix) -> Recipe:
        recipe = self.subject.ways.recipe_of(self.groups, mix)
        self._seen[key_of(recipe)] = recipe, mix
        return recipe

    def limits(self, drops: Mapping[str, Drop]) -> list[tuple[str, float, Drop]]:
        """The limits on outputs that are set, with what is lost of each.

        Raises:
            UsageError: the data gives no such metric.
        """
        found = []
        if self.budget.max_drop is not None:
            metric = self.budget.metric
            if metric is not None and is_function(metric):
                name = metric.rpartition(":")[2]
                metric = name if name in drops else next(iter(drops), name)
            found.append(("--max-drop", self.budget.max_drop, drops[metric_of(drops, metric)]))
        if self.budget.max_kl is not None:
            require_kl(drops)
            found.append(("--max-kl", self.budget.max_kl, drops[KL]))
        return found

    def _keeps_outputs(self, recipe: Recipe) -> bool:
        return all(drop.bound <= limit for _, limit, drop in self.limits(self.drops_of(recipe)))

    def _require_samples(self) -> None:
        """Raise BudgetError where even a model that loses nothing would not be seen to keep a limit."""
        if self.subject.verdicts is None:
            return
        for option, limit, drop in self.limits(self.subject.verdicts.of_itself().drops()):
            if drop.bound > limit:
                raise self._too_few(option, limit, drop)

    # Mixes.

    def _mix(self, limits: Mapping[Column, float]) -> Mix | None:
        """The smallest mix within limits; of those as small, the one with the least work."""
        nothing = self._all_float()
        smallest = best_mix(self.groups, "nbytes", limits, without=nothing)
        if smallest is None:
            return None
        rest = self.subject.ways.rest
        size = _AS_SMALL * (total(self.groups, smallest, "nbytes") + rest) - rest
        within = {**limits, "nbytes": min(size, limits.get("nbytes", inf))}
        return best_mix(self.groups, "milliseconds", within, without=nothing) or smallest

    def _all_float(self) -> list[Mix]:
        """The mix that quantizes nothing, which is no conversion."""
        numbers = [{choice.label: n for n, choice in enumerate(group.choices)}.get(FLOAT) for group in self.groups]
        return [] if None in numbers else [tuple(number for number in numbers if number is not None)]

    def _levels(self, limits: Mapping[Column, float]) -> list[Mix]:
        """Mixes for less and less noise, from the smallest of all to the one that loses least, each once."""
        mixes: dict[Mix, None] = {}
        level = -30.0
        while level <= _MOST_DB:
            mix = self._mix({**limits, "cost": 10 ** (-level / 10)})
            level += _STEP_DB
            if mix is None:
                break
            mixes[mix] = None
        least = best_mix(self.groups, "cost", limits, without=self._all_float())
        return [*mixes, *([least] if least is not None and least not in mixes else [])]

    # Searches.

    def _for_outputs(self) -> Recipe:
        """The smallest mix that keeps the limits on outputs, as sure as the samples allow."""
        levels = self._levels({})
        accepted: Recipe | None = None
        low, high = 0, len(levels) - 1
        while low <= high and not (self._is_late() and accepted is not None):
            middle = (low + high) // 2
            recipe = self._recipe(levels[middle])
            if self._keeps_outputs(recipe):
                accepted, high = recipe, middle - 1
            else:
                low = middle + 1
            if self._is_late() and accepted is None:
                # What is nearest to the model is the best that can still be tried.
                low = high = len(levels) - 1
                recipe = self._recipe(levels[-1])
                accepted = recipe if self._keeps_outputs(recipe) else None
                break
        accepted = self._smaller_uniform(accepted)
        if accepted is None:
            raise self._unmet(self._recipe(levels[-1]))
        if self.budget.max_size is not None and self.size_of(accepted) > self.budget.max_size:
            raise self._too_large(self.size_of(accepted), " together with the limit on outputs")
        if self.budget.max_latency_p50 is not None:
            return self._fast_enough(accepted, self._keeps)
        return accepted

    def _keeps(self, recipe: Recipe) -> bool:
        """Whether a recipe keeps the ceilings on bytes and on outputs."""
        fits = self.budget.max_size is None or self.size_of(recipe) <= self.budget.max_size
        return fits and self._keeps_outputs(recipe)

    def _uniforms(self) -> Iterator[Recipe]:
        """One scheme for all layers, as if it had been asked for by itself."""
        own = self.subject.recipe
        for rule in ways_to_store(own, self.budget.allow).values():
            wish = dict(rule)
            if "scheme" in wish:
                yield own.with_flags(**wish)

    def _converted_uniforms(self) -> list[Recipe]:
        """Those that can be converted, the smallest first."""
        found = []
        for recipe in self._uniforms():
            try:
                found.append((self.size_of(recipe), len(found), recipe))
            except InputError:
                # The scheme applies to nothing here, or what it makes is refused.
                continue
        return [recipe for _, _, recipe in sorted(found, key=lambda each: each[:2])]

    def _smaller_uniform(self, accepted: Recipe | None) -> Recipe | None:
        """One scheme for all layers, where that keeps the limits and is smaller than what was found."""
        for recipe in self._converted_uniforms():
            if accepted is not None and (self.size_of(recipe) >= self.size_of(accepted) or self._is_late()):
                break
            if self._keeps_outputs(recipe):
                return recipe
        return accepted

    def _for_room(self) -> Recipe:
        """The mix of the least loss under a ceiling on bytes, time, or both."""
        limits: dict[Column, float] = {}
        if self.budget.max_size is not None:
            limits["nbytes"] = float(self.budget.max_size - self.subject.ways.rest)
        recipe = self._least_loss(limits)
        if self.budget.max_latency_p50 is not None:
            return self._fast_enough(recipe, self._fits)
        return self._or_better_uniform(recipe)

    def _fits(self, recipe: Recipe) -> bool:
        return self.budget.max_size is None or self.size_of(recipe) <= self.budget.max_size

    def _least_loss(self, limits: Mapping[Column, float]) -> Recipe:
        """The mix of the least noise within limits whose artifact keeps the ceiling on bytes.

        Raises:
            BudgetError: there is none.
        """
        within = dict(limits)
        for _ in range(_ATTEMPTS):
            recipe = self._least_noise(within)
            if recipe is None:
                break
            if self._fits(recipe):
                return recipe
            assert self.budget.max_size is not None
            within["nbytes"] -= self.size_of(recipe) - self.budget.max_size
        smallest = best_mix(self.groups, "nbytes", {}, without=self._all_float())
        assert smallest is not None
        recipes = [self._recipe(smallest), *self._converted_uniforms()]
        least = min(recipes, key=self.size_of)
        if self._fits(least):
            return least
        raise self._too_large(self.size_of(least), "")

    def _least_noise(self, limits: Mapping[Column, float]) -> Recipe | None:
        """Of the best mixes by estimate, and their neighbours, the one whose outputs move least."""
        nothing = self._all_float()
        mixes = [mix for mix in best_mixes(self.groups, "cost", limits, count=_MEASURED) if mix not in nothing]
        if not mixes:
            return None
        best = min(mixes, key=self._noise)
        while (closer := self._neighbour(best, limits)) is not None:
            best = closer
        return self._recipe(best)

    def _neighbour(self, mix: Mix, limits: Mapping[Column, float]) -> Mix | None:
        """A mix whose outputs move less, where a layer is stored otherwise and the limits are still kept.

        A graph of many layers has too many for each to be measured; it is left at what estimates say.
        """
        if len(self.groups) > 12 or self._is_late():
            return None
        near = [
            (*mix[:number], other, *mix[number + 1 :])
            for number, group in enumerate(self.groups)
            for other in range(len(group.choices))
            if other != mix[number]
        ]
        near = [each for each in near if all(total(self.groups, each, name) <= most for name, most in limits.items())]
        near = [each for each in near if each not in self._all_float()]
        best = min(near, key=self._noise, default=mix)
        return best if self._noise(best) < self._noise(mix) else None

    def _noise(self, mix: Mix) -> float:
        """How far the outputs move on the samples of the search; by estimate once the time is over."""
        recipe = self.subject.ways.recipe_of(self.groups, mix)
        known = self.store.found.measured.setdefault(key_of(recipe), {})
        if "noise" not in known:
            if self._is_late():
                return total(self.groups, mix, "cost")
            known["noise"] = min(self.subject.runs.noise(recipe), 1e12)
            self.store.save()
        return known["noise"] or 0.0

    def _or_better_uniform(self, recipe: Recipe) -> Recipe:
        """One scheme for all layers, where that keeps the ceiling and loses less on the samples that were held out."""
        if self.subject.evidence is None:
            return recipe
        for uniform in self._converted_uniforms():
            if not self._is_late() and self._fits(uniform) and self._loss(uniform) < self._loss(recipe):
                recipe = uniform
        return recipe

    def _loss(self, recipe: Recipe) -> float:
        drops = self.drops_of(recipe)
        return drops[KL if KL in drops else metric_of(drops, None)].mean

    def _fast_enough(self, recipe: Recipe, keeps: Callable[[Recipe], bool]) -> Recipe:
        """A mix that also keeps the ceiling on latency, as measured. Raises BudgetError where none is found."""
        most = self.budget.max_latency_p50
        assert most is not None
        fastest = recipe
        mix = self._seen[key_of(recipe)][1]
        work = inf if mix is None else total(self.groups, mix, "milliseconds")
        for _ in range(_ATTEMPTS):
            if self.latency_of(fastest) <= most:
                return fastest
            work = min(work, self._work_of_floats()) * 0.97 * most / max(most, self.latency_of(fastest))
            if self.budget.judges_outputs:
                levels = self._levels({"milliseconds": work})
                recipes = (self._recipe(level) for level in levels)
                found = next((each for each in recipes if keeps(each)), None)
            else:
                limits: dict[Column, float] = {"milliseconds": work}
                if self.budget.max_size is not None:
                    limits["nbytes"] = float(self.budget.max_size - self.subject.ways.rest)
                found = self._least_noise(limits)
            if found is None or self._is_late():
                break
            fastest = min(fastest, found, key=self.latency_of)
        for uniform in self._converted_uniforms():
            if keeps(uniform):
                fastest = min(fastest, uniform, key=self.latency_of)
        if self.latency_of(fastest) <= most:
            return fastest
        reached = self.latency_of(fastest)
        raise BudgetError(
            f"--max-latency-p50 {most:g}ms cannot be met: the fastest found takes {reached:.3g} ms.",
            f"The nearest that can be met: --max-latency-p50 {_above(1.05 * reached)}ms",
            self._failed({"max_latency_p50": float(_above(1.05 * reached))}),
        )

    def _work_of_floats(self) -> float:
        return sum(layer.work for layer in self.subject.ways.layers)

    # What is said in the end.

    def _too_large(self, nbytes: int, why: str) -> BudgetError:
        asked = self.budget.max_size or 0
        return BudgetError(
            f"--max-size {format_bytes(asked)} cannot be met{why}: the smallest found with "
            f"{', '.join(self.budget.allow)} has {nbytes} bytes ({format_bytes(nbytes)}).",
            f"The nearest that can be met: --max-size {nbytes}",
            self._failed({"max_size": nbytes}),
        )

    def _too_few(self, option: str, limit: float, drop: Drop) -> BudgetError:
        more = drop.samples_for(limit)
        return BudgetError(
            f"{drop.samples} samples are too few to show that {option} {limit:g} is kept: the loss is "
            f"{drop.mean:.3g}, and could be {drop.bound:.3g}.",
            f"About {more} samples would do; or allow {option} {_above(drop.bound)}.",
            self._failed({"samples": more or 0, option.strip("-").replace("-", "_"): float(_above(drop.bound))}),
        )

    def _unmet(self, best: Recipe) -> BudgetError:
        """Why the mix that loses least does not do: it loses too much, or the samples show too little."""
        told = self.limits(self.drops_of(best))
        for option, limit, drop in told:
            if drop.bound > limit and drop.samples_for(limit) is not None:
                return self._too_few(option, limit, drop)
        option, limit, drop = next(each for each in told if each[2].bound > each[1])
        return BudgetError(
            f"{option} {limit:g} cannot be met with {', '.join(self.budget.allow)}: the least loss found is "
            f"{drop.mean:.3g} (at most {drop.bound:.3g}).",
            f"The nearest that can be met: {option} {_above(drop.bound)}",
            self._failed({option.strip("-").replace("-", "_"): float(_above(drop.bound))}),
        )

    def _failed(self, nearest: Mapping[str, float]) -> dict[str, Any]:
        return {"asked": self.budget.ceilings, "nearest": dict(nearest), "candidates": self._candidates()}

    def _row(self, recipe: Recipe, mix: Mix | None) -> dict[str, Any]:
        """What is known of a recipe."""
        known = self.store.found.measured.get(key_of(recipe), {})
        row: dict[str, Any] = {"size_bytes": self.size_of(recipe), "layers": recipe.scheme}
        if mix is not None:
            pairs = zip(self.groups, chosen(self.groups, mix), strict=True)
            row["layers"] = {name: choice.label for group, choice in pairs for name in group.layers}
            row["estimate"] = total(self.groups, mix, "cost")
        if "noise" in known:
            row["searched"] = known["noise"]
        if drops := _restored(known):
            row["held_out"] = {name: drop.mean for name, drop in drops.items()}
        if key_of(recipe) in self._latency:
            row["latency_ms_p50"] = self._latency[key_of(recipe)]
        return row

    def _candidates(self) -> list[dict[str, Any]]:
        """All recipes whose artifacts were measured, by size."""
        kind = "size of the file" if self.subject.output.suffix == ".onnx" else "size of the folder"
        tried = [each for key, each in self._seen.items() if kind in self.store.found.measured.get(key, {})]
        return sorted((self._row(*each) for each in tried), key=lambda row: row["size_bytes"])

    def frontier(self) -> list[dict[str, Any]]:
        """Points from the smallest mix to the one that loses least, measured, with their latency."""
        levels = self._levels({})
        step = max(1, (len(levels) - 1) // (_POINTS - 1))
        found = []
        for mix in dict.fromkeys([*levels[::step], levels[-1]]):
            if self._is_late():
                break
            recipe = self._recipe(mix)
            self.drops_of(recipe)
            self.latency_of(recipe)
            found.append(self._row(recipe, mix))
        return found

    def _details(self, recipe: Recipe) -> dict[str, Any]:
        evidence = self.subject.evidence
        return {
            "asked": self.budget.ceilings,
            "measure": "noise by signal of the outputs",
            "samples": {"searched": len(evidence.searched), "held_out": len(evidence.held_out)} if evidence else None,
            "chosen": self._row(*self._seen[key_of(recipe)]),
            "candidates": self._candidates(),
            "frontier": self.frontier() if self.budget.pareto else None,
            "recipe": recipe.model_dump(mode="json", exclude_unset=True),
            "search_seconds": round(time.monotonic() - self.started, 3),
        }

    def _warnings(self) -> tuple[str, ...]:
        if self.subject.evidence is not None:
            return ()
        return ("There is no --data, so layers were chosen by how far made-up inputs move the outputs.",)


def search_onnx(subject: GraphSubject, budget: Budget, tick: Callable[[float], None] = lambda _: None) -> Found:
    """Find the mix of schemes for a graph that keeps a budget.

    Args:
        subject: the model and its data.
        budget: what is asked for, checked.
        tick: called with the share of layers that were measured.

    Raises:
        BudgetError: nothing found keeps it; the message names the nearest that can be kept.
        UsageError: the data gives no such metric, or the model is quantized already.
        InputError: the model or the data is missing or unsuitable.
    """
    evidence, data = subject.evidence, subject.material.samples(subject.request)
    seen = [each.sha256 for each in (data, evidence and evidence.searched.samples) if each]
    identity = {
        "model": subject.material.source.model.sha256() or "",
        "data": _digest([*seen, evidence.held_out.samples.sha256 if evidence else ""]),
        "schemes": _digest([list(budget.allow), subject.recipe.model_dump_json(exclude_unset=True)]),
    }
    return OnnxSearch(subject, budget, SensitivityStore(budget.sensitivity, identity), tick).run()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _flat(drops: Mapping[str, Drop]) -> dict[str, float | None]:
    return {
        f"{name} {part}": None if value == inf else value
        for name, drop in drops.items()
        for part, value in asdict(drop).items()
    }


def _restored(known: Mapping[str, float | None]) -> dict[str, Drop]:
    kept: dict[str, dict[str, Any]] = {}
    for entry, value in known.items():
        name, _, part = entry.rpartition(" ")
        if part in ("mean", "bound", "samples", "deviation"):
            kept.setdefault(name, {})[part] = inf if value is None else value
    return {name: Drop(**parts) for name, parts in kept.items()}


def _above(value: float) -> str:
    """A number of three digits that is no less."""
    from math import ceil, floor, isfinite, log10

    if not isfinite(value) or value <= 0:
        return f"{value:g}"
    step = 10.0 ** (floor(log10(value)) - 2)
    return f"{ceil(value / step) * step:.6g}"
