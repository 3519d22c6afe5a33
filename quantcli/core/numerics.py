"""Conventions and arithmetic of quantization, defined once.

- Rounding is to nearest, ties to even (``torch.round``), of the float32 quotient ``value / scale``.
- Integer codes are signed and use the full range: -8..7 for int4, -128..127 for int8.
- Symmetric: ``scale = absmax / ((qmax - qmin) / 2)``, that is absmax / 7.5 and absmax / 127.5, as
  compressed-tensors has it: the finest step whose error never exceeds half a step.
- Narrow: -127..127 and absmax / 127. The largest value is met exactly, where -128..127 may cut half a step off
  it; that matters in a convolution, whose channels have few weights and inputs of one sign.
- Asymmetric: the range is widened to hold zero, and zero is exactly representable.
- Raised: an asymmetric range is widened until it holds a step below zero, so that no zero point is the lowest code.
- Signed: a symmetric scale may be negative, which turns the codes round: -8 then stands for a positive value.
- A scale is rounded to the dtype it will be stored in *before* codes are chosen.

Weights are float32 matrices ``[rows, columns]``. All functions are pure.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from math import isfinite, log10
from types import ModuleType

import torch
from numpy import float32, ndarray
from torch import Tensor

from quantcli.core import compiled
from quantcli.core.nf4 import dequantize_scales, nf4_bounds, nf4_codebook, quantize_scales
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor

#: Groups shorter than this are as quick in torch.
_SHORTEST_ROW = 8


def code_range(number_format: NumberFormat) -> tuple[int, int]:
    """Smallest and largest integer code of a format."""
    if number_format.dtype == "nf4":
        return 0, 15
    half = 1 << (number_format.bits - 1)
    return (1 - half if number_format.narrow else -half), half - 1


def in_groups(weight: Tensor, number_format: NumberFormat) -> Tensor:
    """View a matrix as ``[..., values sharing one scale]``, without copying.

    tensor: ``[1, 1, rows * columns]``; channel: ``[rows, 1, columns]``; group: ``[rows, groups, size]``;
    block: ``[blocks, size]``. Raises ValueError where the size does not divide.
    """
    rows, columns = weight.shape
    kind, size = number_format.granularity.kind, number_format.granularity.size
    if kind == "tensor":
        return weight.reshape(1, 1, -1)
    if kind == "channel":
        return weight.reshape(rows, 1, columns)
    divided = columns if kind == "group" else rows * columns
    if size is None or divided % size:
        raise ValueError(f"{number_format.granularity} does not divide {rows} x {columns}")
    return weight.reshape(rows, -1, size) if kind == "group" else weight.reshape(-1, size)


#: Binary digits of a coarse scale: with the four of a count of steps they are the eleven of fp16.
_COARSE_DIGITS = 7


def stored_scale(scale: Tensor, scale_dtype: torch.dtype, *, coarse: bool = False) -> Tensor:
    """Round scales to their storage dtype, and away from zero, which cannot divide; the sign is kept.

    Subnormal fp16 is kept: rows of small weights need it, and it is an ordinary number in float32. ``coarse``: see
    `NumberFormat.coarse`.
    """
    if coarse:
        digits, exponent = torch.frexp(scale)
        scale = torch.ldexp((digits * (1 << _COARSE_DIGITS)).round_(), exponent - _COARSE_DIGITS)
    info = torch.finfo(scale_dtype)
    smallest = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    stored = scale.to(scale_dtype).float()
    return stored.abs().clamp_(min=smallest).copysign_(stored)


def choose_qparams(
    low: Tensor | None, high: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover a range, float32, one entry per group.

    A symmetric format covers ``-high..high`` and takes no ``low``; an asymmetric one ``low..high``. Where ``high``
    of a symmetric format is negative, so is the scale.
    Returns ``(scale, zero_point)`` shaped like ``high``; the zero point is int8, or None when symmetric.
    """
    qmin, qmax = code_range(number_format)
    if number_format.dtype == "nf4":
        return high, None
    if low is None:
        return stored_scale(high / ((qmax - qmin) / 2), scale_dtype), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    lowest = qmin
    if number_format.raised:
        low, lowest = torch.minimum(low, -high / (qmax - qmin - 1)), qmin + 1
    scale = stored_scale((high - low) / (qmax - qmin), scale_dtype, coarse=number_format.coarse)
    zero_point = (qmin - low / scale).round_().clamp_(lowest, qmax)
    return scale, zero_point.to(torch.int8)


def group_range(groups: Tensor, number_format: NumberFormat) -> tuple[Tensor | None, Tensor]:
    """Smallest and largest value per group; a symmetric format has only the largest magnitude."""
    loops, rows = _loops_for(groups), groups.shape[:-1]
    if number_format.symmetric:
        if loops is None:
            return None, groups.abs().amax(-1)
        high = torch.empty(rows)
        loops.largest(_rows(groups.view(torch.int32)), _flat(high.view(torch.int32)))
        return None, high
    if loops is None:
        # `aminmax` along a dimension takes six times as long as these two.
        return groups.amin(-1), groups.amax(-1)
    low, high = torch.empty(rows), torch.empty(rows)
    loops.extremes(_rows(groups.view(torch.int32)), _flat(low.view(torch.int32)), _flat(high.view(torch.int32)))
    return low, high


