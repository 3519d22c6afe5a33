"""Codes and biases as a graph stores them, read for training and written back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantcli.algorithms.fake_quantize import LearnedRange, LearnedValues, LearnedWeight
from quantcli.core.tensors import QuantizedTensor
from quantcli.onnx.graph.values import array, constant
from quantcli.onnx.weights.blocks import pack_codes, unpack_codes
from quantcli.onnx.weights.integer import Origin

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class StoredWeight:
    """A learned weight, and where it stands in the graph."""

    learned: LearnedWeight
    codes: ir.Value
    scale: ir.Value
    origin: Origin
    nbits: bool


@dataclass(frozen=True)
class StoredBias:
    """A learned integer bias, where it stands in the graph, and the scales that its own is the product of."""

    learned: LearnedValues
    codes: ir.Value
    scale: ir.Value
    inputs: LearnedRange
    weight: StoredWeight

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values with gradients, int32 codes, and scales ``[channels]``: products of the scales of input and weight."""
        exact = self.learned.values()
        with torch.no_grad():
            weight = self.weight.learned.scales.values().reshape(-1)
            scale = (self.inputs.values().reshape(()) * weight).expand(exact.shape).contiguous()
            codes = (exact.double() / scale.double()).round().clamp(-(2.0**31), 2.0**31 - 1)
            rounded = (codes * scale.double()).float()
        return exact + (rounded - exact).detach(), codes.to(torch.int32), scale


def read_codes(codes: ir.Value, scale: ir.Value, origin: Origin) -> QuantizedTensor:
    """An integer weight as a quantized matrix ``[channels, inputs]``."""
    stored, scales = array(codes), array(scale)
    assert stored is not None and scales is not None
    rows = np.ascontiguousarray(np.moveaxis(stored, origin.codes_axis, 0))
    matrix = torch.from_numpy(rows.reshape(len(rows), -1))
    scale_column = torch.from_numpy(np.array(scales, np.float32).reshape(-1, 1))
    return QuantizedTensor(matrix, scale_column, None, tuple(matrix.shape), origin.number_format)


def write_codes(weight: StoredWeight, tensor: QuantizedTensor) -> None:
    """Put codes and scale where the nodes that restore a weight, or multiply by it, read them."""
    origin = weight.origin
    set_constant(weight.codes, np.moveaxis(tensor.codes.numpy().reshape(origin.shape), 0, origin.codes_axis))
    set_constant(weight.scale, tensor.scale.numpy())


def read_nbits(codes: ir.Value, scale: ir.Value, zeros: ir.Value | None, origin: Origin) -> QuantizedTensor:
    """The quantized matrix of an n-bit product, its last block whole."""
    stored, scales, points = array(codes), array(scale), array(zeros)
    assert stored is not None and scales is not None
    rows, bits = origin.shape[0], origin.number_format.bits
    unpacked = unpack_codes(stored.reshape(rows, -1), bits)
    values = torch.from_numpy(np.array(scales, np.float32).reshape(rows, -1))
    zero_point = None
    if points is not None:
        zero_point = unpack_codes(points.reshape(rows, -1), bits)[:, : values.shape[1]].contiguous()
    return QuantizedTensor(unpacked, values, zero_point, tuple(unpacked.shape), origin.number_format)


def write_nbits(weight: StoredWeight, tensor: QuantizedTensor) -> None:
    """Put codes and scales where an n-bit operator reads them; zero points stay as they are."""
    stored, scales = constant(weight.codes), constant(weight.scale)
    assert stored is not None and scales is not None
    packed = pack_codes(tensor, scales.dtype.numpy(), "qat")
    set_constant(weight.codes, packed.codes.reshape(stored.shape.numpy()))
    set_constant(weight.scale, packed.scales.reshape(scales.shape.numpy()))


def set_constant(value: ir.Value, values: np.ndarray) -> None:
    """Give a constant other values of its own dtype."""
    import onnx_ir as ir

    before = constant(value)
    assert before is not None
    stored = np.ascontiguousarray(values).astype(before.dtype.numpy()).reshape(before.shape.numpy())
    value.const_value = ir.tensor(stored, name=value.name)
