"""Constants that are cut up and put together otherwise are computed once, where that makes nothing larger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.graphs import model, node, normal, operators, prepared, same_function

from quantcli import convert

BOUNDS = {f"at{row}": np.array([row]) for row in (0, 48, 96, 144, 192)} | {"axis": np.array([0])}


def gates(weight: str, order: tuple[int, ...]) -> list[onnx.NodeProto]:
    """As torch's exporter writes what another order of gates takes."""
    cut = [
        node("Slice", [weight, f"at{48 * gate}", f"at{48 * gate + 48}", "axis"], [f"{weight}{gate}"]) for gate in order
    ]
    joined = node("Concat", [f"{weight}{gate}" for gate in order], [f"{weight}_joined"], axis=0)
    return [*cut, joined, node("Unsqueeze", [f"{weight}_joined", "axis"], [f"{weight}_gates"])]


def lstm() -> onnx.ModelProto:
    nodes = [*gates("w", (0, 3, 1, 2)), *gates("r", (0, 3, 1, 2))]
    nodes.append(node("LSTM", ["x", "w_gates", "r_gates"], ["", "y"], hidden_size=48))
    weights = {"w": normal(192, 64, scale=0.1), "r": normal(192, 48, seed=1, scale=0.1)}
    return model(nodes, {"x": ["t", "n", 64]}, {"y": None}, weights | BOUNDS)


def test_gates_in_another_order_are_one_weight() -> None:
    graph = prepared(lstm())
    assert operators(graph) == {"LSTM": 1}
    same_function(lstm(), {"x": normal(5, 2, 64)}, graph)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "fp16"])
def test_they_are_quantized(tmp_path: Path, scheme: str) -> None:
    onnx.save(lstm(), tmp_path / "m.onnx")
    report = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme=scheme)
    assert report.models[1].metrics["size_ratio"] < (0.55 if scheme == "fp16" else 0.32)
    assert report.details["outputs"]["sqnr_db"] > 30


def test_pieces_that_overlap_stay_pieces() -> None:
    """Windows of a table would be many times as large as the table."""
    nodes = [
        node("Slice", ["w", f"at{start}", "at192", "axis"], [f"p{start}"]) for start in (0, 48, 96)
    ] + [node("MatMul", ["x", "p0"], ["a"]), node("MatMul", ["z", "p48"], ["b"]), node("Add", ["a", "b"], ["c"]),
         node("MatMul", ["v", "p96"], ["d"]), node("Add", ["c", "d"], ["y"])]  # fmt: skip
    inputs = {"x": ["n", 192], "z": ["n", 144], "v": ["n", 96]}
    proto = model(nodes, inputs, {"y": None}, {"w": normal(192, 64)} | BOUNDS)
    graph = prepared(proto)
    assert operators(graph)["Slice"] == 3
    same_function(proto, {"x": normal(2, 192), "z": normal(2, 144), "v": normal(2, 96)}, graph)


def branched(*, shared_names: bool) -> onnx.ModelProto:
    """An LSTM in each branch of an If, the weights of both cut out of one."""
    branches = {}
    for name, directed in (("then_branch", "forward"), ("else_branch", "reverse")):
        infix = "" if shared_names else name
        nodes = [*gates("w", (0, 3, 1, 2)), *gates("r", (0, 3, 1, 2))]
        nodes.append(node("LSTM", ["x", "w_gates", "r_gates"], ["", "h"], hidden_size=48, direction=directed))
        for each in nodes:
            for names in (each.input, each.output):
                names[:] = [f"{v}{infix}" if v and v not in ("x", "w", "r") else v for v in names]
        bounds = [onnx.numpy_helper.from_array(values, f"{key}{infix}") for key, values in BOUNDS.items()]
        output = onnx.helper.make_tensor_value_info(f"h{infix}", onnx.TensorProto.FLOAT, None)
        branches[name] = onnx.helper.make_graph(nodes, name, [], [output], bounds)
    weights = {"w": normal(192, 64, scale=0.1), "r": normal(192, 48, seed=1, scale=0.1), "zero": np.float32(0)}
    nodes = [
        node("ReduceMean", ["x"], ["mean"], keepdims=0),
        node("Greater", ["mean", "zero"], ["is_high"]),
        node("If", ["is_high"], ["y"], **branches),
    ]
    return model(nodes, {"x": ["t", "n", 64]}, {"y": None}, weights)


@pytest.mark.parametrize("shared_names", [False, True])
def test_both_branches_of_an_if_read_one_weight_in_another_order(shared_names: bool) -> None:
    proto = branched(shared_names=shared_names)
    graph = prepared(proto)
    bodies = [attribute.as_graph() for each in graph.graph for attribute in each.attributes.values()
              if attribute.type.name == "GRAPH"]  # fmt: skip
    assert [[each.op_type for each in body] for body in bodies] == [["LSTM"], ["LSTM"]]
    large = [value for each in graph.graphs() for value in each.initializers.values() if value.const_value.size > 1000]
    assert sorted(list(value.shape) for value in large) == [[1, 192, 48], [1, 192, 64]]
    for shift in (-1, 1):
        same_function(proto, {"x": normal(5, 2, 64) + np.float32(shift)}, graph)


def test_weights_of_both_branches_are_quantized(tmp_path: Path) -> None:
    onnx.save(branched(shared_names=True), tmp_path / "m.onnx")
    report = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8-dynamic")
    assert report.models[1].metrics["size_ratio"] < 0.35


def test_a_branch_that_is_never_taken_reads_no_weight() -> None:
    """Of an If whose condition is known the folder leaves one branch; the other's nodes are in no graph any more."""
    whole = lstm()
    cut = [node("Slice", ["w", "at0", "at48", "axis"], ["other"]), node("Identity", ["other"], ["never"])]
    shown = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("never", "always")]
    branches = {
        "then_branch": onnx.helper.make_graph(cut, "then_branch", [], shown[:1]),
        "else_branch": onnx.helper.make_graph([node("Identity", ["x"], ["always"])], "else_branch", [], shown[1:]),
    }
    whole.graph.initializer.append(onnx.numpy_helper.from_array(np.array(False), "known"))
    whole.graph.node.append(node("If", ["known"], ["z"], **branches))
    whole.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    graph = prepared(whole)
    assert set(operators(graph)) == {"LSTM", "Identity"}
    same_function(whole, {"x": normal(5, 2, 64)}, graph)


def test_layers_of_one_stacked_weight(tmp_path: Path) -> None:
    """As exporters write layers whose weights lie in one array: each takes its own by a lookup, a slice or a split."""
    nodes = [
        node("Gather", ["w", "first"], ["w0"]), node("MatMul", ["x", "w0"], ["a"]),
        node("Slice", ["w", "one", "two", "axis"], ["s"]), node("Squeeze", ["s", "axis"], ["w1"]),
        node("MatMul", ["a", "w1"], ["b"]), node("Gather", ["w", "last"], ["g"]),
        node("Reshape", ["g", "shape"], ["w2"]), node("MatMul", ["b", "w2"], ["y"]),
    ]  # fmt: skip
    held = {"first": np.array(0), "last": np.array([-1]), "one": np.array([1]), "two": np.array([2])}
    held |= {"axis": np.array([0]), "shape": np.array([64, 64]), "w": normal(3, 64, 64, scale=0.1)}
    proto = model(nodes, {"x": ["n", 64]}, {"y": None}, held)
    graph = prepared(proto)
    assert operators(graph) == {"MatMul": 3}
    same_function(proto, {"x": normal(2, 64)}, graph)
