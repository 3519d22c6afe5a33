"""What `eval` measures: each task scores one model sample by sample, against labels, the reference, or both."""

from __future__ import annotations

from typing import Any, Protocol

from quantcli.core.ports import Arrays
from quantcli.evaluation.metrics import Mean

TASKS = ("auto", "classification", "language-modeling", "embedding", "fidelity")

#: Metrics that a model has by itself, and those that compare it with the reference, by task.
REFERENCE_METRICS = {
    "classification": ("top1", "top1_se", "top5", "top5_se"),
    "language-modeling": ("perplexity", "perplexity_se"),
    "embedding": (),
    "fidelity": (),
}
CANDIDATE_METRICS = {
    "classification": ("argmax_agreement", "argmax_agreement_se"),
    "language-modeling": ("kl_nats", "kl_nats_se", "top1_agreement", "top1_agreement_se"),
    "embedding": ("cosine", "cosine_se", "cosine_min"),
    "fidelity": ("sqnr_db", "cosine", "cosine_se", "kl_nats", "kl_nats_se", "argmax_agreement", "argmax_agreement_se"),
}

Metrics = dict[str, float | None]


class Task(Protocol):
    """The metrics of one model in the making."""

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One sample's outputs, and the reference's where this is a candidate."""

    def metrics(self) -> Metrics:
        """All metrics that apply."""

    def details(self) -> dict[str, Any]:
        """What the report's row of the model holds beside its metrics."""


def with_error(name: str, mean: Mean) -> Metrics:
    """A mean and its standard error, as two metrics."""
    return {name: mean.mean, f"{name}_se": mean.standard_error}
