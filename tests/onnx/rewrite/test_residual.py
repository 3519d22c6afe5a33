"""Sums before norms: with layers on integers, the runtime computes them apart, which is faster, and the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.graphs import node, normal
from support.static_graphs import Converted, net

from quantcli.models.kernels import prove
from quantcli.onnx.graph.save import save_graph

NORM = [node("LayerNormalization", ["s", "gain", "shift"], ["h"], axis=-1)]
SPELLED_OUT = [
    node("ReduceMean", ["s"], ["mean"], axes=[-1]), node("Sub", ["s", "mean"], ["d"]), node("Pow", ["d", "two"], ["q"]),
    node("ReduceMean", ["q"], ["variance"], axes=[-1]), node("Add", ["variance", "tiny"], ["e"]),
    node("Sqrt", ["e"], ["r"]), node("Div", ["d", "r"], ["n"]), node("Mul", ["n", "gain"], ["g"]),
    node("Add", ["g", "shift"], ["h"]),
]  # fmt: skip


def residual(norm: list[onnx.NodeProto]) -> onnx.ModelProto:
    """A product beside which its input is added, normalized, and read by the next."""
    nodes = [
        node("MatMul", ["x", "w"], ["p"]),
        node("Add", ["x", "p"], ["s"]),
        *norm,
        node("MatMul", ["h", "v"], ["y"]),
    ]
    held = {"w": normal(32, 32, seed=1), "v": normal(32, 32, seed=2), "gain": normal(32, seed=3)}
    held |= {"shift": normal(32, seed=4), "tiny": np.array(1e-5, np.float32), "two": np.array(2, np.float32)}
    return net(nodes, inputs={"x": ["n", "m", 32]}, **held)


@pytest.mark.parametrize("norm", [NORM, SPELLED_OUT])
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_no_kernel_takes_both(tmp_path: Path, norm: list[onnx.NodeProto], scheme: str) -> None:
    found = Converted(residual(norm), tmp_path, {"x": normal(2, 5, 32)}, scheme)
    assert found.kernels["LayerNormalization"] == 1 and found.kernels["Sum"] == 1
    assert "SkipLayerNormalization" not in found.kernels and found.sqnr_db() > 30


def test_graphs_of_floats_stay_as_the_runtime_likes_them(tmp_path: Path) -> None:
    found = Converted(residual(NORM), tmp_path, {"x": normal(2, 5, 32)}, "fp16")
    assert "Sum" not in found.kernels


def test_the_runtime_still_has_the_slow_kernel(tmp_path: Path) -> None:
    """Where it no longer makes one operator of both, nothing is to be kept apart."""
    found = Converted(residual(NORM), tmp_path, {"x": normal(2, 5, 32)}, "int8-dynamic")
    for each in found.graph.graph:
        each.op_type = "Add" if each.op_type == "Sum" else each.op_type
    save_graph(found.graph, tmp_path / "fused.onnx")
    assert prove(tmp_path / "fused.onnx").kernels.get("SkipLayerNormalization") == 1
