"""Losses in bodies of If and Loop: judged by what the weights' error leaves, and told where little is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantcli import convert
from quantcli.conversion.onnx import explained
from quantcli.errors import InputError
from quantcli.onnx.graph.values import add_initializer
from quantcli.onnx.rewrite import nbits


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) / np.sqrt(rows)
    return values.astype(np.float32)


def save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], output: str) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])]
    if any(node.op_type == "If" for node in nodes):
        inputs.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def recurrent(path: Path, turns: int, then: str = "ReduceMean") -> Path:
    """A state that goes through one and the same product in every turn of a loop."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["again"]),
            helper.make_node("MatMul", ["s", "w"], ["p"]),
            helper.make_node("Tanh", ["p"], ["s_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, ["n", 64]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s_out", TensorProto.FLOAT, ["n", 64]),
        ],
        [numpy_helper.from_array(matrix(64, 64) * np.float32(1.5), "w")],
    )
    nodes = [helper.make_node("Loop", ["turns", "true", "x"], ["h"], body=body)]
    if then == "ReduceMean":
        nodes.append(helper.make_node("ReduceMean", ["h"], ["y"], axes=[1], keepdims=0))
    else:
        nodes.append(helper.make_node(then, ["h"], ["y"]))
    return save(path, nodes, {"turns": np.array(turns), "true": np.array(True)}, "y")


def branches(path: Path) -> Path:
    """Two branches whose weights have one name and different shapes."""
    graphs = []
    for name, inner in (("then", 96), ("else", 160)):
        weights = {"w": matrix(64, inner), "v": matrix(inner, 32, 1)}
        graphs.append(
            helper.make_graph(
                [
                    helper.make_node("MatMul", ["x", "w"], ["h"]),
                    helper.make_node("Relu", ["h"], ["r"]),
                    helper.make_node("MatMul", ["r", "v"], [f"{name}_y"]),
                ],
                name,
                [],
                [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)],
                [numpy_helper.from_array(values, key) for key, values in weights.items()],
            )
        )
    node = helper.make_node("If", ["c"], ["y"], then_branch=graphs[0], else_branch=graphs[1])
    return save(path, [node], {}, "y")


def test_little_is_left_and_rightly_so(tmp_path: Path) -> None:
    report = convert(recurrent(tmp_path / "m.onnx", 8), tmp_path / "out.onnx", scheme="int4")
    kept = report.details["outputs"]["sqnr_db"]
    assert kept < explained._POOR_DB
    (told,) = report.warnings
    assert f"The output y keeps {kept:.1f} dB of the model's. The error of its weights explains that" in told


def test_enough_is_left(tmp_path: Path) -> None:
    report = convert(recurrent(tmp_path / "m.onnx", 8), tmp_path / "out.onnx", scheme="int8")
    assert not report.warnings


def test_a_loop_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = nbits._product

    def wrong(*arguments: Any) -> list[ir.Node]:
        nodes = make(*arguments)
        nodes[-1].replace_input_with(
            2, add_initializer(arguments[0].graph, "wrong", np.full((64, 1), 0.01, np.float32))
        )
        return nodes

    monkeypatch.setattr(nbits, "_product", wrong)
    with pytest.raises(InputError, match="output y is wrong"):
        convert(recurrent(tmp_path / "m.onnx", 8), tmp_path / "out.onnx", scheme="int8")


@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic", "fp16"])
def test_two_branches_whose_weights_have_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(explained, "_FIRST_LOOK_DB", -1000.0)
    report = convert(branches(tmp_path / "m.onnx"), tmp_path / "out.onnx", scheme=scheme)
    assert report.details["outputs"]["sqnr_db"] > 10
    assert not report.warnings


def test_a_jump_behind_a_body(tmp_path: Path) -> None:
    report = convert(recurrent(tmp_path / "m.onnx", 8, "Round"), tmp_path / "out.onnx", scheme="int4")
    assert any("was not judged: operators follow" in told for told in report.warnings)


def ending_in(path: Path, operator: str, **attributes: Any) -> Path:
    """A product whose output becomes integers."""
    kind = TensorProto.INT64 if operator == "ArgMax" else TensorProto.UINT8
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "gain"], ["g"]),
        helper.make_node("Add", ["g", "offset"], ["a"]),
        helper.make_node("Clip", ["a", "low", "high"], ["c"]),
        helper.make_node(operator, ["c"], ["y"], **attributes),
    ]
    constants = {"w": matrix(64, 96), "gain": 40, "offset": 128, "low": 0, "high": 255}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(values, np.float32), name) for name, values in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_classes_that_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ending_in(tmp_path / "m.onnx", "ArgMax", axis=-1)
    report = convert(model, tmp_path / "out.onnx", scheme="int8", allow_larger=True)
    assert not report.warnings
    make = nbits._product

    def negated(*arguments: Any) -> list[ir.Node]:
        product, node = make(*arguments)[-1], arguments[0]
        product.outputs[0].name = "product"
        return [product, ir.node("Neg", [product.outputs[0]], name=f"{node.name}_negated")]

    monkeypatch.setattr(nbits, "_product", negated)
    report = convert(model, tmp_path / "wrong.onnx", scheme="int8", allow_larger=True)
    (told,) = report.warnings
    assert told.startswith("The output y has the model's values in 0% of its places.")


def test_an_image_whose_last_bits_differ(tmp_path: Path) -> None:
    """Hardly a value may be the same, and the image is."""
    model = ending_in(tmp_path / "m.onnx", "Cast", to=TensorProto.UINT8)
    report = convert(model, tmp_path / "out.onnx", scheme="int4", allow_larger=True)
    assert report.details["outputs"]["equal"] < 0.6 and not report.warnings
