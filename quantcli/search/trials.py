"""Mixes of schemes for a checkpoint, tried out: what they take, and what the outputs lose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from quantcli.algorithms import needs_no_data
from quantcli.blocks.model import SequentialModel
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.ports import Arrays
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples
from quantcli.errors import InputError
from quantcli.evaluation.inputs import Inputs
from quantcli.models.runner import TorchRunner
from quantcli.models.source import ModelSource
from quantcli.planning.plan import Loader
from quantcli.planning.recipe import Recipe
from quantcli.search.bounds import Drop, drop_of
from quantcli.search.budget import Budget
from quantcli.search.choices import Group, Mix, chosen, labels, total
from quantcli.search.clock import Clock
from quantcli.search.judge import COMPARED, KL, Evidence, Judged, alone, gather, judge, metric_of
from quantcli.search.limits import flat, restored
from quantcli.search.module import SearchedModel
from quantcli.search.sensitivity import Estimator, StoredValues
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.search.ways import Ways
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.text import format_bytes

#: Mixes that are the best by estimate, and measured to be told apart: at most, and products of all together.
_MOST_MEASURED, _MEASURED_PRODUCTS = 64, 10**10
#: Samples that two mixes are compared on before one may be called better.
_LEAST_COMPARED = 3
#: The original, a mix of its weights decoded, and the artifact beside them when it is judged.
_FLOAT_COPIES = 3


@dataclass
class CheckpointTrials:
    """A checkpoint, its data, and what was found out so far. ``open_module`` makes the model, once there is data.

    Of the budget only what stays the same counts here: data, allowed schemes, the file of sensitivities.
    """

    source: ModelSource
    checkpoint: Checkpoint
    recipe: Recipe
    budget: Budget
    request: DataRequest | None
    loader: Loader
    output: Path
    open_module: Callable[[], SequentialModel]
    calibrated: bool = False
    tick: Callable[[float], None] = lambda _: None
    seed: int = 0
    seen: dict[Mix, None] = field(default_factory=dict)
    _sizes: dict[Mix, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = Clock(self.budget.search_seconds)

    @cached_property
    def ways(self) -> Ways:
        """What can be chosen."""
        return Ways(self.checkpoint, self.recipe, self.budget.allow, self.loader, self.output, self.calibrated)

    @cached_property
    def evidence(self) -> Evidence | None:
        """Samples to search by, and to judge by."""
        return gather(self.source, self.request, self.budget.eval_data)

    @cached_property
    def model(self) -> SearchedModel | None:
        """The model in memory, where there are samples. Raises InputError where it does not fit."""
        if self.evidence is None:
            return None
        needed, free = _FLOAT_COPIES * 4 * sum(info.numel for info in self.ways.infos), free_memory_bytes()
        if needed > free:
            raise InputError(
                f"A search on data holds the model in float32 and what becomes of it: {format_bytes(needed)}, and "
                f"{format_bytes(free)} of memory are free.",
                "Leave --data out, so that errors of weights decide, or use a machine with more memory.",
            )
        return SearchedModel(self.open_module(), self.evidence.searched.samples)

    @cached_property
    def store(self) -> SensitivityStore:
        """What was learned of this model before, and is learned now."""
        identity = {
            "model": self.checkpoint.sha256(),
            "data": self.evidence.searched.samples.sha256 if self.evidence else "none",
            "schemes": self._schemes(),
        }
        return SensitivityStore(self.budget.sensitivity, identity)

    def _schemes(self) -> str:
        """What decides costs beside model and data. Codes are rounded without data, whatever will choose them."""
        wishes = self.recipe.model_dump_json(exclude_unset=True, exclude={"algorithm", "steps"})
        named = self.recipe.algorithm
        plain = named if named != "auto" and needs_no_data(named) else ""
        return f"{','.join(self.budget.allow)} {plain} {wishes}"

    @cached_property
    def groups(self) -> list[Group]:
        """What is chosen of, with estimated costs."""
        estimator = Estimator(self.ways, self.store, self.model, self.stored, self.seed, self.tick, self.clock.is_over)
        return self.ways.choices(estimator.costs())

    @cached_property
    def unpriced(self) -> list[Group]:
        """As `groups`, before anything is known of costs."""
        return self.ways.choices({})

    @cached_property
    def stored(self) -> StoredValues:
        """What weights become."""
        first = tuple(0 for _ in self.unpriced)
        return StoredValues(self.ways, self.model, self.ways.planned(self.ways.recipe_of(self.unpriced, first)))

    def nbytes(self, mix: Mix) -> int:
        """Bytes of the whole artifact. Raises UsageError where a target refuses the mix."""
        if mix not in self._sizes:
            self._sizes[mix] = self.ways.artifact_bytes(self.ways.recipe_of(self.unpriced, mix))
        return self._sizes[mix]

    def uniforms(self) -> list[Mix]:
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

    def measured_count(self) -> int:
        """How many of the mixes that are best by estimate are measured: many of a small model, few of a large one."""
        if self.model is None:
            return 1
        positions = sum(max(values.numel() for values in sample.values()) for sample in self.model.samples)
        products = positions * sum(info.numel for info in self.ways.infos)
        return int(min(_MOST_MEASURED, max(1, _MEASURED_PRODUCTS // products)))

    def distance(self, mix: Mix) -> float:
        """How far the outputs move on the samples of the search; without data, by estimate."""
        self.seen[mix] = None
        if self.model is None:
            return total(self.groups, mix, "cost")
        key = f"searched {self._key(mix)}"
        if key not in self.store.found.measured:
            found = self.model.distance(self.stored.of_mix(self._labels(mix)))
            self.store.found.measured[key] = {"distance": found}
            self.store.save()
        return float(self.store.found.measured[key]["distance"] or 0.0)

    def drops(self, mix: Mix) -> dict[str, Drop]:
        """What every metric loses with this mix, on samples that were held out."""
        self.seen[mix] = None
        key = self._held_out_key(mix)
        if key not in self.store.found.measured:
            self.store.found.measured[key] = flat(self._judged(mix).drops())
            self.store.save()
        return restored(self.store.found.measured[key])

    def is_better(self, mix: Mix, other: Mix) -> bool:
        """Whether a mix loses less than another on what was held out: by perplexity, else by divergence or the metric.

        Perplexity takes no run of the original, and no more samples than tell the two apart with confidence.
        """
        assert self.evidence is not None
        if "perplexity" not in (self.evidence.held_out.task.METRICS or ()):
            return self._loss(mix) < self._loss(other)
        few = self.evidence.held_out.samples.spread(COMPARED)
        excess: list[float] = []
        for count in range(min(_LEAST_COMPARED, len(few)), len(few) + 1):
            pairs = zip(self._alone(mix, few, count), self._alone(other, few, count), strict=True)
            excess = [ours - theirs for ours, theirs in pairs]
            if _is_sure(excess):
                break
        if drop_of([-each for each in excess]).bound < 0:
            self._note_surpassed(mix, other)
        return sum(excess) < 0

    def _note_surpassed(self, mix: Mix, other: Mix) -> None:
        """Keep that another mix was measured to lose less than this one, with confidence."""
        known = self.store.found.measured.setdefault(self._surpassed_key(mix), {})
        known["estimate"] = max(known.get("estimate") or 0.0, total(self.groups, other, "cost"))
        self.store.save()

    def is_surpassed(self, mix: Mix, other: Mix) -> bool:
        """Whether another mix should lose less than this one by estimate, as one that was measured does.

        True where the other's estimate is no more than that of a mix that was seen, with confidence, to lose less.
        """
        estimate = self.store.found.measured.get(self._surpassed_key(mix), {}).get("estimate")
        return estimate is not None and total(self.groups, other, "cost") <= estimate

    def _surpassed_key(self, mix: Mix) -> str:
        return f"surpassed {self._held_out_key(mix)}"

    def _loss(self, mix: Mix) -> float:
        drops = self.drops(mix)
        return drops[KL if KL in drops else metric_of(drops, self.budget.metric)].mean

    def _alone(self, mix: Mix, samples: Samples, count: int) -> list[float]:
        """The logarithms of perplexity on the first of the samples that mixes are compared on."""
        assert self.evidence is not None
        self.seen[mix] = None
        known = self.store.found.measured.setdefault(f"alone {self._held_out_key(mix)}", {})
        if len(known) < count:
            holding = self._holding(mix)
            for number in range(len(known), count):
                inputs = Inputs(self.evidence.held_out.task, samples.only(number))
                known[str(number)] = log(alone(self.source, holding, inputs)["perplexity"] or 1.0)
            self.store.save()
        return [known[str(number)] or 0.0 for number in range(count)]

    def _judged(self, mix: Mix) -> Judged:
        """The model as this mix would leave it, beside the original, on samples that were held out."""
        assert self.evidence is not None
        candidate = self._holding(mix)
        return judge(self.source, candidate.original, candidate, self.evidence.held_out)

    def _holding(self, mix: Mix) -> _Holding:
        """The model as this mix would leave it."""
        assert self.model is not None
        is_folder = self.source.kind == "checkpoint"
        runner = TorchRunner(self.model.module, self.model.ports, self.source.path, hugging_face=is_folder)
        return _Holding(runner, self.model, self.stored.of_mix(self._labels(mix)))

    def is_judged(self, mix: Mix) -> bool:
        """Whether it is known what a mix loses on samples that were held out."""
        return self.evidence is not None and self._held_out_key(mix) in self.store.found.measured

    def is_compared(self, mix: Mix) -> bool:
        """Whether it was run on samples that were held out."""
        known = self.store.found.measured
        return self.is_judged(mix) or (self.evidence is not None and f"alone {self._held_out_key(mix)}" in known)

    def row(self, mix: Mix) -> dict[str, Any]:
        """What is known of a mix."""
        row: dict[str, Any] = {"size_bytes": self.nbytes(mix), "layers": labels(self.groups, mix)}
        row["estimate"] = total(self.groups, mix, "cost")
        measured = self.store.found.measured
        if searched := measured.get(f"searched {self._key(mix)}"):
            row["searched"] = searched["distance"]
        if compared := measured.get(f"alone {self._held_out_key(mix)}" if self.evidence else ""):
            # A mix that an earlier search compared, and this one did not, is beside none.
            count = self._compared_by_all() or len(compared)
            row["perplexity"] = exp(fmean(compared[str(number)] or 0.0 for number in range(count)))
        if self.is_judged(mix):
            row["held_out"] = {name: drop.mean for name, drop in self.drops(mix).items()}
        return row

    def _compared_by_all(self) -> int:
        """Samples on which all mixes that were compared have been run: what is shown of them side by side."""
        known = (self.store.found.measured.get(f"alone {self._held_out_key(mix)}") for mix in self.seen)
        return min((len(each) for each in known if each), default=0)

    def _labels(self, mix: Mix) -> dict[str, str]:
        pairs = zip(self.ways.groups, chosen(self.groups, mix), strict=True)
        return {name: choice.label for names, choice in pairs for name in names}

    def _key(self, mix: Mix) -> str:
        """A mix as a short text."""
        return hashlib.sha256(json.dumps(self._labels(mix), sort_keys=True).encode()).hexdigest()[:16]

    def _held_out_key(self, mix: Mix) -> str:
        assert self.evidence is not None
        return f"held out {self.evidence.held_out.samples.sha256[:16]} {self._key(mix)}"


def _is_sure(excess: Sequence[float]) -> bool:
    """Whether one of two mixes is better with confidence, by what one has more than the other on each sample."""
    return drop_of(excess).bound < 0 or drop_of([-each for each in excess]).bound < 0


class _Holding:
    """A runner of a model that holds other weights while it runs."""

    def __init__(self, runner: TorchRunner, model: SearchedModel, values: Mapping[str, Tensor]) -> None:
        self.inputs, self.original, self._model, self._values = runner.inputs, runner, model, values

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass."""
        with self._model.holding(self._values):
            return self.original.run(feeds)
