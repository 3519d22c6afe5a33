"""IR versions beside the operator sets that need them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, defs, helper
from support.graphs import model, node, normal

from quantcli import convert
from quantcli.errors import InputError
from quantcli.models.session import Session
from quantcli.onnx.graph.model import OLDEST_OPSET
from quantcli.onnx.graph.opset import NEWEST_QDQ_OPSET, needed_ir_version


@pytest.mark.parametrize("opset", range(OLDEST_OPSET, defs.onnx_opset_version() + 1))
def test_no_graph_asks_for_more_than_the_release_of_its_operator_set(opset: int) -> None:
    # Version 3 wants every initializer to be an input as well.
    released = max(4, helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))
    assert released - 1 <= needed_ir_version(opset) <= released
    assert needed_ir_version(opset) <= needed_ir_version(opset + 1)


def quantizing(opset: int) -> onnx.ModelProto:
    nodes = [node("QuantizeLinear", ["x", "s"], ["q"]), node("DequantizeLinear", ["q", "s"], ["y"])]
    return model(nodes, {"x": [4]}, {"y": [4]}, {"s": np.float32(0.1)}, opset=opset, ir_version=12)


def test_the_runtime_has_quantizing_operators_up_to_a_set() -> None:
    Session(quantizing(NEWEST_QDQ_OPSET).SerializeToString())
    with pytest.raises(InputError, match="QuantizeLinear"):
        Session(quantizing(NEWEST_QDQ_OPSET + 1).SerializeToString())


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic", "int8-static"])
def test_a_model_of_a_newer_set_than_the_runtimes_own_quantizing_operators(tmp_path: Path, scheme: str) -> None:
    nodes = [node("Conv", ["x", "w"], ["h"], pads=[1] * 4), node("Relu", ["h"], ["r"]), node("Conv", ["r", "v"], ["y"])]
    weights = {"w": normal(16, 8, 3, 3) / 8, "v": normal(32, 16, 3, 3, seed=1) / 8}
    proto = model(nodes, {"x": ["n", 8, 6, 6]}, {"y": None}, weights, opset=NEWEST_QDQ_OPSET + 1, ir_version=12)
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=normal(8, 8, 6, 6))
    report = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme=scheme, data=tmp_path / "d.npz")
    runtime = report.details["verified"]["runtime"]
    assert runtime["integer_kernels"].get("QLinearConv", 0) == (2 if scheme == "int8-static" else 0)
    x = {"x": normal(8, 8, 6, 6)}
    expected, got = (Session(tmp_path / name).run(x)["y"] for name in ("m.onnx", "o.onnx"))
    assert np.square(expected - got).sum() / np.square(expected).sum() < (0.03 if scheme == "int4" else 2e-3)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("opset", "scale"), [(7, 2.0), (9, 2.0), (9, 2.3), (10, 2.3), (10, 0.6)])
def test_a_resize_of_an_old_set_maps_coordinates_as_it_did(tmp_path: Path, mode: str, opset: int, scale: float) -> None:
    """The newer operator takes centres of pixels unless it is told, and the converter does not tell."""
    scales = [1.0, 1.0, scale, scale]
    attributes = {"mode": mode} | ({"scales": scales} if opset == 7 else {})
    resize = node("Resize" if opset == 10 else "Upsample", ["h", "s"][: 2 if opset > 7 else 1], ["r"], **attributes)
    nodes = [node("Conv", ["x", "w"], ["h"], pads=[1] * 4), resize, node("Conv", ["r", "v"], ["y"], pads=[1] * 4)]
    held = {"w": normal(16, 8, 3, 3) / 8, "v": normal(32, 16, 3, 3, seed=1) / 8}
    held |= {} if opset == 7 else {"s": np.array(scales, np.float32)}
    onnx.save(model(nodes, {"x": ["n", 8, 6, 6]}, {"y": None}, held, opset=opset), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=normal(8, 8, 6, 6))
    report = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8-static", data=tmp_path / "d.npz")
    assert report.details["verified"]["runtime"]["integer_kernels"]["QLinearConv"] == 2
    x = {"x": normal(8, 8, 6, 6)}
    expected, got = (Session(tmp_path / name).run(x)["y"] for name in ("m.onnx", "o.onnx"))
    assert np.square(expected - got).sum() / np.square(expected).sum() < 2e-3


def test_what_no_upgrade_has_words_for_is_said_without_the_converters_source(tmp_path: Path) -> None:
    """A BatchNormalization of statistics for each place left the standard with operator set 9."""
    names = ("scale", "shift", "mean", "variance")
    norm = node("BatchNormalization", ["x", *names], "n", spatial=0)
    statistics = {name: np.abs(normal(4, 6, 6)) for name in names}
    nodes = [norm, node("Conv", ["n", "w"], "y")]
    proto = model(nodes, {"x": [1, 4, 6, 6]}, {"y": [1, 48, 4, 4]}, statistics | {"w": normal(48, 4, 3, 3)}, opset=7)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="upgraded to 13: Attribute spatial must have value 1") as refused:
        convert(tmp_path / "m.onnx", output=tmp_path / "q.onnx", scheme="int8-static", data=tmp_path / "d.npz")
    assert "Assertion" not in str(refused.value)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "fp16"])
def test_tables_of_strings_are_kept(tmp_path: Path, scheme: str) -> None:
    """A vocabulary larger than what an upgrade, or a run in memory, carries along."""
    words = np.array([f"word {number} é" for number in range(80_000)], dtype=object)
    nodes = [node("MatMul", ["x", "w"], "y"), node("ArgMax", ["y"], ["best"], axis=1, keepdims=0)]
    nodes.append(node("Gather", ["words", "best"], ["word"]))
    held = {"w": normal(64, 96), "words": words}
    proto = model(nodes, {"x": ["n", 64]}, {"y": ["n", 96]}, held, opset=11)
    proto.graph.output.append(helper.make_tensor_value_info("word", TensorProto.STRING, ["n"]))
    onnx.save(proto, tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", output=tmp_path / "q.onnx", scheme=scheme, allow_larger=True)
    found = Session(tmp_path / "q.onnx").run({"x": normal(3, 64)})
    assert list(found["word"]) == list(words[found["y"].argmax(1)])
