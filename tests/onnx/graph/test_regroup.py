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
