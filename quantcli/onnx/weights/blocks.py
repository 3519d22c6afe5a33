"""A matrix to packed blocks, slab by slab, as the n-bit operators of onnxruntime lay them out.

Codes are stored unsigned, that is plus 8 or plus 128, which is these operators' default zero point; two
four-bit codes share a byte, the first in the low nibble. NF4 is as bitsandbytes has it: the matrix is
flattened, and the first code of a byte is in the high nibble.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli import algorithms
from quantcli.algorithms import default_rounding
from quantcli.core import numerics
from quantcli.core.nf4 import nf4_codebook
from quantcli.core.packing import (
    pack_int4_low_nibble_first,
    pack_nibbles_high_first,
    unpack_int4_low_nibble_first,
    unpack_nibbles_high_first,
)
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.core.tensors import Hessian, QuantizedTensor, RoundedTensor, Rounding
from quantcli.errors import InputError
from quantcli.onnx.graph.operands import Operand
from quantcli.onnx.weights.compensation import compensate
from quantcli.system.parallel import in_parallel, usable_cores

#: Values a thread has in work at a time: what they become stays in its cache.
_SLAB_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Packed:
    """A quantized matrix in stored form, and how its codes came about.

    ``codes`` uint8 ``[rows, bytes of a row]`` (nf4: flat), ``scales`` ``[rows, blocks]`` (nf4: flat),
    ``zero_points`` uint8 ``[rows, bytes]`` or None.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    rounding: Rounding

    def decoded(self, operand: Operand, number_format: NumberFormat, size: int) -> np.ndarray:
        """What the codes stand for, in the shape that the weight has in its file."""
        rows, columns = operand.rows, operand.columns
        if number_format.dtype == "nf4":
            codes = unpack_nibbles_high_first(torch.from_numpy(self.codes), rows * columns).long()
            scales = torch.from_numpy(self.scales.astype(np.float32)).repeat_interleave(size)[: rows * columns]
            matrix = (nf4_codebook()[codes] * scales).reshape(rows, columns)
        else:
            bits = number_format.bits
            codes = unpack_codes(self.codes.reshape(rows, -1), bits).float()[:, :columns]
            if self.zero_points is not None:
                points = unpack_codes(self.zero_points.reshape(rows, -1), bits).float()
                codes = codes - points.repeat_interleave(size, 1)[:, :columns]
            scales = torch.from_numpy(self.scales.astype(np.float32)).reshape(rows, -1)
            matrix = codes * scales.repeat_interleave(size, 1)[:, :columns]
        values = matrix.numpy() / np.float32(operand.factor or 1.0)
        return values.T if operand.transposed else values


