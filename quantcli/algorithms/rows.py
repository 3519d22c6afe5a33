"""A weight some rows at a time, for algorithms that take each row, or each group in it, by itself."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quantcli.scheme import NumberFormat, QuantizedTensor

#: Elements worked on at a time: as float32 they fill a 1 MiB cache.
CHUNK_ELEMENTS = 1 << 18


class Rounding(Protocol):
    """Chooses codes without data."""

    def __call__(self, weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
        """Quantize float32 ``[rows, columns]``."""


def by_rows(run: Rounding, weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
    """What ``run`` makes of a weight, with temporaries of a few rows only; whole where rows share scales."""
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