def quantize(groups: Tensor, scale: Tensor, zero_point: Tensor | None, number_format: NumberFormat) -> Tensor:
    """Codes of ``groups`` (see `in_groups`), int8 of the same shape; one scale per group."""
    if loops := _loops_for(groups, scale):
        return _looped_codes(loops, groups, scale, zero_point, number_format)
    if number_format.dtype == "nf4":
        scaled, bounds = groups * _inverse(scale).unsqueeze(-1), nf4_bounds().to(groups.device)
        return torch.bucketize(scaled, bounds, out_int32=True).to(torch.int8)
    qmin, qmax = code_range(number_format)
    scaled = groups / scale.unsqueeze(-1)
    scaled.round_()
    if zero_point is not None:
        scaled += zero_point.unsqueeze(-1)
    return scaled.clamp_(qmin, qmax).to(torch.int8)


def _looped_codes(
    loops: ModuleType, groups: Tensor, scale: Tensor, zero_point: Tensor | None, number_format: NumberFormat
) -> Tensor:
    codes = torch.empty(groups.shape, dtype=torch.int8)
    if number_format.dtype == "nf4":
        loops.nf4_codes(_rows(groups), _flat(_inverse(scale)), _rows(codes))
    else:
        low, high = map(float32, code_range(number_format))
        loops.integer_codes(_rows(groups), _flat(scale), _offsets(scale, zero_point), low, high, _rows(codes))
    return codes


def _inverse(scale: Tensor) -> Tensor:
    """What NF4 multiplies by: bitsandbytes does not divide, and codes must equal its own."""
    return 1.0 / scale.clamp(min=1e-38)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, number_format: NumberFormat) -> Tensor:
    """Float32 values that the codes stand for; shapes as in `quantize`."""
    offset = None if zero_point is None else zero_point.unsqueeze(-1)
    return multiples(codes, offset, number_format).mul_(scale.unsqueeze(-1))


def multiples(codes: Tensor, zero_point: Tensor | None, number_format: NumberFormat) -> Tensor:
    """What codes stand for as multiples of their scale, float32; ``zero_point`` is shaped to be subtracted."""
    if number_format.dtype == "nf4":
        return nf4_codebook().to(codes.device)[codes.int()]
    values = codes.float()
    if zero_point is not None:
        values -= zero_point
    return values


def as_stored(tensor: QuantizedTensor) -> QuantizedTensor:
    """The tensor with the scales that double quantization gives back; itself where scales are stored as they are."""
    if not tensor.number_format.double_quantized:
        return tensor
    return replace(tensor, scale=dequantize_scales(*quantize_scales(tensor.scale)))


def decoded(tensor: QuantizedTensor) -> Tensor:
    """The weight that codes and scales stand for, float32 ``[rows, columns]``."""
    codes = in_groups(tensor.codes, tensor.number_format)
    return dequantize(codes, tensor.scale, tensor.zero_point, tensor.number_format).reshape(tensor.codes.shape)


def error_powers(groups: Tensor, tensor: QuantizedTensor) -> tuple[float, float]:
    """Sums of squares of a weight (see `in_groups`) and of what quantization changed in it."""
    signal, noise = _error_powers(groups, tensor)
    if isfinite(signal) and isfinite(noise):
        return signal, noise
    # Squares of numbers beyond 1e19 are none that float32 has.
    restored = dequantize(
        in_groups(tensor.codes, tensor.number_format), tensor.scale, tensor.zero_point, tensor.number_format
    )
    wide = groups.double()
    return wide.square().sum().item(), (restored.double() - wide).square().sum().item()


def _error_powers(groups: Tensor, tensor: QuantizedTensor) -> tuple[float, float]:
    codes = in_groups(tensor.codes, tensor.number_format)
    loops = _loops_for(groups, tensor.scale)
    if loops:
        arguments = _rows(groups), _rows(codes), _flat(tensor.scale)
        if tensor.number_format.dtype == "nf4":
            signal, noise = loops.codebook_powers(*arguments, nf4_codebook().numpy())
        else:
            signal, noise = loops.integer_powers(*arguments, _offsets(tensor.scale, tensor.zero_point))
        return signal, noise
    difference = dequantize(codes, tensor.scale, tensor.zero_point, tensor.number_format).sub_(groups)
    return power(groups), power(difference)


def _loops_for(groups: Tensor, scale: Tensor | None = None) -> ModuleType | None:
    """The compiled loops, where they take these groups: float32, long enough, one scale for each."""
    if groups.dtype != torch.float32 or groups.shape[-1] < _SHORTEST_ROW:
        return None
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() * groups.shape[-1] != groups.numel()):
        return None
    return compiled.loops_for(groups)


def _rows(groups: Tensor) -> ndarray:
    return groups.reshape(-1, groups.shape[-1]).numpy()


def _flat(values: Tensor) -> ndarray:
    return values.detach().contiguous().reshape(-1).numpy()


def _offsets(scale: Tensor, zero_point: Tensor | None) -> ndarray:
    return _flat(torch.zeros(scale.shape, dtype=torch.int8) if zero_point is None else zero_point)


def power(values: Tensor) -> float:
    """The sum of squares, in float64: in float32 it differs between processors, and manifests would with it."""
    return float(values.square().sum(dtype=torch.float64))


def decibels(signal: float, noise: float) -> float | None:
    """Signal-to-noise ratio in dB from two powers; None where there is no noise or no signal."""
    return 10 * log10(signal / noise) if signal > 0 and noise > 0 else None


def all_finite(values: Tensor) -> bool:
    """Whether floats of any dtype hold neither an infinity nor a NaN."""
    # Either would be in their sum, which takes a fortieth of the time in bf16; that sum alone may be too large, too.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: guards against accidents, not against an adversary."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