def pack_rows(
    operand: Operand, number_format: NumberFormat, size: int, algorithm: str, hessian: Hessian | None = None
) -> Packed:
    """Quantize in blocks of ``size`` along columns; the last block of a row is filled with zeros.

    With a ``hessian``, which gptq needs, the matrix is worked on as a whole: its factor is the same for all rows.

    Raises:
        InputError: the weight holds NaN or infinity.
    """
    in_blocks = replace(number_format, granularity=Granularity("group", size))
    rows, blocks, bits = operand.rows, -(-operand.columns // size), number_format.bits
    codes = np.empty((rows, blocks * size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), operand.dtype)
    zero_points = None if number_format.symmetric else np.empty((rows, -(-blocks * bits // 8)), np.uint8)
    step = rows if hessian else max(1, _SLAB_ELEMENTS // (blocks * size))
    start_algorithm = default_rounding(in_blocks) if hessian else algorithm
    compensated: list[RoundedTensor] = []
    slabs = operand.slabs()

    def pack(start: int) -> tuple[float, float]:
        slab = _finite(operand, slabs(start, min(start + step, rows)))
        slab = torch.nn.functional.pad(slab, (0, blocks * size - operand.columns))
        tensor = algorithms.rounding(start_algorithm).run(slab, in_blocks, _torch_dtype(operand))
        if hessian is not None:
            compensated.append(compensate(slab, tensor, _torch_dtype(operand), hessian))
            tensor = compensated[-1].tensor
        part = slice(start, start + len(slab))
        codes[part] = _unsigned(tensor.codes, bits)
        scales[part] = tensor.scale.numpy()
        if zero_points is not None and tensor.zero_point is not None:
            zero_points[part] = _unsigned(tensor.zero_point, bits)
        return numerics.error_powers(numerics.in_groups(slab, in_blocks), tensor)

    signal, noise = _summed(pack, range(0, rows, step))
    rounding = compensated[0].rounding if compensated else Rounding(algorithm)
    return Packed(codes, scales, zero_points, replace(rounding, signal=signal, noise=noise))


def pack_codes(tensor: QuantizedTensor, dtype: np.dtype[Any], algorithm: str) -> Packed:
    """Lay out codes that exist, int8 ``[rows, columns]`` in groups; scales become ``dtype``, which must hold them."""
    size, bits = tensor.number_format.granularity.size, tensor.number_format.bits
    assert size is not None
    codes = torch.nn.functional.pad(tensor.codes, (0, -tensor.codes.shape[1] % size))
    zero_points = None if tensor.zero_point is None else _unsigned(tensor.zero_point, bits)
    return Packed(_unsigned(codes, bits), tensor.scale.numpy().astype(dtype), zero_points, Rounding(algorithm))


def pack_nf4(operand: Operand, number_format: NumberFormat, algorithm: str, hessian: Hessian | None = None) -> Packed:
    """Quantize to NF4 in blocks of the flattened ``[rows, columns]``, the last one filled with zeros.

    With a ``hessian``, which gptq needs, blocks divide rows, and the matrix is worked on as a whole.

    Raises:
        InputError: the weight holds NaN or infinity.
    """
    size = number_format.granularity.size
    assert size is not None
    if hessian is not None:
        return _compensated_nf4(operand, number_format, hessian)
    rows, columns = operand.rows, operand.columns
    codes = np.empty(-(-rows * columns // 2), np.uint8)
    scales = np.empty(-(-rows * columns // size), operand.dtype)
    # Slabs begin where a block begins, and where a byte does.
    whole = size // gcd(size, columns)
    step = max(1, _SLAB_ELEMENTS // (whole * columns)) * whole
    slabs = operand.slabs()

    def pack(start: int) -> tuple[float, float]:
        flat = _finite(operand, slabs(start, min(start + step, rows))).reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
        tensor = algorithms.rounding(algorithm).run(blocks, number_format, _torch_dtype(operand))
        packed = pack_nibbles_high_first(tensor.codes.reshape(-1)[: len(flat)]).numpy()
        codes[start * columns // 2 :][: len(packed)] = packed
        scales[start * columns // size :][: len(blocks)] = tensor.scale.numpy()
        return numerics.error_powers(blocks, tensor)

    signal, noise = _summed(pack, range(0, rows, step))
    return Packed(codes, scales, None, Rounding(algorithm, signal=signal, noise=noise))


def _compensated_nf4(operand: Operand, number_format: NumberFormat, hessian: Hessian) -> Packed:
    in_rows, dtype = number_format.in_rows, _torch_dtype(operand)
    weight = _finite(operand, operand.slabs()(0, operand.rows))
    start = algorithms.rounding(default_rounding(in_rows)).run(weight, in_rows, dtype)
    rounded = compensate(weight, start, dtype, hessian)
    signal, noise = numerics.error_powers(numerics.in_groups(weight, in_rows), rounded.tensor)
    codes = pack_nibbles_high_first(rounded.tensor.codes.reshape(-1)).numpy()
    scales = rounded.tensor.scale.reshape(-1).numpy().astype(operand.dtype)
    return Packed(codes, scales, None, replace(rounded.rounding, signal=signal, noise=noise))


def _summed(pack: Callable[[int], tuple[float, float]], starts: range) -> tuple[float, float]:
    """Run over slabs on all cores; the powers of weight and error are added up in order."""
    powers: dict[int, tuple[float, float]] = {}

    def run(start: int) -> None:
        powers[start] = pack(start)

    in_parallel((partial(run, start) for start in starts), min(usable_cores(), len(starts)))
    return sum(powers[start][0] for start in starts), sum(powers[start][1] for start in starts)


def _unsigned(codes: Tensor, bits: int) -> np.ndarray:
    """Signed codes ``[rows, columns]`` in stored form, uint8 ``[rows, ceil(columns * bits / 8)]``."""
    if bits == 8:
        return codes.numpy().view(np.uint8) ^ np.uint8(128)
    packed = pack_int4_low_nibble_first(codes.contiguous()).view(torch.uint8).numpy()
    return packed[:, : -(-codes.shape[1] // 2)]


def unpack_codes(stored: np.ndarray, bits: int) -> Tensor:
    """Inverse of `_unsigned` for rows of whole bytes: uint8 ``[rows, bytes]`` as int8 codes ``[rows, columns]``."""
    if bits == 8:
        return torch.from_numpy((stored ^ np.uint8(128)).view(np.int8))
    return unpack_int4_low_nibble_first(torch.from_numpy(stored.copy()), 2 * stored.shape[1])


def _finite(operand: Operand, slab: np.ndarray) -> Tensor:
    if not np.isfinite(slab).all():
        raise InputError(
            f"{operand.value.name} holds NaN or infinite values, which cannot be quantized.",
            "Repair the model, or leave the layer out with --skip.",
        )
    return torch.from_numpy(slab)


def _torch_dtype(operand: Operand) -> torch.dtype:
    return torch.float16 if operand.dtype == np.float16 else torch.float32
