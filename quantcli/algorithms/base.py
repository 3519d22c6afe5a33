"""What algorithms share: what each must offer, and a weight worked on some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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


class Algorithm(Protocol):
    """What can be known of any algorithm. ``NEEDS`` names what it wants of the calibration data; empty: nothing."""

    NEEDS: frozenset[str]

    def supports(self, number_format: NumberFormat) -> str | None:
        """Why the algorithm cannot serve a number format, or None."""


class Rounding(Algorithm, Protocol):
    """Chooses the codes of one weight, or of any number of its rows, without data."""

    def run(self, weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
        """Quantize float32 ``[rows, columns]``."""


class AlgorithmOptions(BaseModel):
    """What an algorithm can be told in a recipe's ``steps``; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoOptions(AlgorithmOptions):
    """An algorithm that can be told nothing."""
