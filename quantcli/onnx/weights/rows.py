"""Weights of any number of dimensions as matrices: rows are outputs, columns what a product is summed over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantcli.errors import InputError


def rows_of(weight: np.ndarray, summed: Sequence[int]) -> np.ndarray:
    """A weight as ``[rows, columns]``: the dimensions ``summed`` come last, and are flattened."""
    last = range(weight.ndim - len(summed), weight.ndim)
    moved = np.moveaxis(weight, summed, last)
    columns = int(np.prod([weight.shape[axis] for axis in summed]))
    return moved.reshape(-1, columns)


def require_finite(weight: np.ndarray, name: str | None) -> None:
    """Raise InputError where a weight holds NaN or infinity."""
    if not np.isfinite(weight).all():
        raise InputError(
            f"{name} holds NaN or infinite values, which cannot be quantized.",
            "Repair the model, or leave the layer out with --skip.",
        )
