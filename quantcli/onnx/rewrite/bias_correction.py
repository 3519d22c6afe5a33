"""Bias correction: quantized weights shift the mean of a layer's output, and its bias can take that back.

``E[W' x] - E[W x] = (W' - W) E[x]``: the means of the inputs come from calibration (Nagel et al., Data-Free
Quantization, arXiv:1906.04721, section 4.2). Zeros that a convolution pads with are taken for means too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.onnx.graph.values import add_initializer, array, drop_unused, free_name, input_of, integer
from quantcli.onnx.weights.integer import IntegerWeight

if TYPE_CHECKING:
    import onnx_ir as ir


def output_shift(node: ir.Node, weight: IntegerWeight, mean: np.ndarray) -> np.ndarray | None:
    """What integer weights add to the mean of each output channel, float64 ``[channels]``.

    ``mean`` is that of the input's channels. None where the node's channels are not those of ``mean``, or it is
    no Conv or Gemm. Must be asked while the node still reads its float weight.
    """
    original, codes = array(node.inputs[1]), array(weight.codes)
    if node.op_type not in ("Conv", "Gemm") or original is None or codes is None:
        return None
    rows = np.moveaxis(original, weight.axis, 0).astype(np.float64)
    restored = np.moveaxis(codes, weight.axis, 0) * weight.scales.astype(np.float64).reshape(-1, *[1] * (rows.ndim - 1))
    change = (restored - rows).reshape(*rows.shape[:2], -1).sum(-1)
    groups = integer(node, "group", 1) if node.op_type == "Conv" else 1
    channels, inputs = change.shape
    if mean.shape != (inputs * groups,) or not np.isfinite(mean).all() or channels % groups:
        return None
    per_group = change.reshape(groups, channels // groups, inputs)
    shift: np.ndarray = np.einsum("goi,gi->go", per_group, mean.astype(np.float64).reshape(groups, inputs))
    return shift.reshape(-1)


def correct_bias(graph: ir.Graph, node: ir.Node, weight: IntegerWeight, mean: np.ndarray | None) -> None:
    """Take what integer weights add to the mean of the output out of a node's bias, which is made where there is none.

    Does nothing where the shift or the bias is not known. Must be done while the node still reads its float weight.
    """
    shift = None if mean is None else output_shift(node, weight, mean)
    if shift is not None:
        subtract_from_bias(graph, node, shift)


def subtract_from_bias(graph: ir.Graph, node: ir.Node, shift: np.ndarray) -> None:
    """Give a node another bias, less a shift ``[channels]``; nothing is done where its own is not constant."""
    old = input_of(node, 2)
    values = array(old)
    if old is not None and (values is None or values.size != shift.size):
        return
    weight = node.inputs[1]
    assert weight is not None
    dtype = (weight.dtype.numpy() if weight.dtype else np.float32) if values is None else values.dtype
    corrected = (np.zeros(shift.shape) if values is None else values.reshape(-1).astype(np.float64)) - shift
    name = old.name if old is not None else f"{weight.name}_bias"
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, add_initializer(graph, free_name(graph, f"{name}_corrected"), corrected.astype(dtype)))
    if old is not None:
        drop_unused(graph, old)
