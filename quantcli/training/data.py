"""Training on samples of any kind: they are held in memory, and what the loss is of follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from quantcli.algorithms.qat import Options as QatOptions
from quantcli.data.samples import Sample, Samples
from quantcli.errors import InputError
from quantcli.models.outputs import is_classes
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.parallel import torch_threads
from quantcli.system.text import format_bytes
from quantcli.training.loop import Defaults, History, Trainee, Training
from quantcli.training.objective import Batch, Objective
from quantcli.training.run import Run

#: Of the memory that is free, one part in so many may be training data.
_MEMORY_SHARE = 3
#: The input that tells a model what is padding.
_MASK = "attention_mask"


class TrainingData:
    """All samples, as they are asked for by number. ``labelled``: every one has a label."""

    def __init__(
        self,
        samples: Samples,
        device: torch.device,
        complete: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        """Read the samples.

        Args:
            samples: where they are from.
            device: where batches go.
            complete: makes a model's inputs of a batch, where it takes others than the samples hold.

        Raises:
            InputError: there are none, or more than fit into memory.
        """
        self.samples, self.device, self._complete = samples, device, complete
        self._samples = list(_within_memory(samples))
        if len(self._samples) < len(samples):
            raise InputError(
                f"{samples.source} gave {len(self._samples)} of {len(samples)} samples the second time.",
                "A function must yield the same samples each time it is called.",
            )
        # What is said in a sound is no class to learn.
        self.labelled = all(isinstance(sample.label, int) for sample in self._samples)
        self.fixed_batch = samples.fixed_batch

    def __len__(self) -> int:
        return len(self._samples)

    def batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """These samples, those of one shape together, each batch in ascending order.

        Sequences of several lengths are one shape where the model is told what is padding.
        """
        groups: dict[object, list[int]] = {}
        for number in sorted(numbers):
            inputs = self._samples[number].inputs
            groups.setdefault("padded" if _is_masked(inputs) else _shapes(inputs), []).append(number)
        for group in groups.values():
            size = self.fixed_batch or len(group)
            for start in range(0, len(group), size):
                yield self._batch(group[start : start + size])

    def _batch(self, numbers: list[int]) -> Batch:
        samples = [self._samples[number] for number in numbers]
        inputs = {
            name: torch.from_numpy(_joined([sample.inputs[name] for sample in samples])).to(self.device)
            for name in samples[0].inputs
        }
        if self._complete is not None:
            inputs = self._complete(inputs)
        labels = torch.tensor([sample.label for sample in samples]).to(self.device) if self.labelled else None
        return Batch(numbers, inputs, labels)


def train(trainee: Trainee, data: TrainingData, options: QatOptions, defaults: Defaults, run: Run) -> History:
    """Train on samples; see `quantcli.training.loop.Training`.

    Raises:
        InputError: the model returns nothing that a loss can be taken of, the data does not suit it, or the loss is
            not finite from the start.
        UsageError: the recipe asks for labels that are not there.
    """
    objective = Objective(options, labelled=data.labelled, scores=_output_of_scores(trainee, data))
    with torch_threads():
        return Training(trainee, data, objective, options, defaults, run).run()


def _output_of_scores(trainee: Trainee, data: TrainingData) -> str | None:
    """The output that holds scores of classes, or None."""
    batch = next(data.batches(range(min(len(data), data.fixed_batch or 2))))
    with torch.no_grad():
        outputs = trainee.teacher(batch.inputs)
    if not outputs:
        raise InputError("The model has no output of floating point, and so no loss can be taken of it.")
    named = sorted(outputs, key=lambda name: name != "logits")
    return next((name for name in named if is_classes(name, outputs[name].cpu().numpy())), None)


def _is_masked(inputs: Mapping[str, np.ndarray]) -> bool:
    """Whether a sample is a sequence of whole numbers with a mask."""
    shapes = {array.shape for array in inputs.values()}
    integers = all(array.dtype.kind in "iu" for array in inputs.values())
    return _MASK in inputs and integers and len(shapes) == 1 and len(next(iter(shapes))) == 2


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Samples along the first axis, filled up with zeros, which a mask means as padding, along the second."""
    if len(arrays) == 1:  # perhaps a scalar
        return arrays[0]
    if len({array.shape[1:] for array in arrays}) > 1:
        longest = max(array.shape[1] for array in arrays)
        arrays = [np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays]
    return np.concatenate(arrays)


def _shapes(inputs: Mapping[str, np.ndarray]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, array.shape) for name, array in inputs.items())


def _within_memory(samples: Samples) -> Iterator[Sample]:
    room = free_memory_bytes() // _MEMORY_SHARE
    taken = 0
    for number, sample in enumerate(samples, 1):
        taken += sum(array.nbytes for array in sample.inputs.values())
        if taken > room:
            raise InputError(
                f"{samples.source}: {number} of {len(samples)} samples take {format_bytes(taken)}, more than training "
                "may use of this machine's memory.",
                f"Use fewer: --samples {number - 1}.",
            )
        yield sample
