"""Files written piece by piece are those that protobuf writes, and are read without their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import model, node, normal

from quantcli.errors import InputError
from quantcli.onnx.graph.external import LARGE_BYTES, Scratch
from quantcli.onnx.graph.mapped import MappedTensor
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.save import checksums, save_graph


def graph() -> ir.Model:
    """A model with small and large weights between others, one of them in four bits."""
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["p"]), node("MatMul", ["p", "v"], ["y"])]
    weights = {"w": normal(8, 600), "b": normal(600), "v": normal(600, 600, seed=1)}
    found: ir.Model = ir.from_proto(model(nodes, {"x": ["n", 8]}, {"y": None}, weights))
    for value in found.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name, doc_string="of a test")
    found.metadata_props["key"] = "value"
    codes = np.arange(3_000_000).reshape(1000, -1) % 16 - 8
    narrow = ir.tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="codes")
    found.graph.register_initializer(
        ir.Value(name="codes", shape=ir.Shape(codes.shape), type=ir.TensorType(ir.DataType.INT4), const_value=narrow)
    )
    return found


def test_the_same_bytes_as_protobuf_writes(tmp_path: Path) -> None:
    written = graph()
    save_graph(written, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == ir.to_proto(written).SerializeToString()


def test_large_weights_stay_in_the_file(tmp_path: Path) -> None:
    written = graph()
    save_graph(written, tmp_path / "m.onnx")
    mapped = open_onnx(tmp_path / "m.onnx", mapped=True)
    kinds = {name: type(value.const_value) for name, value in mapped.ir.graph.initializers.items()}
    assert [name for name, kind in kinds.items() if kind is MappedTensor] == ["v", "codes"]
    assert checksums(mapped.ir) == checksums(written) == checksums(open_onnx(tmp_path / "m.onnx").ir)
    assert mapped.ir.metadata_props == {"key": "value"}


@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_a_file_that_ends_too_soon(tmp_path: Path, kept: float) -> None:
    save_graph(graph(), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match="is not a readable ONNX model"):
        open_onnx(tmp_path / "m.onnx", mapped=True)


def test_constants_move_into_a_file_as_they_are(tmp_path: Path) -> None:
    held = graph()
    before = checksums(held)
    scratch = Scratch(tmp_path / "codes")
    scratch.take(held)
    scratch.take(held)
    large = [value for value in held.graph.initializers.values() if value.const_value.nbytes >= LARGE_BYTES]
    assert len(large) == 2 and all(isinstance(value.const_value, MappedTensor) for value in large)
    assert checksums(held) == before
    assert (tmp_path / "codes").stat().st_size == sum(value.const_value.nbytes for value in large)


def test_a_mapping_goes_with_the_values(tmp_path: Path) -> None:
    held = graph()
    Scratch(tmp_path / "codes").take(held)
    tensor = held.graph.initializers["v"].const_value
    values = tensor.numpy()
    assert tensor.raw is None and not values.flags.writeable
    np.testing.assert_array_equal(values, normal(600, 600, seed=1))
