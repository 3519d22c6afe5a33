"""Inputs with free axes, of graphs whose constants ask for a sum, a product or a part of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import model, node, normal

from quantcli import convert
from quantcli.conversion.onnx.solved_sizes import named_axes, solved
from quantcli.core.ports import Port
from quantcli.errors import InputError

#: Nodes from the inputs to ``y``, the constants, and the inputs' shapes.
Graph = tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, list[str | int | None]]]

_POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}

GRAPHS: dict[str, Graph] = {
    "a sum": (
        [node("Concat", ["x", "z"], ["h"], axis=-1), node("MatMul", ["h", "w"], ["y"])],
        {"w": normal(73, 64)},
        {"x": ["n", "d"], "z": ["n", "e"]},
    ),
    "a product": (
        [node("Conv", ["x", "k"], ["h"]), node("Flatten", ["h"], ["f"]), node("Gemm", ["f", "w"], ["y"])],
        {"k": normal(8, 5, 3, 3), "w": normal(8 * 9 * 11, 16)},
        {"x": [None, None, None, None]},
    ),
    "what pools leave": (
        [
            node("Conv", ["x", "k"], ["c"], pads=[1] * 4),
            node("MaxPool", ["c"], ["p"], **_POOL),
            node("MaxPool", ["p"], ["q"], **_POOL),
            node("Reshape", ["q", "s"], ["f"]),
            node("Gemm", ["f", "w"], ["y"], transB=1),
        ],
        {"k": normal(16, 1, 3, 3), "s": np.array([-1, 16 * 7 * 7]), "w": normal(32, 16 * 7 * 7)},
        {"x": ["n", "c", "h", "w"]},
    ),
    "a part": (
        [node("Reshape", ["x", "s"], ["h"]), node("MatMul", ["h", "w"], ["y"])],
        {"s": np.array([0, 5, 23]), "w": normal(23, 128)},
        {"x": ["n", "d"]},
    ),
    "a part beside what is kept": (
        [
            node("Reshape", ["x", "s"], ["h"]),
            node("Transpose", ["h"], ["t"], perm=[0, 2, 3, 1]),
            node("MatMul", ["t", "w"], ["y"]),
        ],
        {"s": np.array([0, 0, 5, 23]), "w": normal(7, 512)},
        {"x": ["n", "t", "d"]},
    ),
    "two of them": (
        [
            *(node("Flatten", [name], [f"{name}.f"]) for name in ("x", "z")),
            *(node("Gemm", [f"{name}.f", f"{name}.w"], [f"{name}.y"]) for name in ("x", "z")),
            node("Add", ["x.y", "z.y"], ["y"]),
        ],
        {"x.w": normal(3 * 49, 64), "z.w": normal(101, 64)},
        {"x": ["n", 3, "h", "w"], "z": ["n", "t", "u"]},
    ),
}


def saved(tmp_path: Path, graph: Graph) -> Path:
    nodes, held, inputs = graph
    onnx.save(model(nodes, inputs, {"y": None}, held), tmp_path / "m.onnx")  # type: ignore[arg-type]
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_whose_constants_fit_one_choice_of_lengths_is_converted(tmp_path: Path, kind: str) -> None:
    report = convert(saved(tmp_path, GRAPHS[kind]), tmp_path / "o.onnx", scheme="int8")
    assert report.details["outputs"]["made_up"]


def test_lengths_whose_constants_lie_in_another_file_are_found(tmp_path: Path) -> None:
    nodes, held, inputs = GRAPHS["what pools leave"]
    proto = model(nodes, inputs, {"y": None}, held)  # type: ignore[arg-type]
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="all.bin", size_threshold=0)
    assert convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8").details["outputs"]["made_up"]


def test_every_choice_meets_what_is_asked_for() -> None:
    nodes, held, _ = GRAPHS["a sum"]
    free: dict[str, list[str | int | None]] = {"x": [None, None], "z": [None, None]}
    ports = named_axes([Port(name, np.dtype(np.float32), (None, None)) for name in free])
    choices = list(solved(ports, ir.from_proto(model(nodes, free, {"y": None}, held))))  # type: ignore[arg-type]
    assert len(choices) > 1
    assert all(each["x.1"] + each["z.1"] == 73 and each["x.0"] == each["z.0"] == 1 for each in choices)


def test_a_graph_that_no_lengths_fit_is_refused(tmp_path: Path) -> None:
    nodes = [node("Concat", ["x", "x"], ["h"], axis=-1), node("MatMul", ["h", "w"], ["y"])]
    path = saved(tmp_path, (nodes, {"w": normal(73, 64)}, {"x": ["n", "d"]}))
    with pytest.raises(InputError, match="--data"):
        convert(path, tmp_path / "o.onnx", scheme="int8")
