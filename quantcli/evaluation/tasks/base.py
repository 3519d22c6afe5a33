"""What `eval` measures: each task scores one model sample by sample, against labels, the reference, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from quantcli.core.ports import Arrays
from quantcli.data.sources.base import Labels
from quantcli.evaluation.metrics import Mean

if TYPE_CHECKING:
    from quantcli.models.source import ModelSource

Metrics = dict[str, float | None]


class Task(Protocol):
    """A module of this package: what models are judged by."""

    #: What ``--task`` and the report call it.
    NAME: str
    #: Metrics that a model has by itself; None where they are not known before they are measured.
    METRICS: Sequence[str] | None
    #: Metrics that compare a candidate with the reference.
    CANDIDATE_METRICS: Sequence[str]
    #: Samples where the user names no number; None for all.
    DEFAULT_SAMPLES: int | None
    #: How `quantcli.models.runner.open_runner` loads a Hugging Face folder: ``causal``, ``headed``,
    #: ``generates``.
    LOADING: Mapping[str, bool]
    #: Whether text is cut into windows of equal length, rather than one sample per line or record.
    WINDOWS: bool
    #: What every sample must be labelled with, if anything.
    NEEDS_LABELS: Labels

    def scorer(self, model: ModelSource, reference: ModelSource) -> Scorer:
        """What scores one model; the reference scores itself."""


class Scorer(Protocol):
    """The metrics of one model in the making."""

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One sample's outputs, and the reference's where this is a candidate."""

    def merge(self, other: Self) -> None:
        """The samples of another one of the same model, as it was pickled, which come after these."""

    def metrics(self) -> Metrics:
        """All metrics that apply."""

    def details(self) -> dict[str, Any]:
        """What the report's row of the model holds beside its metrics."""


def with_error(name: str, mean: Mean) -> Metrics:
    """A mean and its standard error, as two metrics."""
    return {name: mean.mean, f"{name}_se": mean.standard_error}
