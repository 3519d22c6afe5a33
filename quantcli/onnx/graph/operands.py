"""Which constant matrix a node multiplies by, or looks rows up in, and how it lies in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quantcli.onnx.graph.values import constant, input_of, integer, integers, is_standard, rank, real

if TYPE_CHECKING:
    import onnx_ir as ir

#: Operators whose weight can be quantized alone.
_WEIGHT_ONLY = ("MatMul", "Gemm", "Gather")

#: Dtypes that the CPU kernels of the quantized operators compute in, by ONNX's names.
_COMPUTED = ("FLOAT", "FLOAT16")


@dataclass(frozen=True, eq=False)
class Operand:
    """A weight as quantization sees it: ``[rows, columns]``, groups along columns.

    For a product rows are output features and columns input features; for a lookup a row is an entry.
    ``transposed`` says that it is stored the other way round, ``factor`` what a Gemm multiplies it by.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool
    factor: float = 1.0

    @property
    def rows(self) -> int:
        """Output features, or entries of a table."""
        return self.tensor.shape.numpy()[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        """Input features, or the width of an entry."""
        return self.tensor.shape.numpy()[0 if self.transposed else 1]

    @property
    def dtype(self) -> np.dtype[np.floating]:
        """float32 or float16: also that of the scales, as the operators ask for."""
        return np.dtype(self.tensor.dtype.numpy())

    def slab(self, start: int, stop: int) -> np.ndarray:
        """Some rows, float32 and contiguous."""
        return self.slabs()(start, stop)

    def slabs(self) -> Callable[[int, int], np.ndarray]:
        """What gives one slab after the other of a matrix that is mapped, or turned, once for all of them."""
        return partial(self._slab, self.tensor.numpy())

    def _slab(self, stored: np.ndarray, start: int, stop: int) -> np.ndarray:
        rows = stored[:, start:stop].T if self.transposed else stored[start:stop]
        values = np.array(rows, dtype=np.float32, order="C")
        return values if self.factor == 1.0 else values * np.float32(self.factor)


def weight_input(node: ir.Node) -> ir.Value | None:
    """The input at which a convolution, product or lookup has its weight."""
    return input_of(node, 0 if node.op_type == "Gather" else 1)


def channel_axis(node: ir.Node) -> int:
    """The dimension of a convolution's or product's weight that runs over its output channels."""
    return 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and integer(node, "transB", 0)) else 1


def operand_of(node: ir.Node) -> Operand | str:
    """The weight of a MatMul, Gemm or Gather, or why there is none that can be quantized."""
    if not is_standard(node, *_WEIGHT_ONLY):
        return f"no weight-only form of {node.op_type} exists"
    value, turned = behind_transposes(weight_input(node))
    tensor = constant(value)
    if value is None or tensor is None:
        swapped = node.op_type == "MatMul" and constant(input_of(node, 0)) is not None
        return "its constant is the left factor" if swapped else "it has no constant weight"
    if tensor.dtype.name not in _COMPUTED:
        return f"its weight is {tensor.dtype.name.lower()}; the runtime's kernels take float32 and float16"
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        return f"its weight has shape {list(tensor.shape)}; a matrix is needed"
    if node.op_type == "Gather":
        axis = integer(node, "axis", 0)
        if turned or axis not in (0, -2):
            return f"it looks up along axis {axis}; only rows can be looked up"
        return Operand(value, tensor, transposed=False)
    left = input_of(node, 0)
    if left is None or rank(left) == 1:
        return "its other factor is a vector"
    if node.op_type == "MatMul":
        return Operand(value, tensor, transposed=not turned)
    rows_first = turned != bool(integer(node, "transB", 0))
    return Operand(value, tensor, transposed=not rows_first, factor=real(node, "alpha", 1.0))


def readers(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that use a constant, those behind a Transpose included."""
    for use in value.uses():
        if is_matrix_transpose(use.node) and not use.node.outputs[0].is_graph_output():
            yield from readers(use.node.outputs[0])
        else:
            yield use.node


def remove_unread(value: ir.Value) -> bool:
    """Remove a constant, and the Transposes behind it, once nothing reads it. Says whether it went."""
    if value.is_graph_output() or any(True for _ in readers(value)):
        return False
    _remove_transposes(value)
    if value.graph is not None and value.name is not None:
        value.graph.initializers.pop(value.name)
    return True


def _remove_transposes(value: ir.Value) -> None:
    for use in list(value.uses()):
        _remove_transposes(use.node.outputs[0])
        if use.node.graph is not None:
            use.node.graph.remove(use.node, safe=True)


def behind_transposes(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The value that Transposes of a matrix start from, and whether they turn it."""
    turned = False
    while value is not None:
        producer = value.producer()
        if producer is None or not is_matrix_transpose(producer):
            break
        value, turned = producer.inputs[0], not turned
    return value, turned


def is_matrix_transpose(node: ir.Node) -> bool:
    """Whether a node turns a matrix."""
    if not is_standard(node, "Transpose"):
        return False
    order = integers(node, "perm")
    return order == [1, 0] or (order is None and node.inputs[0] is not None and rank(node.inputs[0]) == 2)
