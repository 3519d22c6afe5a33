"""Searches on one graph that learn from each other, and the judge of what is published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantcli.search.budget import Budget
from quantcli.search.choices import Found
from quantcli.search.clock import Clock
from quantcli.search.limits import limits_of
from quantcli.search.onnx import OnnxSearch
from quantcli.search.onnx_measured import Measurements
from quantcli.search.onnx_subject import GraphSubject
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.system.hardware import cpu_features


@dataclass
class GraphSearches:
    """Searches on one graph, which learn from each other, and the judge of what is published."""

    subject: GraphSubject
    tick: Callable[[float], None] = lambda _: None
    _clock: Clock | None = None
    _measured: Measurements | None = None
    _budget: Budget = field(default_factory=Budget)

    def search(self, budget: Budget) -> Found:
        """Find the mix of schemes that keeps a budget.

        Raises:
            BudgetError: nothing found keeps it; the message names the nearest that can be kept.
            UsageError: the data gives no such metric, or the model is quantized already.
            InputError: the model or the data is missing or unsuitable.
        """
        self._budget = budget
        # A search that has to be repeated has what the one before left of the time.
        self._clock = self._clock or Clock(budget.search_seconds)
        self._measured = self._measured or Measurements(self.subject, self._store(budget))
        return OnnxSearch(self.subject, budget, self._measured.store, self._measured, self.tick, self._clock).run()

    def losses(self, artifact: Path) -> Mapping[str, tuple[float, float]]:
        """What an artifact loses, or takes, by the option that limits it: mean and bound."""
        budget, measured = self._budget, self._measured
        found: dict[str, tuple[float, float]] = {}
        if budget.judges_outputs and self.subject.verdicts is not None and measured is not None:
            limits = limits_of(budget, measured.losses(artifact))
            found = {option: (drop.mean, drop.bound) for option, _, drop in limits}
        if budget.max_latency_p50 is not None:
            found["--max-latency-p50"] = (self.subject.stopwatch.p50_ms(artifact),) * 2
        return found

    def _store(self, budget: Budget) -> SensitivityStore:
        evidence, data = self.subject.evidence, self.subject.material.samples(self.subject.request)
        seen = [each.sha256 for each in (data, evidence and evidence.searched.samples) if each]
        identity = {
            "model": self.subject.material.source.model.sha256() or "",
            "data": _digest([*seen, evidence.held_out.samples.sha256 if evidence else ""]),
            "runtime": _digest([version("onnxruntime"), *cpu_features()]),
            "schemes": _digest([list(budget.allow), self.subject.recipe.model_dump_json(exclude_unset=True)]),
        }
        return SensitivityStore(budget.sensitivity, identity)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
