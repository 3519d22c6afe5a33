"""Calibration data as batches of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from quantcli.blocks.model import SequentialModel
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.models import hugging_face
from quantcli.models.inputs import TOKEN_INPUTS, decoder_inputs

#: Sequences and records used where nothing is said: what the field calibrates on, as far as a CPU goes.
DEFAULT_SEQUENCES, DEFAULT_RECORDS = 64, 256
#: Tokens (or pictures) that go through a block at a time.
BATCH_TOKENS, BATCH_PICTURES = 2048, 8


@dataclass
class CalibrationBatches:
    """Batches of inputs by name, samples of one shape together; ``samples`` is where they are from."""

    batches: list[dict[str, Tensor]]
    samples: Samples

    @property
    def tokens(self) -> int | None:
        """Tokens in all; None where the model reads none."""
        if any("input_ids" not in batch for batch in self.batches):
            return None
        return sum(batch["input_ids"].numel() for batch in self.batches)


def load_batches(model: SequentialModel, request: DataRequest, *, trains: bool = False) -> CalibrationBatches:
    """Read the data that the request names; if it is trained on, ``samples`` are all of it, and batches a few of these.

    Raises:
        InputError: it is missing or unsuitable, such as text shorter than one sequence, or token ids that the model
            does not know.
        UsageError: a wish that does not go with this data.
    """
    folders = (model.folder, request.tokenizer)
    config = next((each for each in folders if each and (each / "config.json").is_file()), None)
    causal = config is not None and hugging_face.is_causal(config)
    most = DEFAULT_SEQUENCES if causal else DEFAULT_RECORDS
    samples = load_samples(request.at_most(None if trains else most), model.ports, folder=model.folder)
    calibrated = samples.spread(most) if trains else samples
    inputs = sorted((sample.inputs for sample in calibrated), key=_shapes)
    module = model.skeleton.module
    hugging_face.require_vocabulary(module, [each["input_ids"] for each in inputs if "input_ids" in each], request.data)
    return CalibrationBatches([_tensors(model, group) for group in _groups(inputs)], samples)


def _shapes(inputs: Mapping[str, np.ndarray]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, array.shape) for name, array in inputs.items()]


def _groups(inputs: list[dict[str, np.ndarray]]) -> Iterator[list[dict[str, np.ndarray]]]:
    """Neighbours of equal shape, as many as make up a batch."""
    group: list[dict[str, np.ndarray]] = []
    for sample in inputs:
        most = _most_together(sample)
        if group and (len(group) >= most or _shapes(group[0]) != _shapes(sample)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _most_together(sample: Mapping[str, np.ndarray]) -> int:
    """How many samples of these shapes make up a batch."""
    if "input_ids" in sample and not TOKEN_INPUTS.issuperset(sample):
        return 1  # rows of an image's parts count no samples
    first = next(iter(sample.values()))
    return BATCH_PICTURES if first.ndim > 2 else max(1, BATCH_TOKENS // max(1, first.shape[-1]))


def _tensors(model: SequentialModel, group: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    batch = {name: torch.from_numpy(np.concatenate([sample[name] for sample in group])) for name in group[0]}
    return completed(model, batch)


def completed(model: SequentialModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as the model is best given it: without a mask that says nothing, with what a decoder reads."""
    batch = dict(batch)
    mask = batch.get("attention_mask")
    # Without padding a mask says nothing, and attention is quicker without one.
    if mask is not None and bool(mask.all()) and not model.requires("attention_mask"):
        del batch["attention_mask"]
    return batch | _decoder_inputs(model.skeleton.module, batch)


def _decoder_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where nothing else is given, an encoder-decoder's decoder reads the same text, one token behind."""
    start = hugging_face.decoder_start(model)
    if start is None:
        return {}
    made = decoder_inputs({name: values.numpy() for name, values in batch.items()}, start)
    return {name: torch.from_numpy(values) for name, values in made.items()}
