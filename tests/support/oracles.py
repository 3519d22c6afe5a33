"""Naive float64 versions of algorithms, straight from their papers: what tests compare the fast ones with."""

from __future__ import annotations

import numpy as np
import torch

from quantcli.core.nf4 import NF4_CODEBOOK
from quantcli.core.tensors import QuantizedTensor


def gptq(weight: torch.Tensor, hessian: torch.Tensor, base: QuantizedTensor, damping: float) -> np.ndarray:
    """Optimal brain quantization with the columns in a fixed order (GPTQ, section 3.1), straight from its equations.

    After each column the inverse of what remains of H is found anew; no Cholesky factor, no blocks.
    """
    low, high = (-8, 7) if base.number_format.dtype == "int4" else (-127 if base.number_format.narrow else -128, 127)
    work, matrix = weight.double().numpy().copy(), hessian.double().numpy().copy()
    matrix += np.eye(len(matrix)) * damping * matrix.diagonal().mean()
    groups = base.scale.shape[1]
    rows, columns = work.shape
    scale = np.broadcast_to(base.scale.double().numpy(), (rows, groups))
    zero = np.zeros((rows, groups)) if base.zero_point is None else base.zero_point.double().numpy()
    remaining = list(np.argsort(-hessian.diagonal().numpy(), kind="stable"))
    result = np.zeros_like(work)
    while remaining:
        column = remaining[0]
        inverse = np.linalg.inv(matrix[np.ix_(remaining, remaining)])
        own = column // (columns // groups)
        if base.number_format.dtype == "nf4":
            result[:, column] = nearest_nf4(work[:, column] / scale[:, own]) * scale[:, own]
        else:
            code = np.clip(np.round(work[:, column] / scale[:, own]) + zero[:, own], low, high)
            result[:, column] = (code - zero[:, own]) * scale[:, own]
        error = (work[:, column] - result[:, column]) / inverse[0, 0]
        work[:, remaining] -= np.outer(error, inverse[0])
        remaining = remaining[1:]
    return result


def nearest_nf4(values: np.ndarray) -> np.ndarray:
    """The value of NF4's codebook that is nearest to each."""
    codebook = np.array(NF4_CODEBOOK)
    return codebook[np.abs(values[..., None] - codebook).argmin(-1)]


def pair_sum(tensor: QuantizedTensor, pairs: str, shape: tuple[int, ...]) -> int:
    """The largest sum of two codes of one sign that a kernel multiplies at once."""
    codes = tensor.codes.numpy().astype(int).reshape(shape)
    if pairs == "filter":
        codes = codes.transpose(0, 2, 3, 1)
    largest = 0
    for row in codes.reshape(shape[0], -1):
        for first, second in zip(row[::2], [*row[1::2], 0], strict=False):
            largest = max(largest, abs(first + second) if first * second >= 0 else 0)
    return largest
