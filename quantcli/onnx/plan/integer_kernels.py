"""Which layers onnxruntime has integer kernels for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.core.scheme import Scheme
from quantcli.onnx.graph.operands import channel_axis, readers
from quantcli.onnx.graph.opset import NARROW_OPSET, QDQ_OPSET
from quantcli.onnx.graph.values import constant, holds_infinity, input_of, integer, is_standard, real
from quantcli.onnx.plan.plan import NodePlan

if TYPE_CHECKING:
    import onnx_ir as ir


def integer_opset(layer: NodePlan) -> int:
    """The operator set of scales per channel, or of codes that are stored in four bits."""
    return NARROW_OPSET if layer.scheme and layer.scheme.weights.bits == 4 else QDQ_OPSET


def no_integer_kernel(layer: NodePlan, scheme: Scheme) -> str | None:
    """Why a layer cannot run on integers with such inputs, or None."""
    node, inputs = layer.node, scheme.inputs
    assert inputs is not None
    if not is_standard(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return f"onnxruntime has no integer {node.op_type}"
    if layer.weight is node.inputs[0]:
        return "its constant is the left factor"
    if node.op_type == "ConvTranspose":
        return "ConvTranspose has no integer kernel"
    if node.op_type == "Conv" and inputs.dynamic:
        return "onnxruntime's dynamic convolution is many times slower than its float one"
    if constant(node.inputs[0]) is not None:
        return "its input is constant"
    weight = constant(node.inputs[1])
    if weight is None:
        return "it turns a matrix that others read too"
    if any(is_standard(reader, "Gather") for reader in readers(layer.weight)):
        return "a lookup reads the same table"
    if weight.dtype.name != "FLOAT":
        precision = "double" if weight.dtype.name == "DOUBLE" else "half"
        return f"integer kernels take and return float32, and this is {precision} precision"
    if node.op_type == "MatMul":
        return None if len(weight.shape) == 2 else "the weight is not a matrix"
    scaled = real(node, "alpha", 1.0) != 1.0 or real(node, "beta", 1.0) != 1.0
    if node.op_type == "Gemm" and (integer(node, "transA", 0) or scaled):
        return "Gemm with a transposed or scaled input has no integer kernel"
    return _no_integer_bias(node, weight.shape.numpy()[channel_axis(node)], becomes_codes=not inputs.dynamic)


def _no_integer_bias(node: ir.Node, outputs: int, *, becomes_codes: bool) -> str | None:
    """Why the bias of a convolution or Gemm stands against integers, or None."""
    value = input_of(node, 2)
    bias = constant(value)
    if bias is None:
        return None if value is None else "the bias is not constant"
    if not becomes_codes:
        return None
    if holds_infinity(value):
        return "its bias is infinite in places, for which no integer stands"
    if node.op_type == "Gemm" and not _per_output(bias, outputs):
        return "the bias is not one value per output"
    return None


def _per_output(bias: ir.TensorProtocol, outputs: int) -> bool:
    """Whether a Gemm adds one value to each of its outputs, or one to all: as many in a column go to rows."""
    return bias.size == 1 or (bias.size == outputs and bias.shape.numpy()[-1] == outputs)
