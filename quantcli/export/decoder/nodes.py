"""Nodes and constants of a graph that is being built; weights go to disk as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """A table of words in the graph: its constants, and how codes lie in the first; None where it is of floats."""

    constants: Sequence[ir.Value]
    blocks: Blocks | None


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

        if name not in self._constants:
            self._constants[name] = self._initializer(ir.tensor(array, name=name))
        return self._constants[name]

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant in the file of weights."""
        return self._initializer(self.data.add(name, array))

    def product(self, name: str, matrix: Matrix, value: ir.Value) -> ir.Value:
        """A value times a matrix ``[outputs, inputs]``."""
        if isinstance(matrix, NbitsMatrix):
            rows, columns = matrix.shape
            codes = self.weight(f"{name}.codes", matrix.codes.reshape(rows, columns // matrix.block, -1))
            return self._nbits_product(name, matrix.blocks, [codes, *self._scales(name, matrix)], value)
        return self._float_product(name, self.weight(f"{name}.weight", matrix), value)

    def lookup(self, name: str, matrix: Matrix, ids: ir.Value) -> tuple[ir.Value, Table]:
        """Rows of a table, and the table itself."""
        if not isinstance(matrix, NbitsMatrix):
            table = self.weight(f"{name}.weight", matrix)
            return self._widened(self.add("Gather", [table, ids], name), matrix.dtype, name), Table([table], None)
        codes = self.weight(f"{name}.codes", matrix.codes)
        scales = self._scales(name, matrix)
        found = self.add(
            "GatherBlockQuantized", [codes, ids, *scales], name, _CONTRIB, bits=matrix.bits, block_size=matrix.block,
            gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        return found, Table([codes, *scales], matrix.blocks)

    def product_with(self, name: str, table: Table, value: ir.Value) -> ir.Value:
        """A value times the table of a lookup, whose bytes serve both."""
        codes, *scales = table.constants
        if table.blocks is None:
            return self._float_product(name, codes, value)
        (rows, columns), block = table.blocks.shape, table.blocks.block
        shape = (rows, columns // block, block * table.blocks.bits // 8)
        again = self.data.again(f"{name}.codes", codes.const_value, shape)  # type: ignore[arg-type]
        return self._nbits_product(name, table.blocks, [self._initializer(again), *scales], value)

    def _scales(self, name: str, matrix: NbitsMatrix) -> list[ir.Value]:
        found = [self.weight(f"{name}.scales", matrix.scales)]
        if matrix.zero_points is not None:
            found.append(self.weight(f"{name}.zero_points", matrix.zero_points))
        return found

    def _nbits_product(self, name: str, blocks: Blocks, constants: list[ir.Value], value: ir.Value) -> ir.Value:
        rows, columns = blocks.shape
        return self.add(
            "MatMulNBits", [value, *constants], name, _CONTRIB, N=rows, K=columns, bits=blocks.bits,
            block_size=blocks.block, accuracy_level=self._accuracy_level,
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
        import onnx_ir as ir

        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.initializers.append(value)
        return value
