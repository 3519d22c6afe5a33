"""Mixes of schemes for a checkpoint, tried out: what they take, and what the outputs lose."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quantcli.blocks.model import SequentialModel
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.ports import Arrays
from quantcli.data.request import DataRequest
from quantcli.models.runner import TorchRunner
from quantcli.models.source import ModelSource
from quantcli.planning.plan import Loader
from quantcli.planning.recipe import Recipe
from quantcli.search.bounds import Drop
from quantcli.search.budget import Budget
from quantcli.search.choices import Group, Mix, chosen, total
from quantcli.search.judge import Evidence, Judged, gather, judge
from quantcli.search.module import SearchedModel
from quantcli.search.sensitivity import Estimator, StoredValues
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.search.ways import Ways, labels

#: Mixes that are the best by estimate, and measured to be told apart: at least, at most, and products of all together.
_LEAST_MEASURED, _MOST_MEASURED, _MEASURED_PRODUCTS = 3, 64, 10**10


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
    tick: Callable[[float], None] = lambda _: None
    seed: int = 0
    seen: dict[Mix, None] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    _sizes: dict[Mix, int] = field(default_factory=dict)

    def is_late(self) -> bool:
        """Whether the time for the search is over."""
        limit = self.budget.search_seconds
        return limit is not None and time.monotonic() - self.started > limit

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
        estimator = Estimator(self.ways, self.store, self.model, self.stored, self.seed, self.tick, self.is_late)
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
        return int(min(_MOST_MEASURED, max(_LEAST_MEASURED, _MEASURED_PRODUCTS // products)))

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
        values = self.stored.of_mix(self._labels(mix))
        return judge(self.source, runner, _Holding(runner, self.model, values), self.evidence.held_out)

    def row(self, mix: Mix) -> dict[str, Any]:
        """What is known of a mix."""
        row: dict[str, Any] = {"size_bytes": self.nbytes(mix), "layers": labels(self.groups, mix)}
        row["estimate"] = total(self.groups, mix, "cost")
        measured = self.store.found.measured
        if searched := measured.get(f"searched {self._key(mix)}"):
            row["searched"] = searched["distance"]
        if self.evidence is not None and self._held_out_key(mix) in measured:
            row["held_out"] = {name: drop.mean for name, drop in self.drops(mix).items()}
        return row

    def _labels(self, mix: Mix) -> dict[str, str]:
        pairs = zip(self.ways.groups, chosen(self.groups, mix), strict=True)
        return {name: choice.label for names, choice in pairs for name in names}

    def _key(self, mix: Mix) -> str:
        """A mix as a short text."""
        return hashlib.sha256(json.dumps(self._labels(mix), sort_keys=True).encode()).hexdigest()[:16]

    def _held_out_key(self, mix: Mix) -> str:
        assert self.evidence is not None
        return f"held out {self.evidence.held_out.samples.sha256[:16]} {self._key(mix)}"


class _Holding:
    """A runner of a model that holds other weights while it runs."""

    def __init__(self, runner: TorchRunner, model: SearchedModel, values: Mapping[str, Tensor]) -> None:
        self.inputs, self._runner, self._model, self._values = runner.inputs, runner, model, values

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass."""
        with self._model.holding(self._values):
            return self._runner.run(feeds)
