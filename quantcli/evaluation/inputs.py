"""Which task models are evaluated by, and the samples of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.core.ports import Arrays
from quantcli.data.for_models import input_ports, is_text, samples_for
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, batches
from quantcli.errors import InputError
from quantcli.models import hugging_face
from quantcli.models.inputs import derived_inputs
from quantcli.models.source import ModelSource

#: Samples where the user names no number; classification and a user's metric take all.
_DEFAULT_SAMPLES = {"language-modeling": 64, "embedding": 256, "fidelity": 64}


@dataclass
class Inputs:
    """Samples and the task they serve."""

    task: str
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self) -> Iterator[tuple[Arrays, list[Any]]]:
        """Feeds and labels, one sample at a time, or as many as the model takes where it takes a fixed number."""
        for feeds, labels in batches(self.samples, 1):
            derived = derived_inputs(feeds["input_ids"]) if "input_ids" in feeds else {}
            yield derived | feeds, labels


def load_inputs(
    sources: Sequence[ModelSource],
    request: DataRequest,
    task: str,
) -> Inputs:
    """Samples from DATA for the first model, and the task: the one named, or what fits model and data.

    Labels mean classification, all else fidelity; for text see `text_task`.

    Raises:
        UsageError: a number that cannot be meant.
        InputError: the data is missing, does not fit the model, or lacks what the task needs.
    """
    found = samples_for(
        sources,
        replace(request.at_most(_DEFAULT_SAMPLES.get(task)), windows=task != "embedding"),
        input_ports(sources, text=is_text(request.data)),
    )
    if task == "auto":
        task = "classification" if found.labels else "fidelity"
        if request.samples is None and task in _DEFAULT_SAMPLES:
            return load_inputs(sources, request, task)
    if task == "classification" and not found.labels:
        raise InputError(
            f"{request.data} has no labels, which classification needs.",
            "Labels are the array labels of an .npz, or one subfolder of images per class; "
            "--task fidelity does without.",
        )
    return Inputs(task, found)


def text_task(source: ModelSource) -> str:
    """The task that text means: language modeling for a causal model, embedding for an encoder."""
    return "language-modeling" if is_causal(source) else "embedding"


def is_causal(source: ModelSource) -> bool:
    """Whether a model predicts the next token at every position."""
    if source.checkpoint:
        return hugging_face.is_causal(Path(source.path))
    if not source.onnx:
        return False
    takes = {port.name for port in source.onnx.inputs}
    ranks = {port.name: len(port.shape or ()) for port in source.onnx.outputs}
    return "input_ids" in takes and ranks.get("logits") == 3
