"""Q/DQ nodes and scales have short names and no value_info; the model's own names stay, and layers are still found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import quantcli
from quantcli.cli.app import main

LONG = "backbone.stages.0.blocks.0"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    constants = []
    for number in range(4):
        values = (generator.standard_normal((8, 8, 3, 3)) * 0.2).astype(np.float32)
        constants.append(numpy_helper.from_array(values, f"{LONG}.{number}.weight"))
    nodes, last = [], "x"
    for number in range(4):
        output = "y" if number == 3 else f"/{LONG}/{number}/Conv_output_0"
        inputs = [last, f"{LONG}.{number}.weight"]
        nodes.append(helper.make_node("Conv", inputs, [output], name=f"/{LONG}/{number}", pads=[1] * 4))
        last = output
    # Names that are taken already.
    nodes.append(helper.make_node("Identity", ["x"], ["q0"]))
    nodes.append(helper.make_node("Neg", ["q0"], ["q1"]))
    x, y, q1 = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8, 8, 8]) for name in ("x", "y", "q1"))
    graph = helper.make_graph(nodes, "graph", [x], [y, q1], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=generator.standard_normal((8, 8, 8, 8)).astype(np.float32))
    return tmp_path / "m.onnx"


def test_names_are_short_and_shapes_are_not_noted(model: Path) -> None:
    data, out = model.with_name("d.npz"), model.with_name("o.onnx")
    report = quantcli.convert(model, out, scheme="int8-static", data=data)
    assert report.details["verified"]["runtime"]["integer_kernels"]["QLinearConv"] == 4
    graph = onnx.load(out).graph
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    added = {name for node in pairs for name in node.output} - {"y"}
    assert added and all(len(name) < 5 for name in added)
    assert not added & {value.name for value in graph.value_info}
    assert [value.name for value in graph.output] == ["y", "q1"]
    names = {tensor.name for tensor in graph.initializer}
    assert {f"{LONG}.{number}.weight_quantized" for number in range(4)} <= names
    made = [name for node in graph.node for name in node.output] + [*names]
    assert len(made) == len(set(made))
    layers = quantcli.evaluate(model, [out], data=data, by_layer=True).layers
    assert {f"{LONG}.{number}.weight" for number in range(4)} <= {row.name for row in layers}
    assert all(row.sqnr_db is None or row.sqnr_db > 20 for row in layers)


def test_an_artifact_that_is_larger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 16]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "graph", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    command = ["convert", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), "--scheme", "int8-dynamic"]
    assert main(command) == 3
    assert "--allow-larger" in capsys.readouterr().err
    assert not (tmp_path / "o.onnx").exists()
    assert main([*command, "--allow-larger"]) == 0
    assert (tmp_path / "o.onnx").stat().st_size > (tmp_path / "m.onnx").stat().st_size
