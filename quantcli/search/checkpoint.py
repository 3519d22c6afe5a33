"""A budget on a checkpoint: which scheme for which layer, found by estimates, held to measurements, judged apart."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import ceil, floor, inf, isfinite, log10
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from quantcli.blocks.model import SequentialModel
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.ports import Arrays
from quantcli.data.request import DataRequest
from quantcli.errors import BudgetError
from quantcli.models.runner import TorchRunner
from quantcli.models.source import ModelSource
from quantcli.planning.plan import Loader
from quantcli.planning.recipe import Recipe
from quantcli.search.bounds import Drop
from quantcli.search.budget import Budget
from quantcli.search.choices import Found, Group, Mix, chosen, total
from quantcli.search.judge import KL, Evidence, Judged, gather, judge, metric_of, require_kl
from quantcli.search.module import SearchedModel
from quantcli.search.sensitivity import Estimator, mix_values
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.search.solver import best_mix, best_mixes
from quantcli.search.ways import Ways, labels
from quantcli.system.text import format_bytes

#: Mixes that are the best by estimate, and measured to be told apart.
_MEASURED = 3
#: Attempts to meet a limit on outputs, each at a cost that the one before shows to be better.
_ATTEMPTS = 6
#: A smaller artifact is looked for while the limit is used up to no more than this share.
_USED = 0.85
#: Points of the frontier.
_POINTS = 9


@dataclass
class CheckpointSearch:
    """One search. ``open_module`` makes the model, which is done only where there is data to run it on."""

    source: ModelSource
    checkpoint: Checkpoint
    recipe: Recipe
    budget: Budget
    request: DataRequest | None
    loader: Loader
    output: Path
    open_module: Callable[[], SequentialModel]
    tick: Callable[[float], None] = lambda _: None
    seed: int = 0
    _seen: dict[Mix, None] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def run(self) -> Found:
        """Find a recipe that keeps the budget.

        Raises:
            BudgetError: there is none, or too few samples show that there is one.
            UsageError: a target refuses all mixes, or the data gives no such metric.
            InputError: the data does not suit the model.
        """
        self._require_room()
        mix = self._for_outputs() if self.budget.judges_outputs else self._for_size()
        recipe = self.ways.recipe_of(self.groups, mix)
        return Found(recipe, self._details(mix, recipe), self._warnings())

    def continue_from(self, other: CheckpointSearch) -> None:
        """Take over what an earlier search of the same model has opened and learned."""
        for name in ("ways", "evidence", "model", "store", "groups", "scale_dtype", "_unpriced"):
            if name in vars(other):
                vars(self)[name] = vars(other)[name]

    @cached_property
    def ways(self) -> Ways:
        """What can be chosen."""
        return Ways(self.checkpoint, self.recipe, self.budget.allow, self.loader, self.output)

    @cached_property
    def evidence(self) -> Evidence | None:
        """Samples to search by, and to judge by."""
        return gather(self.source, self.request, self.budget.eval_data)

    @cached_property
    def model(self) -> SearchedModel | None:
        """The model in memory, where there are samples."""
        return None if self.evidence is None else SearchedModel(self.open_module(), self.evidence.searched.samples)

    @cached_property
    def store(self) -> SensitivityStore:
        """What was learned of this model before, and is learned now."""
        identity = {
            "model": self.checkpoint.sha256(),
            "data": self.evidence.searched.samples.sha256 if self.evidence else "none",
            "schemes": f"{','.join(self.budget.allow)} {self.recipe.model_dump_json(exclude_unset=True)}",
        }
        return SensitivityStore(self.budget.sensitivity, identity)

    @cached_property
    def groups(self) -> list[Group]:
        """What is chosen of, with estimated costs."""
        estimator = Estimator(self.ways, self.store, self.model, self.scale_dtype, self.seed, self.tick)
        return self.ways.choices(estimator.costs())

    @cached_property
    def scale_dtype(self) -> str:
        """What scales are stored as."""
        return self.ways.planned(self.ways.recipe_of(self._unpriced, tuple(0 for _ in self._unpriced))).scale_dtype

    @cached_property
    def _unpriced(self) -> list[Group]:
        return self.ways.choices({})

    def _require_room(self) -> None:
        """Raise BudgetError, before any work, where not even the smallest mix keeps the ceiling on bytes."""
        if self.budget.max_size is None:
            return
        smallest = best_mix(self._unpriced, "nbytes", {})
        assert smallest is not None
        recipe = self.ways.recipe_of(self._unpriced, smallest)
        least = self.ways.artifact_bytes(recipe)
        if least > self.budget.max_size:
            raise BudgetError(
                f"--max-size {format_bytes(self.budget.max_size)} cannot be met: the smallest that "
                f"{', '.join(self.budget.allow)} give has {least} bytes ({format_bytes(least)}).",
                f"The nearest that can be met: --max-size {least}",
                {"asked": self.budget.ceilings, "nearest": {"max_size": least}},
            )

    def _bytes(self, mix: Mix) -> int:
        return self.ways.artifact_bytes(self.ways.recipe_of(self.groups, mix))

    def _limit(self) -> float:
        """What the groups' bytes may sum up to, so that the whole artifact keeps the ceiling."""
        assert self.budget.max_size is not None
        limit = float(self.budget.max_size)
        smallest = best_mix(self.groups, "nbytes", {})
        assert smallest is not None
        # What all mixes have beside the groups; names in recipe and headers differ by a little, which is repaired.
        limit -= self._bytes(smallest) - total(self.groups, smallest, "nbytes")
        while True:
            mix = best_mix(self.groups, "cost", {"nbytes": limit}) or smallest
            excess = self._bytes(mix) - self.budget.max_size
            if excess <= 0 or mix == smallest:
                return limit
            limit -= excess

    def _for_size(self) -> Mix:
        """The mix of the least loss under a ceiling on bytes; no worse than one scheme for all, where that fits."""
        limit = self._limit()
        mixes = list(best_mixes(self.groups, "cost", {"nbytes": limit}, count=_MEASURED if self.model else 1))
        fitting = [mix for mix in mixes if self._bytes(mix) <= (self.budget.max_size or 0)]
        best = min(fitting, key=lambda mix: (self._distance(mix), fitting.index(mix)))
        uniform = self._best_uniform(limit)
        if uniform is None or uniform == best or self.evidence is None:
            return best
        return min((best, uniform), key=self._loss)

    def _best_uniform(self, limit: float) -> Mix | None:
        """The best by estimate of the mixes that have one scheme for all layers."""
        assert self.budget.max_size is not None
        mixes = [mix for mix in self._uniforms() if total(self.groups, mix, "nbytes") <= limit]
        mixes = [mix for mix in mixes if self._bytes(mix) <= (self.budget.max_size or 0)]
        return min(mixes, key=lambda mix: total(self.groups, mix, "cost"), default=None)

    def _uniforms(self) -> list[Mix]:
        """One scheme for all layers that take it; heads, and layers that do not, stay where they can."""
        known = dict.fromkeys(choice.label for group in self.groups for choice in group.choices)
        mixes = []
        for label in known:
            mix = []
            for names, group in zip(self.ways.groups, self.groups, strict=True):
                numbers = {choice.label: number for number, choice in enumerate(group.choices)}
                left = len(group.choices) - 1
                is_head = any(self.ways.is_head(name) for name in names)
                mix.append(left if is_head else numbers.get(label, left))
            mixes.append(tuple(mix))
        return list(dict.fromkeys(mixes))

    def _distance(self, mix: Mix) -> float:
        """How far the outputs move on the samples of the search; without data, by estimate."""
        self._seen[mix] = None
        if self.model is None:
            return total(self.groups, mix, "cost")
        key = f"searched {self._key(mix)}"
        if key not in self.store.found.measured:
            found = self.model.distance(mix_values(self.ways, self._labels(mix), self.model, self.scale_dtype))
            self.store.found.measured[key] = {"distance": found}
            self.store.save()
        return float(self.store.found.measured[key]["distance"] or 0.0)

    def _loss(self, mix: Mix) -> float:
        """What tells two mixes of one size apart: divergence on what was held out, or the task's own metric."""
        drops = self._drops(mix)
        return drops[KL if KL in drops else metric_of(drops, self.budget.metric)].mean

    def _drops(self, mix: Mix) -> dict[str, Drop]:
        """What every metric loses with this mix, on samples that were held out."""
        self._seen[mix] = None
        key = self._held_out_key(mix)
        if key not in self.store.found.measured:
            drops = self._judged(mix).drops()
            self.store.found.measured[key] = {
                f"{name} {part}": value
                for name, drop in drops.items()
                for part, value in asdict(drop).items()
                if value != inf
            }
            self.store.save()
        kept: dict[str, dict[str, Any]] = {}
        for entry, value in self.store.found.measured[key].items():
            name, part = entry.split()
            kept.setdefault(name, {"bound": inf})[part] = value
        return {name: Drop(**parts) for name, parts in kept.items()}

    def _judged(self, mix: Mix) -> Judged:
        """The model as this mix would leave it, beside the original, on samples that were held out."""
        assert self.model is not None and self.evidence is not None
        is_folder = self.source.kind == "checkpoint"
        runner = TorchRunner(self.model.module, self.model.ports, self.source.path, hugging_face=is_folder)
        values = mix_values(self.ways, self._labels(mix), self.model, self.scale_dtype)
        return judge(self.source, runner, _Holding(runner, self.model, values), self.evidence.held_out)

    def _for_outputs(self) -> Mix:
        """The smallest mix that keeps the limits on outputs, as sure as the samples allow.

        How much an estimated cost may be is found by trying: what is measured tells by how much the next differs.
        """
        least, most = self._extreme("cost"), self._extreme("nbytes")
        low, high = (max(total(self.groups, mix, "cost"), 1e-12) for mix in (least, most))
        limit = min(high, max(low, self.budget.max_kl or high / 4))
        accepted: Mix | None = None
        for _ in range(_ATTEMPTS):
            mix = best_mix(self.groups, "nbytes", {"cost": max(limit, low)}) or least
            used = self._used(mix)
            if used <= 1 and (accepted is None or self._bytes(mix) < self._bytes(accepted)):
                accepted = mix
            if (used <= 1 and (used > _USED or mix == most)) or (used > 1 and mix == least) or self._is_late():
                break
            low, high = (limit, high) if used <= 1 else (low, limit)
            # In the middle of what is known, or where the loss, in proportion, would just be kept.
            limit = min(max(limit * min(4.0, 0.95 / max(used, 0.05)), low * 1.02), high * 0.98)
        accepted = self._smaller_uniform(accepted)
        if accepted is None and self._used(least) <= 1:
            accepted = least
        if accepted is None:
            raise self._unmet(least)
        if self.budget.max_size is not None and self._bytes(accepted) > self.budget.max_size:
            size = self._bytes(accepted)
            raise BudgetError(
                f"--max-size {format_bytes(self.budget.max_size)} cannot be met together with the limit on outputs: "
                f"the smallest found that keeps that has {size} bytes ({format_bytes(size)}).",
                f"The nearest that can be met: --max-size {size}",
                self._failed({"max_size": size}),
            )
        return accepted

    def _extreme(self, column: Literal["cost", "nbytes"]) -> Mix:
        mix = best_mix(self.groups, column, {})
        assert mix is not None
        return mix

    def _smaller_uniform(self, accepted: Mix | None) -> Mix | None:
        """One scheme for all layers, where that keeps the limits and is smaller than what was found."""
        for mix in sorted(self._uniforms(), key=self._bytes):
            if accepted is not None and self._bytes(mix) >= self._bytes(accepted):
                break
            if not self._is_late() and self._used(mix) <= 1:
                return mix
        return accepted

    def _used(self, mix: Mix) -> float:
        """How much of the limits on outputs a mix uses, with confidence: above 1 one of them is not kept."""
        shares = []
        for limit, drop in self._limits(mix):
            shares.append(drop.bound / limit if limit > 0 else (0.0 if drop.bound <= 0 else inf))
        return max(shares)

    def _limits(self, mix: Mix) -> list[tuple[float, Drop]]:
        """The limits on outputs in the order of `Budget.ceilings`, with what a mix loses of each."""
        drops, found = self._drops(mix), []
        if self.budget.max_drop is not None:
            found.append((self.budget.max_drop, drops[metric_of(drops, self.budget.metric)]))
        if self.budget.max_kl is not None:
            require_kl(drops)
            found.append((self.budget.max_kl, drops[KL]))
        return found

    def _unmet(self, best: Mix) -> BudgetError:
        """Why the mix that loses least does not do: it loses too much, or the samples show too little."""
        options = [name for name in self.budget.ceilings if name in ("--max-kl", "--max-drop")]
        told = list(zip(options, self._limits(best), strict=True))
        for option, (limit, drop) in told:
            more = drop.samples_for(limit)
            if drop.bound > limit and more is not None:
                return BudgetError(
                    f"{drop.samples} samples are too few to show that {option} {limit:g} is kept: the loss is "
                    f"{drop.mean:.3g}, and could be {drop.bound:.3g}.",
                    f"About {more} samples would do; or allow {option} {_above(drop.bound)}.",
                    self._failed({"samples": more}),
                )
        option, (limit, drop) = next(each for each in told if each[1][1].bound > each[1][0])
        return BudgetError(
            f"{option} {limit:g} cannot be met with {', '.join(self.budget.allow)}: the least loss found is "
            f"{drop.mean:.3g} (at most {drop.bound:.3g}).",
            f"The nearest that can be met: {option} {_above(drop.bound)}",
            self._failed({option.strip("-").replace("-", "_"): float(_above(drop.bound))}),
        )

    def _failed(self, nearest: Mapping[str, float]) -> dict[str, Any]:
        return {"asked": self.budget.ceilings, "nearest": dict(nearest), "candidates": self._candidates()}

    def _is_late(self) -> bool:
        """Whether the time for the search is over."""
        limit = self.budget.search_seconds
        return limit is not None and time.monotonic() - self.started > limit

    def _labels(self, mix: Mix) -> dict[str, str]:
        pairs = zip(self.ways.groups, chosen(self.groups, mix), strict=True)
        return {name: choice.label for names, choice in pairs for name in names}

    def _key(self, mix: Mix) -> str:
        """A mix as a short text."""
        return hashlib.sha256(json.dumps(self._labels(mix), sort_keys=True).encode()).hexdigest()[:16]

    def _held_out_key(self, mix: Mix) -> str:
        assert self.evidence is not None
        return f"held out {self.evidence.held_out.samples.sha256[:16]} {self._key(mix)}"

    def _row(self, mix: Mix) -> dict[str, Any]:
        """What is known of a mix."""
        row: dict[str, Any] = {"size_bytes": self._bytes(mix), "layers": labels(self.groups, mix)}
        row["estimate"] = total(self.groups, mix, "cost")
        measured = self.store.found.measured
        if searched := measured.get(f"searched {self._key(mix)}"):
            row["searched"] = searched["distance"]
        if self.evidence is not None and self._held_out_key(mix) in measured:
            row["held_out"] = {name: drop.mean for name, drop in self._drops(mix).items()}
        return row

    def _candidates(self) -> list[dict[str, Any]]:
        """Mixes of one scheme, and those that were measured, by size."""
        known = dict.fromkeys([*self._uniforms(), *self._seen])
        return [self._row(mix) for mix in sorted(known, key=self._bytes)]

    def frontier(self) -> list[dict[str, Any]]:
        """Points from the smallest mix to the one that loses least, the best of their size by estimate."""
        smallest, least = (total(self.groups, self._extreme(each), "nbytes") for each in ("nbytes", "cost"))
        sizes = [smallest + (least - smallest) * number / (_POINTS - 1) for number in range(_POINTS)]
        found = (best_mix(self.groups, "cost", {"nbytes": size}) for size in sizes)
        mixes = list(dict.fromkeys(mix for mix in found if mix is not None))
        for mix in mixes:
            if self.evidence is not None and not self._is_late():
                self._drops(mix)
        return [self._row(mix) for mix in mixes]

    def _details(self, mix: Mix, recipe: Recipe) -> dict[str, Any]:
        evidence = self.evidence
        return {
            "asked": self.budget.ceilings,
            "measure": self.store.found.measure,
            "samples": {"searched": len(evidence.searched), "held_out": len(evidence.held_out)} if evidence else None,
            "chosen": self._row(mix),
            "candidates": self._candidates(),
            "frontier": self.frontier() if self.budget.pareto else None,
            "recipe": recipe.model_dump(mode="json", exclude_unset=True),
            "search_seconds": round(time.monotonic() - self.started, 3),
        }

    def _warnings(self) -> tuple[str, ...]:
        told = []
        if self.evidence is None:
            told.append(
                "There is no --data, so layers were chosen by the error of their weights alone, which says little of "
                "what a model loses."
            )
        elif self.store.found.measure != KL:
            told.append("The model returns no logits; what is kept small is the error of its first output.")
        return tuple(told)


class _Holding:
    """A runner of a model that holds other weights while it runs."""

    def __init__(self, runner: TorchRunner, model: SearchedModel, values: Mapping[str, Tensor]) -> None:
        self.inputs, self._runner, self._model, self._values = runner.inputs, runner, model, values

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass."""
        with self._model.holding(self._values):
            return self._runner.run(feeds)


def _above(value: float) -> str:
    """A number of three digits that is no less."""
    if not isfinite(value) or value <= 0:
        return f"{value:g}"
    step = 10.0 ** (floor(log10(value)) - 2)
    return f"{ceil(value / step) * step:.6g}"
