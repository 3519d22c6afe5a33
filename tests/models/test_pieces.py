"""Models run in pieces: the outputs of the whole, and no piece without its turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from support.graphs import model, node, normal

from quantcli.errors import InputError, UsageError
from quantcli.models.kernels import prove
from quantcli.models.pieces import Pieces, runnable
from quantcli.models.session import Session
from quantcli.onnx.graph.external import LARGE_BYTES
from quantcli.system import memory
from quantcli.system.memory import LIBRARIES_BYTES, within_memory

SIDE = 520  # A matrix of so many rows and columns is large enough to stay in its file.


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is a piece."""
    monkeypatch.setattr(memory, "_PIECE_BYTES", 1)


def branching() -> onnx.ModelProto:
    """A table used twice, a body that reads around itself, strings, a weight that is returned, and no shapes."""
    nodes = [
        node("Gather", ["table", "ids"], ["h0"]),
        node("Shape", ["h0"], ["dims"]),
        node("MatMul", ["h0", "w"], ["h1"]),
        node("Reshape", ["h1", "dims"], ["h2"]),
        node("ReduceSum", ["h2"], ["total"], keepdims=0),
        node("Greater", ["total", "zero"], ["flag"]),
    ]
    bodies = {}
    for name, op in (("then", "Relu"), ("else", "Neg")):
        output = helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, None)
        bodies[f"{name}_branch"] = helper.make_graph([node(op, ["h1"], [f"{name}_y"])], name, [], [output])
    nodes += [
        node("If", ["flag"], ["h3"], **bodies),
        node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        node("MatMul", ["h3", "turned"], ["logits"]),
    ]
    constants = {"table": normal(SIDE, SIDE), "w": normal(SIDE, SIDE, seed=1), "zero": np.float32(0)}
    proto = model(nodes, {}, {"logits": None, "h1": None, "w": [SIDE, SIDE]}, constants)
    proto.graph.input.append(helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "length"]))
    return proto


FEEDS = [{"ids": np.arange(6).reshape(2, 3) * step} for step in (1, 7)]


@pytest.mark.parametrize("apart", [False, True], ids=["inside", "in a file"])
@pytest.mark.usefixtures("small_pieces")
def test_pieces_return_what_the_whole_returns(tmp_path: Path, apart: bool) -> None:
    assert 4 * SIDE**2 > LARGE_BYTES
    path = tmp_path / "m.onnx"
    onnx.save(branching(), path, save_as_external_data=apart, location="w.bin", size_threshold=1000)
    whole, pieces = Session(path), runnable(path)
    assert isinstance(pieces, Pieces) and len(pieces) >= 3
    assert (pieces.inputs, pieces.outputs) == (whole.inputs, whole.outputs)
    for got, (expected, _) in zip(pieces.runs(FEEDS), whole.runs(FEEDS), strict=True):
        assert got[1] is None and list(got[0]) == list(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(got[0][name], values, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("small_pieces")
def test_graphs_whose_weights_are_held_in_memory() -> None:
    graph = open_onnx_of(branching())
    pieces = runnable(graph, optimize=False, prepack=False)
    assert isinstance(pieces, Pieces)
    assert [port.name for port in pieces.inputs] == ["ids"]
    expected = Session(branching().SerializeToString(), optimize=False).run(FEEDS[0])
    np.testing.assert_allclose(pieces.run(FEEDS[0])["logits"], expected["logits"], rtol=1e-4, atol=1e-3)


def open_onnx_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    import onnx_ir as ir

    return ir.from_proto(proto)


@pytest.mark.usefixtures("small_pieces")
def test_kernels_of_all_pieces_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(branching(), path)
    found = prove(path)
    assert found.kernels["MatMul"] == 2 and found.kernels["Gather"] == 1
    monkeypatch.undo()
    whole = prove(path)
    assert (whole.floating, whole.kernels["If"]) == (found.floating, found.kernels["If"])


@pytest.mark.usefixtures("small_pieces")
def test_errors_name_the_model(tmp_path: Path) -> None:
    proto = branching()
    proto.graph.node[2].op_type = "Unheard"
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"m\.onnx cannot be loaded by onnxruntime"):
        runnable(tmp_path / "m.onnx")
    onnx.save(branching(), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="could not run the model"):
        runnable(tmp_path / "m.onnx").run({"ids": np.array([[SIDE]])})


def test_a_piece_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(branching(), path)
    with (
        within_memory(LIBRARIES_BYTES + 1000),
        pytest.raises(UsageError, match=r"--max-memory 461 MB is too little: .* needs"),
    ):
        runnable(path)
    with within_memory(LIBRARIES_BYTES + 8 * 4 * SIDE**2):
        assert isinstance(runnable(path), Session)
