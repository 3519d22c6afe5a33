"""Round to nearest: the range of each group becomes its scale, nothing is searched.

The baseline of every paper of the field, for example LLM.int8() (arXiv:2208.07339), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core.numerics import choose_qparams, dequantize, group_range, in_groups, quantize
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor

NEEDS: frozenset[str] = frozenset()


def supports(number_format: NumberFormat) -> str | None:
    """None: every number format can be rounded to."""
    return None


def run(weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantize ``weight``, float32 ``[rows, columns]``, with scales stored as ``scale_dtype``."""
    groups = in_groups(weight, number_format)
    low, high = group_range(groups, number_format)
    scale, zero_point = choose_qparams(low, high, number_format, scale_dtype)
    codes = quantize(groups, scale, zero_point, number_format).reshape(weight.shape)
    return QuantizedTensor(codes, scale, zero_point, tuple(weight.shape), number_format)


def fake_quantized(values: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """What rounding to nearest leaves of a float32 matrix, ``[rows, columns]`` like it."""
    tensor = run(values, number_format, scale_dtype)
    codes = in_groups(tensor.codes, number_format)
    return dequantize(codes, tensor.scale, tensor.zero_point, number_format).reshape(values.shape)
