"""Lengths that a graph leaves open in its inputs, and that its constants need all the same.

Exporters that call every axis free leave it to whoever runs the model to know that the last one has 73 features: the
weight that meets it tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from quantcli.core.ports import Port
from quantcli.onnx.graph.values import constant, input_of, integer, integers, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

#: Operators whose first output has the shape of their first input.
_ALIKE = (
    "Identity", "Cast", "Dropout", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Gelu", "Erf", "Elu", "HardSwish", "Softmax",
    "LogSoftmax", "Clip", "Abs", "Neg", "Exp", "Log", "Sqrt", "Floor", "Round", "BatchNormalization",
    "InstanceNormalization", "LayerNormalization", "RMSNormalization",
)  # fmt: skip

#: Operators that broadcast two inputs.
_PAIRWISE = ("Add", "Sub", "Mul", "Div")

#: Where a value's dimensions are in the input that they come from; None where they are others.
_Axes = tuple[int | None, ...]


def tied(ports: Sequence[Port], model: ir.Model) -> list[Port]:
    """The inputs of a model with the lengths that its constants need in place of free ones."""
    inputs = {value.name: value for value in model.graph.inputs}
    lengths: dict[str, int] = {}
    found = []
    for port in ports:
        value, shape = inputs.get(port.name), list(port.shape or ())
        for axis, length in _lengths(value, len(shape)) if value is not None else ():
            dim = shape[axis]
            if isinstance(dim, str):
                lengths.setdefault(dim, length)
            elif dim is None:
                shape[axis] = length
        found.append(port if port.shape is None else replace(port, shape=tuple(shape)))
    return [
        port if port.shape is None
        else replace(port, shape=tuple(lengths.get(dim, dim) if isinstance(dim, str) else dim for dim in port.shape))
        for port in found
    ]  # fmt: skip


def _lengths(value: ir.Value, rank: int) -> Iterator[tuple[int, int]]:
    """Axes of an input, and how long each has to be."""
    start: tuple[ir.Value, _Axes] = (value, tuple(range(rank)))
    waiting, seen = [start], {start}
    while waiting:
        value, axes = waiting.pop()
        for use in value.uses():
            for dim, length in needs(use.node, use.idx):
                axis = axes[dim] if -len(axes) <= dim < len(axes) else None
                if axis is not None:
                    yield axis, length
            passed = _passed(use.node, use.idx, axes)
            if passed is not None and (following := (use.node.outputs[0], passed)) not in seen:
                seen.add(following)
                waiting.append(following)


def needs(node: ir.Node, index: int) -> Iterator[tuple[int, int]]:
    """Dimensions of a node's input, and the lengths that a constant beside it asks for."""
    other = constant(input_of(node, 0 if index else 1))
    shape = () if other is None else other.shape.numpy()
    if is_standard(node, "MatMul") and len(shape) > 1:
        yield (-2, shape[-1]) if index else (-1, shape[-2])
    elif is_standard(node, *_PAIRWISE):
        yield from ((place - len(shape), length) for place, length in enumerate(shape) if length != 1)
    elif index or not shape:
        return
    elif is_standard(node, "Gemm"):
        yield 0 if integer(node, "transA", 0) else 1, shape[1 if integer(node, "transB", 0) else 0]
    elif is_standard(node, "Conv"):
        yield 1, shape[1] * integer(node, "group", 1)
    elif is_standard(node, "ConvTranspose", "BatchNormalization", "InstanceNormalization"):
        yield 1, shape[0]
    elif is_standard(node, "LSTM", "GRU", "RNN"):
        yield 2, shape[2]
    elif is_standard(node, "LayerNormalization", "RMSNormalization") and len(shape) == 1:
        yield -1, shape[0]


def _passed(node: ir.Node, index: int, axes: _Axes) -> _Axes | None:
    """The dimensions of a node's first output, where they are those of its input."""
    if is_standard(node, *_ALIKE):
        return None if index else axes
    if is_standard(node, "Transpose"):
        order = integers(node, "perm")
        return axes[::-1] if order is None else tuple(axes[each] for each in order)
    if is_standard(node, *_PAIRWISE):
        other = constant(input_of(node, 0 if index else 1))
        return None if other is None or len(other.shape) > len(axes) else axes
    if is_standard(node, "MatMul") and not index:
        other = constant(input_of(node, 1))
        return None if other is None or len(other.shape) != 2 else (*axes[:-1], None)
    return None
