"""Calibration data as batches of a Hugging Face model's inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from quantcli import models
from quantcli.calibration import Calibration
from quantcli.graph.model import Port
from quantcli.runners import hugging_face_ports
from quantcli.samples import Samples, load_samples

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
    def tokens(self) -> int:
        """Tokens in all; for other inputs their first two axes multiplied."""
        return sum(next(iter(batch.values())).shape[:2].numel() for batch in self.batches)


def load_batches(model: nn.Module, folder: Path, given: Calibration) -> CalibrationBatches:
    """Read the data that ``given`` names.

    Raises:
        InputError: it is missing or unsuitable, such as text shorter than one sequence, or token ids that the model
            does not know.
        UsageError: a wish that does not go with this data.
    """
    assert given.data is not None
    causal = models.is_causal(folder)
    samples = load_samples(
        given.data,
        _ports(model, folder),
        folder=folder,
        tokenizer=given.tokenizer,
        preprocess=given.preprocess,
        samples=given.samples or (DEFAULT_SEQUENCES if causal else DEFAULT_RECORDS),
        seq_len=given.seq_len,
        seed=given.seed,
    )
    inputs = sorted((sample.inputs for sample in samples), key=lambda each: [a.shape for a in each.values()])
    models.require_vocabulary(model, [each["input_ids"] for each in inputs if "input_ids" in each], given.data)
    return CalibrationBatches([_tensors(model, group) for group in _groups(inputs)], samples)


def _ports(model: nn.Module, folder: Path) -> tuple[Port, ...]:
    taken = inspect.signature(model.forward).parameters
    ports = hugging_face_ports(folder, vision="pixel_values" in taken and "input_ids" not in taken)
    return tuple(port for port in ports if port.name in taken)


def _groups(inputs: list[dict[str, np.ndarray]]) -> Iterator[list[dict[str, np.ndarray]]]:
    """Neighbours of equal shape, as many as make up a batch."""
    group: list[dict[str, np.ndarray]] = []
    for sample in inputs:
        first = next(iter(sample.values()))
        most = BATCH_PICTURES if first.ndim > 2 else max(1, BATCH_TOKENS // max(1, first.shape[-1]))
        alike = group and all(group[0][name].shape == array.shape for name, array in sample.items())
        if group and (len(group) >= most or not alike):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _tensors(model: nn.Module, group: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    batch = {name: torch.from_numpy(np.concatenate([sample[name] for sample in group])) for name in group[0]}
    mask = batch.get("attention_mask")
    # Without padding a mask says nothing, and attention is quicker without one.
    if mask is not None and bool(mask.all()):
        del batch["attention_mask"]
    return batch | _decoder_inputs(model, batch)


def _decoder_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder-decoder's decoder reads the same text, one token behind."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or "input_ids" not in batch:
        return {}
    ids = batch["input_ids"]
    start = getattr(config, "decoder_start_token_id", None) or 0
    return {"decoder_input_ids": torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)}
