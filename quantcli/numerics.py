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
from functools import cache
from math import log10

import torch
from torch import Tensor

from quantcli.scheme import NESTED_BLOCK, NumberFormat, QuantizedTensor

#: The 16 values of NF4, quantiles of a normal distribution (QLoRA, arXiv:2305.14314, appendix E).
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

NUMBER_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def code_range(number_format: NumberFormat) -> tuple[int, int]:
    """Smallest and largest integer code of a format."""
    if number_format.dtype == "nf4":
        return 0, 15
    half = 1 << (number_format.bits - 1)
    return (1 - half if number_format.narrow else -half), half - 1


@cache
def nf4_codebook() -> Tensor:
    """The NF4 values, float32 ``[16]``, ascending."""
    return torch.tensor(NF4_CODEBOOK, dtype=torch.float32)


@cache
def _nf4_bounds() -> Tensor:
    codebook = nf4_codebook()
    return (codebook[1:] + codebook[:-1]) / 2


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


def stored_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round scales to their storage dtype, and away from zero, which cannot divide; the sign is kept.

    Subnormal fp16 is kept: rows of small weights need it, and it is an ordinary number in float32.
    """
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
    scale = stored_scale((high - low) / (qmax - qmin), scale_dtype)
    zero_point = (qmin - low / scale).round_().clamp_(lowest, qmax)
    return scale, zero_point.to(torch.int8)


def quantize(groups: Tensor, scale: Tensor, zero_point: Tensor | None, number_format: NumberFormat) -> Tensor:
    """Codes of ``groups`` (see `in_groups`), int8 of the same shape; one scale per group."""
    if number_format.dtype == "nf4":
        # The reciprocal, not the quotient: bitsandbytes rounds this way and codes must equal its own.
        scaled = groups * (1.0 / scale.clamp(min=1e-38)).unsqueeze(-1)
        return torch.bucketize(scaled, _nf4_bounds(), out_int32=True).to(torch.int8)
    qmin, qmax = code_range(number_format)
    scaled = groups / scale.unsqueeze(-1)
    scaled.round_()
    if zero_point is not None:
        scaled += zero_point.unsqueeze(-1)
    return scaled.clamp_(qmin, qmax).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, number_format: NumberFormat) -> Tensor:
    """Float32 values that the codes stand for; shapes as in `quantize`."""
    if number_format.dtype == "nf4":
        return nf4_codebook()[codes.int()] * scale.unsqueeze(-1)
    values = codes.float()
    if zero_point is not None:
        values -= zero_point.unsqueeze(-1)
    return values.mul_(scale.unsqueeze(-1))


def decoded(tensor: QuantizedTensor) -> Tensor:
    """The weight that codes and scales stand for, float32 ``[rows, columns]``."""
    codes = in_groups(tensor.codes, tensor.number_format)
    return dequantize(codes, tensor.scale, tensor.zero_point, tensor.number_format).reshape(tensor.codes.shape)


def error_powers(groups: Tensor, tensor: QuantizedTensor) -> tuple[float, float]:
    """Sums of squares of a weight (see `in_groups`) and of what quantization changed in it."""
    codes = in_groups(tensor.codes, tensor.number_format)
    if tensor.zero_point is None and tensor.number_format.dtype != "nf4":
        # As `dequantize`, but in one pass over the weight.
        difference = torch.addcmul(groups, codes.float(), tensor.scale.unsqueeze(-1), value=-1)
    else:
        difference = dequantize(codes, tensor.scale, tensor.zero_point, tensor.number_format).sub_(groups)
    return _power(groups), _power(difference)


def _power(values: Tensor) -> float:
    flat = values.reshape(-1)
    return torch.dot(flat, flat).item()


@cache
def dynamic_codebook() -> Tensor:
    """The 256 values of the signed dynamic 8-bit data type, float32, ascending.

    Each power of ten from 1e-7 to 1 is divided linearly, the larger ones more finely; zero and one
    are added (8-bit optimizers via block-wise quantization, arXiv:2110.02861, section 1.3).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        magnitudes = 10 ** (exponent - 6) * means
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """Double quantization: 8-bit codes of the scales of one tensor (QLoRA, section 3).

    ``scale`` is float32 ``[blocks]``. Returns uint8 codes ``[blocks]``, the second-level absmax
    ``[ceil(blocks / 256)]`` and the offset (the mean) that was subtracted.
    """
    offset = scale.mean()
    padded = torch.nn.functional.pad(scale - offset, (0, -len(scale) % NESTED_BLOCK))
    blocks = padded.reshape(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(-1)
    codebook = dynamic_codebook()
    bounds = (codebook[1:] + codebook[:-1]) / 2
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1)
    codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return codes.reshape(-1)[: len(scale)], absmax, offset.item()


def dequantize_scales(codes: Tensor, absmax: Tensor, offset: float) -> Tensor:
    """Inverse of `quantize_scales`: float32 ``[blocks]``."""
    per_scale = absmax.repeat_interleave(NESTED_BLOCK)[: len(codes)]
    return dynamic_codebook()[codes.int()] * per_scale + offset


def decibels(signal: float, noise: float) -> float | None:
    """Signal-to-noise ratio in dB from two powers; None where there is no noise or no signal."""
    return 10 * log10(signal / noise) if signal > 0 and noise > 0 else None


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: guards against accidents, not against an adversary."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
