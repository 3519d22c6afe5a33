"""Classification: the share of samples whose class is right."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantcli.core.ports import Arrays
from quantcli.data.sources.base import Labels
from quantcli.errors import InputError
from quantcli.evaluation.metrics import Mean
from quantcli.evaluation.tasks.base import Metrics, with_error
from quantcli.models.outputs import class_scores
from quantcli.models.source import ModelSource

NAME = "classification"
METRICS = ("top1", "top1_se", "top5", "top5_se")
CANDIDATE_METRICS = ("argmax_agreement", "argmax_agreement_se")
DEFAULT_SAMPLES: int | None = None
LOADING: dict[str, bool] = {"causal": False, "headed": True}
WINDOWS = True
NEEDS_LABELS: Labels = "classes"


def scorer(model: ModelSource, reference: ModelSource) -> Classification:
    """Counts right answers."""
    return Classification(model.path)


class Classification:
    """How often the label is the top class, or among the top five; with the reference, how often the top agrees."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._top1, self._top5, self._agreement = Mean(), Mean(), Mean()
        self._classes = 0

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """``label`` is the index of the true class."""
        scores = class_scores(outputs, self.name)
        self._classes = len(scores)
        if not 0 <= int(label) < len(scores):
            raise InputError(f"The data has the label {label}; {self.name} has {len(scores)} classes, from 0 on.")
        best = np.argsort(-scores, kind="stable")[:5]
        self._top1.add(float(best[0] == label))
        self._top5.add(float(label in best))
        if reference is not None:
            self._agreement.add(float(best[0] == np.argmax(class_scores(reference, "The reference"))))

    def merge(self, other: Classification) -> None:
        """The samples that come after these."""
        for own, theirs in (
            (self._top1, other._top1), (self._top5, other._top5), (self._agreement, other._agreement)
        ):  # fmt: skip
            own.merge(theirs)
        self._classes = max(self._classes, other._classes)

    def metrics(self) -> Metrics:
        """Shares with standard errors; top5 only where there are more classes than that."""
        shares = with_error("top1", self._top1)
        if self._classes > 5:
            shares |= with_error("top5", self._top5)
        return shares | (with_error("argmax_agreement", self._agreement) if self._agreement.values else {})

    def details(self) -> dict[str, Any]:
        """Nothing."""
        return {}
