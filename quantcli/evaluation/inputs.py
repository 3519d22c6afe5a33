"""Which task models are evaluated by, and the samples of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.core.ports import Arrays
from quantcli.data.for_models import input_ports, source_for
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, batches, choose_samples, own_batches
from quantcli.data.sources import is_text
from quantcli.data.sources.base import Labels
from quantcli.errors import InputError
from quantcli.evaluation.tasks import task_of
from quantcli.evaluation.tasks.base import Task
from quantcli.models import hugging_face
from quantcli.models.inputs import derived_inputs
from quantcli.models.source import ModelSource

if TYPE_CHECKING:
    import numpy as np

    from quantcli.models.runner import Runner


@dataclass
class Inputs:
    """Samples and the task they serve."""

    task: Task
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def settle_batch_size(self, runners: Sequence[Runner]) -> None:
        """Take as many samples at a time as these models run on; see `Samples.settle_batch_size`."""

        def run(feeds: Mapping[str, np.ndarray]) -> None:
            for runner in runners:
                runner.run(feeds)

        if runners:
            self.samples.settle_batch_size(run)

    def batches(self) -> Iterator[tuple[Arrays, list[Any]]]:
        """Feeds and labels, one sample at a time, or as many as the model takes where it takes a fixed number."""
        yield from map(_completed, batches(self.samples, 1))

    def own_batches(self) -> Iterator[tuple[Arrays, list[Any]]]:
        """This rank's share of them, neighbours."""
        yield from map(_completed, own_batches(self.samples, 1))


def _completed(batch: tuple[Arrays, list[Any]]) -> tuple[Arrays, list[Any]]:
    feeds, labels = batch
    derived = derived_inputs(feeds["input_ids"]) if "input_ids" in feeds else {}
    return derived | feeds, labels


def load_inputs(
    models: Sequence[ModelSource],
    request: DataRequest,
    task: Task | None,
) -> Inputs:
    """Samples from DATA for the first model, and the task: the one named, or what fits model and data.

    Classes mean classification, what is said in sounds speech recognition, all else fidelity; for text see
    `named_task`.

    Raises:
        UsageError: a number that cannot be meant.
        InputError: the data is missing, does not fit the model, or lacks what the task needs.
    """
    if task is not None:
        request = replace(request.at_most(task.DEFAULT_SAMPLES), windows=task.WINDOWS)
    source = source_for(models, request, input_ports(models, text=is_text(request.data)))
    task = task or task_of(_task_by_labels(source.labels))
    _require_labels(task, source.labels, request.data)
    return Inputs(task, choose_samples(request.at_most(task.DEFAULT_SAMPLES), source))


def _task_by_labels(labels: Labels) -> str:
    if not labels:
        return "fidelity"
    return "speech-recognition" if labels == "texts" else "classification"


def _require_labels(task: Task, labels: Labels, data: str) -> None:
    """Raise InputError where samples lack what a task holds outputs against."""
    if not task.NEEDS_LABELS or labels == task.NEEDS_LABELS:
        return
    if task.NEEDS_LABELS == "texts":
        raise InputError(
            f"{data} does not say what is heard in its sounds, which {task.NAME} needs.",
            "Give a .jsonl of audio and text, or a .txt beside each sound; --task fidelity does without.",
        )
    if labels == "texts" or not labels:
        raise InputError(
            f"{data} has no labels, which {task.NAME} needs.",
            "Labels are the array labels of an .npz, or one subfolder of images or sounds per class; "
            "--task fidelity does without.",
        )


def named_task(name: str, model: ModelSource, data: str) -> Task | None:
    """The task of this name; of ``auto`` the one that text means, and None for other DATA, whose labels decide.

    Causal models are judged by language modeling on text, encoders by embedding. Raises UsageError.
    """
    if name != "auto":
        return task_of(name)
    return task_of("language-modeling" if is_causal(model) else "embedding") if is_text(data) else None


def is_causal(source: ModelSource) -> bool:
    """Whether a model predicts the next token at every position."""
    if source.checkpoint:
        return hugging_face.is_causal(source.folder or Path(source.path))
    if not source.onnx:
        return False
    takes = {port.name for port in source.onnx.inputs}
    ranks = {port.name: len(port.shape or ()) for port in source.onnx.outputs}
    return "input_ids" in takes and ranks.get("logits") == 3
