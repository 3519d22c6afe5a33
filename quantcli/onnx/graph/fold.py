"""Folding what follows a convolution or a matrix product into its weight: batch norm, constant factors and sums.

A per-channel affine map ``scale * y + shift`` of ``y = W x + b`` is ``(scale W) x + (scale b + shift)``
(Jacob et al., arXiv:1712.05877, section 3.2). It is computed in float64 and stored as the weight was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.onnx.graph.operands import channel_axis
from quantcli.onnx.graph.values import (
    add_initializer,
    array,
    constant,
    free_name,
    input_of,
    integer,
    only_consumer,
    real,
)

if TYPE_CHECKING:
    import onnx_ir as ir

_FOLDED_INTO = ("Conv", "ConvTranspose", "Gemm")
_EPSILON = 1e-5

#: Weights above this many elements are not copied where several nodes share one.
_COPIED_ELEMENTS = 1 << 10


def fold_affine(model: ir.Model) -> int:
    """Fold affine nodes into the weights before them until none is left. Returns how many were."""
    folded = 0
    # Infinities are looked for before anything is replaced.
    with np.errstate(all="ignore"):
        for node in list(model.graph):
            while node.op_type in _FOLDED_INTO and node.domain == "" and _fold_next(model.graph, node):
                folded += 1
    return folded


def _fold_next(graph: ir.Graph, node: ir.Node) -> bool:
    follower = only_consumer(node.outputs[0])
    weight, bias = node.inputs[1], input_of(node, 2)
    tensor = constant(weight)
    if follower is None or follower.graph is not graph or weight is None or tensor is None:
        return False
    if bias is not None and constant(bias) is None:
        return False
    channels = _output_channels(node)
    rank = len(tensor.shape)
    affine = None if channels is None else _affine(follower, node.outputs[0], channels, rank)
    if affine is None:
        return False
    scale, shift = affine
    values, old_bias = tensor.numpy(), array(bias)
    shifted = shift if old_bias is None else scale * old_bias.astype(np.float64).reshape(-1) + shift
    new_bias = shifted.astype(values.dtype)
    changed = not np.all(scale == 1.0)
    if changed and tensor.size > _COPIED_ELEMENTS and len(weight.uses()) > 1:
        # Others read it as it is: folding would write it a second time.
        return False
    per_channel = [-1 if axis == channel_axis(node) else 1 for axis in range(rank)]
    scaled = (values * scale.reshape(per_channel)).astype(values.dtype) if changed else values
    if not (np.isfinite(scaled).all() and np.isfinite(new_bias).all()):
        # A division by zero, or a half-precision weight that would overflow: apart the two may still work.
        return False
    if changed:
        _replace(graph, node, 1, scaled, weight.name or "weight")
    base = (bias.name if bias is not None else None) or f"{weight.name}_bias"
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    _replace(graph, node, 2, new_bias, base)
    output, final = node.outputs[0], follower.outputs[0]
    name = final.name
    final.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(follower, safe=True)
    output.name = name
    output.shape, output.type = final.shape, final.type
    return True


def _output_channels(node: ir.Node) -> int | None:
    weight = constant(node.inputs[1])
    assert weight is not None
    shape = list(weight.shape.numpy())
    channels = shape[channel_axis(node)]
    if node.op_type == "Conv":
        return channels
    if node.op_type == "ConvTranspose":
        # Only a single group: with more, output channels are spread over two dimensions of the weight.
        return channels if integer(node, "group", 1) == 1 else None
    plain = real(node, "alpha", 1.0) == 1.0 and real(node, "beta", 1.0) == 1.0
    bias = constant(input_of(node, 2))
    if bias is not None and tuple(bias.shape.numpy()) not in ((channels,), (1, channels)):
        return None
    return channels if plain else None


def _affine(node: ir.Node, data: ir.Value, channels: int, rank: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift per channel, float64 ``[channels]``, of a node that is an affine map of ``data``."""
    if node.domain != "":
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    if node.op_type == "BatchNormalization" and len(node.outputs) == 1 and node.inputs[0] is data:
        if integer(node, "training_mode", 0):
            return None
        parts = [array(value) for value in node.inputs[1:5]]
        if any(part is None for part in parts):
            return None
        gamma, beta, mean, variance = (np.asarray(part, dtype=np.float64) for part in parts)
        scale = gamma / np.sqrt(variance + real(node, "epsilon", _EPSILON))
        return scale, beta - mean * scale
    if node.op_type not in ("Add", "Mul", "Sub", "Div") or len(node.inputs) != 2:
        return None
    first = node.inputs[0] is data
    if node.op_type in ("Sub", "Div") and not first:
        return None
    other = node.inputs[1] if first else node.inputs[0]
    tensor = constant(other)
    # Asked before anything is read: the other operand may be a large constant.
    if tensor is None or not _is_per_channel(tuple(tensor.shape.numpy()), channels, rank):
        return None
    values = np.broadcast_to(tensor.numpy().astype(np.float64).reshape(-1), channels)
    if node.op_type == "Add":
        return ones, values
    if node.op_type == "Sub":
        return ones, -values
    return (values if node.op_type == "Mul" else 1.0 / values), zeros


def _is_per_channel(shape: tuple[int, ...], channels: int, rank: int) -> bool:
    """Whether a constant is one value, or one per channel, of an output of ``rank`` dimensions, and adds none."""
    per_channel = (channels, *[1] * (rank - 2))
    return shape in (per_channel, (1, *per_channel)) or (int(np.prod(shape)) == 1 and len(shape) <= rank)


def _replace(graph: ir.Graph, node: ir.Node, index: int, values: np.ndarray, name: str) -> None:
    """Give a node a constant of its own under the old one's name, if nobody else uses that."""
    import onnx_ir as ir

    old = node.inputs[index]
    if old is not None and len(list(old.uses())) == 1 and not old.is_graph_output():
        old.const_value = ir.tensor(values, name=old.name)
        old.shape = ir.Shape(values.shape)
        return
    node.replace_input_with(index, add_initializer(graph, free_name(graph, name), values))
