"""Nodes and constants of a graph that is being built; weights go to disk as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.export.decoder.external import ExternalData
from quantcli.export.decoder.weights import Blocks, Matrix, NbitsMatrix

if TYPE_CHECKING:
    import onnx_ir as ir

_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Table:
    """A matrix in the file of weights: its tensors, and how codes lie in the first; None where it holds values.

    ``tensors`` are codes, scales and zero points, each with a row for every row of the matrix, or the values alone.
    """

    tensors: Sequence[ir.ExternalTensor]
    blocks: Blocks | None

    @property
    def nbytes(self) -> int:
        """Bytes of its codes or values."""
        return self.tensors[0].nbytes


class Nodes:
    """What a graph consists of so far. ``accuracy_level`` is MatMulNBits'."""

    def __init__(self, data: Path, accuracy_level: int) -> None:
        self.data = ExternalData(data)
        self.all: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._accuracy_level = accuracy_level
        self._constants: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A value that the graph is given."""
        import onnx_ir as ir

        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Value:
        """A value that the graph returns, in float32, under its name."""
        import onnx_ir as ir

        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        return value

    def add(
        self, operator: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one output, which bears its name."""
        return self.add_many(operator, inputs, name, 1, domain=domain, **attributes)[0]

    def add_many(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: int,
        *,
        domain: str = "",
        unused: Sequence[int] = (),
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node with several outputs; those that are ``unused`` have no name."""
        import onnx_ir as ir

        node = ir.node(operator, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = "" if index in unused else f"{name}.output_{index}"
        self.all.append(node)
        return list(node.outputs)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant within the graph's own file, where runtimes look for axes; one for all uses of a name."""
        import onnx_ir as ir

        return self._initializer(ir.tensor(array, name=name))

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant in the file of weights."""
        return self._initializer(self.data.add(name, array))

    def product(self, name: str, matrix: Matrix, value: ir.Value) -> ir.Value:
        """A value times a matrix ``[outputs, inputs]``."""
        return self.product_with(name, self.table(name, matrix), value)

    def table(self, name: str, matrix: Matrix) -> Table:
        """A matrix, written."""
        if not isinstance(matrix, NbitsMatrix):
            return Table([self.data.add(f"{name}.weight", matrix)], None)
        parts = {"codes": matrix.codes, "scales": matrix.scales, "zero_points": matrix.zero_points}
        written = [self.data.add(f"{name}.{kind}", part) for kind, part in parts.items() if part is not None]
        return Table(written, matrix.blocks)

    def lookup(self, name: str, table: Table, ids: ir.Value) -> ir.Value:
        """Rows of a table."""
        first, *scales = (self._initializer(tensor) for tensor in table.tensors)
        if table.blocks is None:
            return self._widened(self.add("Gather", [first, ids], name), table.tensors[0].dtype.numpy(), name)
        _, columns = table.blocks.shape
        filled = table.blocks.stored != columns
        found = self.add(
            "GatherBlockQuantized", [first, ids, *scales], f"{name}.filled" if filled else name, _CONTRIB,
            bits=table.blocks.bits, block_size=table.blocks.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if not filled:
            return found
        ends = (("start", 0), ("stop", columns), ("axis", 2))
        bounds = [self.constant(f"{name}.{end}", np.array([at], np.int64)) for end, at in ends]
        return self.add("Slice", [found, *bounds], name)

    def product_with(self, name: str, table: Table, value: ir.Value, parts: int = 1) -> ir.Value:
        """A value times a table, whose bytes may serve a lookup as well; by so many nodes, each with some of its rows.

        A table of values is always one node's.
        """
        if table.blocks is None:
            return self._float_product(name, self._initializer(table.tensors[0]), value)
        if parts == 1:
            return self._nbits_product(name, table, (0, table.blocks.shape[0]), value)
        edges = [table.blocks.shape[0] * part // parts for part in range(parts + 1)]
        made = [self._nbits_product(f"{name}.{part}", table, rows, value) for part, rows in enumerate(pairwise(edges))]
        return self.add("Concat", made, name, axis=-1)

    def _nbits_product(self, name: str, table: Table, rows: tuple[int, int], value: ir.Value) -> ir.Value:
        """A value times rows of a table of codes, from the first number up to the second."""
        assert table.blocks is not None
        whole, columns = table.blocks.shape
        bits, block, (start, stop) = table.blocks.bits, table.blocks.block, rows
        codes, *scales = table.tensors
        by_block = (stop - start, -(-columns // block), block * bits // 8)
        constants = [self.data.rows(f"{name}.codes", codes, start, by_block)]
        if stop - start == whole:
            constants += scales
        else:
            constants += [
                self.data.rows(f"{name}.{kind}", tensor, start, (stop - start, tensor.shape.numpy()[1]))
                for kind, tensor in zip(("scales", "zero_points"), scales, strict=False)
            ]
        return self.add(
            "MatMulNBits", [value, *map(self._initializer, constants)], name, _CONTRIB, N=stop - start, K=columns,
            bits=bits, block_size=block, accuracy_level=self._accuracy_level,
        )  # fmt: skip

    def _float_product(self, name: str, weight: ir.Value, value: ir.Value) -> ir.Value:
        tensor = weight.const_value
        assert tensor is not None
        wide = self._widened(weight, tensor.dtype.numpy(), name)
        return self.add("FusedMatMul", [value, wide], name, _CONTRIB, transB=1)

    def _widened(self, value: ir.Value, dtype: np.dtype[Any], name: str) -> ir.Value:
        """A value in float32, which all is computed in."""
        import onnx_ir as ir

        if dtype == np.float32:
            return value
        return self.add("Cast", [value], f"{name}.widened", to=ir.DataType.FLOAT.value)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A tensor as a constant of the graph; the same one for all uses of a name."""
        import onnx_ir as ir

        name = tensor.name
        assert name is not None
        if name not in self._constants:
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            self._constants[name] = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
            self.initializers.append(self._constants[name])
        return self._constants[name]
