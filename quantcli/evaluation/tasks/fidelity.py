"""Fidelity: how near a candidate's outputs are to the reference's, without labels."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.core.ports import Arrays
from quantcli.data.sources.base import Labels
from quantcli.evaluation import metrics
from quantcli.evaluation.tasks.base import Metrics
from quantcli.models.outputs import is_classes, is_distribution, paired
from quantcli.models.source import ModelSource

NAME = "fidelity"
METRICS = ()
CANDIDATE_METRICS = (
    "sqnr_db", "cosine", "cosine_se", "kl_nats", "kl_nats_se", "argmax_agreement", "argmax_agreement_se",
    "not_finite",
)  # fmt: skip
DEFAULT_SAMPLES: int | None = 64
LOADING: dict[str, bool] = {}
WINDOWS = True
NEEDS_LABELS: Labels = ""


def scorer(model: ModelSource, reference: ModelSource) -> Fidelity:
    """Compares every output with the reference's."""
    return Fidelity(model.path)


#: Probabilities are not taken below this: a logarithm of zero compares with nothing.
_LEAST_PROBABILITY = 1e-12


class Fidelity:
    """Every floating-point output against the reference's, without labels.

    ``not_finite`` counts values that are NaN or infinite in the candidate alone: then the other metrics are None, so
    that no gate on them passes.

    KL divergence and argmax agreement are taken of outputs that hold class scores: those named ``logits``,
    those whose rows are probabilities, and tables of one row per sample whose name does not say that they
    are features. A metric of the model is that of its worst output; all outputs are in the row's ``outputs``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._fidelity: dict[str, metrics.Fidelity] = {}
        self._divergence: dict[str, metrics.Divergence] = {}

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One sample."""
        if reference is None:
            return
        for name, (ours, theirs) in paired(reference, outputs, self.name).items():
            if not ours.size:
                continue
            self._fidelity.setdefault(name, metrics.Fidelity()).add(torch.from_numpy(ours), torch.from_numpy(theirs))
            if is_classes(name, ours) and np.isfinite(theirs).all() and np.isfinite(ours).all():
                probable = is_distribution(ours)
                scores = (_logits(each, probable=probable) for each in (ours, theirs))
                self._divergence.setdefault(name, metrics.Divergence()).add(*scores)

    def merge(self, other: Fidelity) -> None:
        """The samples that come after these."""
        for name, fidelity in other._fidelity.items():
            self._fidelity.setdefault(name, metrics.Fidelity()).merge(fidelity)
        for name, divergence in other._divergence.items():
            self._divergence.setdefault(name, metrics.Divergence()).merge(divergence)

    def _of(self, name: str) -> Metrics:
        found = self._fidelity[name].metrics()
        return found | (self._divergence[name].metrics("argmax_agreement") if name in self._divergence else {})

    def metrics(self) -> Metrics:
        """Of every metric the worst output's."""
        rows = [self._of(name) for name in self._fidelity]
        broken = sum(each.not_finite for each in self._fidelity.values())
        worst: Metrics = {"not_finite": float(broken)} if rows else {}
        if broken:
            return {metric: None for row in rows for metric in row} | worst
        for metric, sign in (("sqnr_db", 1), ("cosine", 1), ("kl_nats", -1), ("argmax_agreement", 1)):
            having = [(sign * value, index) for index, row in enumerate(rows) if (value := row.get(metric)) is not None]
            if having:
                row = rows[min(having)[1]]
                worst |= {key: row[key] for key in (metric, f"{metric}_se") if key in row}
            elif any(metric in row for row in rows):
                worst[metric] = None
        return worst

    def details(self) -> dict[str, Any]:
        """Metrics of every output."""
        return {"outputs": {name: self._of(name) for name in self._fidelity}} if self._fidelity else {}


def _logits(values: np.ndarray, *, probable: bool) -> Tensor:
    """Logits ``[rows, classes]`` from what a model returns: these, or probabilities."""
    rows = torch.from_numpy(values.reshape(prod(values.shape[:-1]), values.shape[-1]))
    return rows.clamp(min=_LEAST_PROBABILITY).log() if probable else rows
