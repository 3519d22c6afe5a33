"""What algorithms share: what each must offer, and a weight worked on some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from quantcli.core.scheme import NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, RoundedTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: Elements worked on at a time: as float32 they fill a 1 MiB cache.
CHUNK_ELEMENTS = 1 << 18


def by_rows(
    run: Callable[[Tensor, NumberFormat, torch.dtype], QuantizedTensor],
    weight: Tensor,
    number_format: NumberFormat,
    scale_dtype: torch.dtype,
) -> QuantizedTensor:
    """What ``run`` makes of a weight, with temporaries of a few rows only; whole where rows share scales."""
    import torch

    if number_format.granularity.kind not in ("channel", "group"):
        return run(weight, number_format, scale_dtype)
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    parts = [run(rows, number_format, scale_dtype) for rows in torch.split(weight, step)]
    offsets = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(offsets) if offsets else None,
        tuple(weight.shape),
        number_format,
    )


@dataclass
class LinearStats:
    """The inputs of a linear layer, or of several that are given the same.

    ``tokens``: how many were seen, or some of them where nothing else was asked for. The others are None where they
    were not asked for, or where no token was seen:

    - ``gram``: float32 ``[columns, columns]``, the sum of x x^T.
    - ``absmax``: float32 ``[columns]``, the largest magnitude of each channel. ``mean_abs``: the mean magnitude.
    - ``sample``: float32 ``[tokens, columns]``, some of them, in order.
    """

    tokens: int = 0
    gram: Tensor | None = None
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    sample: Tensor | None = None

    def divide(self, scale: Tensor) -> None:
        """Make these the statistics of inputs divided by ``scale``, float32 ``[columns]``, positive."""
        if self.gram is not None:
            self.gram.div_(scale).div_(scale.unsqueeze(1))
        for each in (self.absmax, self.mean_abs, self.sample):
            if each is not None:
                each.div_(scale)


class Call(Protocol):
    """One batch of a block's inputs; ``hidden`` is ``[samples, ...]``."""

    hidden: Tensor

    def run(self, block: nn.Module) -> Tensor:
        """The block's hidden output."""

    def rows(self, chosen: Sequence[int]) -> Call:
        """The call with some of its samples."""


class Targets(Protocol):
    """What a block is to return, by batch."""

    def __getitem__(self, batch: int) -> Tensor:
        """One batch's hidden states."""


@dataclass(frozen=True)
class BlockLayers:
    """Layers of a block whose codes are to be chosen from data: all that such an algorithm may look at.

    - ``block``: the module, its weights already transformed; it is left as it is found.
    - ``weights``, ``formats``, ``stats``: of each layer by its name in the block; weights float32 ``[rows, columns]``.
      ``stats`` holds what the algorithm's NEEDS name; an algorithm may drop a ``gram`` once no layer needs it.
    - ``calls``, ``targets``: the block's inputs, batch by batch, and what the original block returned for each; None
      unless NEEDS holds "original".
    - ``scale_dtype``: what scales are rounded to. ``seed``: what is drawn at random is drawn by it.
    - ``report``: told the fraction that is done.
    """

    block: nn.Module
    weights: Mapping[str, Tensor]
    formats: Mapping[str, NumberFormat]
    stats: Mapping[str, LinearStats]
    calls: Sequence[Call]
    targets: Targets | None
    scale_dtype: torch.dtype
    seed: int
    report: Callable[[float], None]


@dataclass(frozen=True)
class Readers:
    """Layers that read one input, and can be given it divided by a scale: all that a transform may look at.

    ``weights``: float32 ``[rows, columns]``, with the scheme of each in ``schemes``. ``stats``: of their input.
    ``tie``: makes values ``[columns]`` equal that must have one scale, being their largest or (``mean``) their mean.
    """

    stats: LinearStats
    weights: Sequence[Tensor]
    schemes: Sequence[Scheme]
    scale_dtype: torch.dtype
    tie: Callable[..., Tensor]


class Algorithm(Protocol):
    """What can be known of any algorithm. ``NEEDS`` names what it wants of the calibration data; empty: nothing.

    Fields of `LinearStats`; "original": what the original block returns; "training": a loop of its own.
    """

    NEEDS: frozenset[str]

    def supports(self, number_format: NumberFormat) -> str | None:
        """Why the algorithm cannot serve a number format, or None."""


class Rounding(Algorithm, Protocol):
    """Chooses the codes of one weight, or of any number of its rows, without data."""

    def run(self, weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
        """Quantize float32 ``[rows, columns]``."""


class CalibratedRounding(Algorithm, Protocol):
    """Chooses the codes of a block's layers from data."""

    def round_layers(self, layers: BlockLayers, options: Any) -> dict[str, RoundedTensor]:
        """Codes of each layer, by its name, in main memory; what they cost is measured by the caller."""


class Transform(Algorithm, Protocol):
    """Chooses a scale that inputs are divided by, and weights multiplied."""

    def input_scale(self, readers: Readers, options: Any) -> Tensor:
        """Float32 ``[columns]``, positive; all ones where nothing is gained."""


class AlgorithmOptions(BaseModel):
    """What an algorithm can be told in a recipe's ``steps``; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoOptions(AlgorithmOptions):
    """An algorithm that can be told nothing."""
