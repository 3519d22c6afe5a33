"""Inputs that leave every axis open, of graphs whose constants ask for a length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.graphs import model, node, normal

from quantcli import convert
from quantcli.models.session import Session

#: Nodes from ``x`` to ``y``, the constants, and what ``x`` has to be.
GRAPHS = {
    "product": ([node("Relu", ["x"], ["h"]), node("MatMul", ["h", "w"], ["y"])], {"w": normal(73, 96)}, (3, 73)),
    "left": ([node("MatMul", ["w", "x"], ["y"])], {"w": normal(96, 73)}, (73, 5)),
    "gemm": ([node("Gemm", ["x", "w"], ["y"], transA=1, transB=1)], {"w": normal(96, 73)}, (73, 5)),
    "turned": (
        [node("Transpose", ["x"], ["h"], perm=[0, 2, 1]), node("MatMul", ["h", "w"], ["y"])],
        {"w": normal(73, 96)},
        (2, 73, 9),
    ),
    "scaled": (
        [node("Mul", ["x", "s"], ["h"]), node("Conv", ["h", "w"], ["y"], group=2)],
        {"s": normal(73), "w": normal(96, 11, 1, 5)},
        (1, 22, 8, 73),
    ),
    "recurrent": (
        [node("LSTM", ["x", "w", "r"], ["y"], hidden_size=24)],
        {"w": normal(1, 96, 73), "r": normal(1, 96, 24)},
        (6, 2, 73),
    ),
}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("named", [True, False])
def test_a_length_that_a_constant_asks_for_is_made_up(tmp_path: Path, kind: str, named: bool) -> None:
    nodes, held, shape = GRAPHS[kind]
    free = [f"d{axis}" if named else None for axis in range(len(shape))]
    proto = model(nodes, {"x": free}, {"y": None}, held)  # type: ignore[dict-item]
    onnx.save(proto, tmp_path / "m.onnx")
    report = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8")
    assert report.details["outputs"]["made_up"]
    x = {"x": normal(*shape, seed=3)}
    expected, got = (next(iter(Session(tmp_path / name).run(x).values())) for name in ("m.onnx", "o.onnx"))
    assert np.square(expected - got).sum() / np.square(expected).sum() < 1e-3


def test_a_length_that_two_inputs_share_is_that_of_both(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Concat", ["x", "z", "h"], ["y"], axis=1)]
    proto = model(nodes, {"x": ["n", "d"], "z": ["n", "d"]}, {"y": None}, {"w": normal(73, 96)})
    onnx.save(proto, tmp_path / "m.onnx")
    assert convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8").details["outputs"]["made_up"]
