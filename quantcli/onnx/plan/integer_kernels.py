"""Which layers onnxruntime has integer kernels for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.core.scheme import NumberFormat
from quantcli.onnx.graph.values import constant, input_of, integer, real

if TYPE_CHECKING:
    import onnx_ir as ir


def no_integer_kernel(node: ir.Node, inputs: NumberFormat) -> str | None:
    """Why a node cannot run on integers with such inputs, or None."""
    if node.op_type == "ConvTranspose":
        return "ConvTranspose has no integer kernel"
    if node.op_type == "Conv" and inputs.dynamic:
        return "onnxruntime's dynamic convolution is many times slower than its float one"
    weight = constant(node.inputs[1])
    if weight is None:
        return "it turns a matrix that others read too"
    if weight.dtype.name != "FLOAT":
        return "integer kernels take and return float32, and this is half precision"
    if node.op_type == "MatMul":
        return None if len(weight.shape) == 2 else "the weight is not a matrix"
    bias = constant(input_of(node, 2))
    if input_of(node, 2) is not None and bias is None:
        return "the bias is not constant"
    if node.op_type == "Gemm":
        if integer(node, "transA", 0) or real(node, "alpha", 1.0) != 1.0 or real(node, "beta", 1.0) != 1.0:
            return "Gemm with a transposed or scaled input has no integer kernel"
        channels = weight.shape[0 if integer(node, "transB", 0) else 1]
        if bias is not None and not inputs.dynamic and bias.size not in (1, channels):
            return "the bias is not one value per output"
    return None
