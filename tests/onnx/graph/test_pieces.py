"""Graphs cut into pieces: where, and what goes with each."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper
from support.graphs import model, node, normal

from quantcli.onnx.graph.pieces import Piece, cut, piece_of

#: A matrix of 8 x 8 float32 values.
MATRIX = 256


def chain(count: int, **more: Any) -> onnx.ModelProto:
    """Products one after the other, each with an Add behind it that makes one value of two."""
    nodes, constants = [], dict(more)
    for layer in range(count):
        before = f"y{layer - 1}" if layer else "x"
        nodes.append(node("MatMul", [before, f"w{layer}"], [f"p{layer}"]))
        nodes.append(node("Add", [f"p{layer}", before], [f"y{layer}"]))
        constants[f"w{layer}"] = normal(8, 8, seed=layer)
    return model(nodes, {"x": ["n", 8]}, {f"y{count - 1}": ["n", 8]}, constants)


def kinds(proto: onnx.ModelProto, pieces: list[Piece]) -> list[list[str]]:
    return [[proto.graph.node[index].op_type for index in piece.nodes] for piece in pieces]


def test_pieces_hold_no_more_than_they_may() -> None:
    proto = chain(6)
    for limit, count in ((MATRIX, 6), (2 * MATRIX, 3), (6 * MATRIX, 1), (1 << 40, 1)):
        pieces = cut(proto.graph, limit)
        assert len(pieces) == count and all(piece.nbytes <= limit for piece in pieces)
        assert [index for piece in pieces for index in piece.nodes] == list(range(12))


def test_the_cut_is_where_least_is_handed_on() -> None:
    """Behind the Add, not between it and its product, though the weight would let it stand there."""
    proto = chain(4)
    assert kinds(proto, cut(proto.graph, MATRIX)) == [["MatMul", "Add"]] * 4
    first, second, *_ = cut(proto.graph, MATRIX)
    assert (first.inputs, first.outputs, first.constants) == (("x",), ("y0",), ("w0",))
    assert (second.inputs, second.outputs, second.constants) == (("y0",), ("y1",), ("w1",))


def test_a_weight_that_is_too_large_is_a_piece_by_itself() -> None:
    sizes = [piece.nbytes for piece in cut(chain(3).graph, 1)]
    assert sizes == [MATRIX] * 3


def test_what_constants_lead_to_goes_with_its_readers() -> None:
    """Decoded at the head of the graph, as `Cast` and `Mul` make weights: with the floats that they become."""
    nodes, constants = [], {"scale": np.float32(0.1)}
    for layer in range(2):
        nodes.append(node("Cast", [f"codes{layer}"], [f"cast{layer}"], to=onnx.TensorProto.FLOAT))
        nodes.append(node("Mul", [f"cast{layer}", "scale"], [f"w{layer}"]))
        constants[f"codes{layer}"] = np.ones((8, 8), np.int8)
    nodes += [node("MatMul", ["x", "w0"], ["h"]), node("MatMul", ["h", "w1"], ["y"])]
    proto = model(nodes, {"x": ["n", 8]}, {"y": None}, constants)
    pieces = cut(proto.graph, 1)
    assert kinds(proto, pieces) == [["Cast", "Mul", "MatMul"]] * 2
    assert [set(piece.constants) for piece in pieces] == [{"codes0", "scale"}, {"codes1", "scale"}]
    # Bytes of codes and floats of 64 values; of the scale, too.
    assert [piece.nbytes for piece in pieces] == [64 * 5 + 8] * 2
    # Where a decoded weight is an output of the model, one piece returns it, and the other is given it.
    proto.graph.output.append(onnx.ValueInfoProto(name="w1"))
    made = [piece for piece in cut(proto.graph, 1) if "w1" in piece.outputs]
    assert len(made) == 1


def test_what_is_drawn_is_drawn_once() -> None:
    nodes = [
        node("RandomNormalLike", ["w0"], ["r"]), node("MatMul", ["x", "w0"], ["a"]), node("Add", ["a", "r"], ["b"]),
        node("MatMul", ["b", "w1"], ["c"]), node("Add", ["c", "r"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, {"x": [8, 8]}, {"y": None}, {f"w{layer}": normal(8, 8) for layer in range(2)})
    pieces = cut(proto.graph, 1)
    assert len(pieces) > 1 and sum(0 in piece.nodes for piece in pieces) == 1
    assert "r" in pieces[-1].inputs


def test_bodies_read_what_is_around_them() -> None:
    def body(name: str, weight: str) -> onnx.GraphProto:
        nodes = [helper.make_node("MatMul", ["h", weight], [f"{name}_y"])]
        output = helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [output])

    branches = {"then_branch": body("then", "w1"), "else_branch": body("else", "w2")}
    nodes = [node("MatMul", ["x", "w0"], ["h"]), node("If", ["flag"], ["y"], **branches)]
    constants = {f"w{each}": normal(8, 8) for each in range(3)} | {"flag": np.array(True)}
    pieces = cut(model(nodes, {"x": ["n", 8]}, {"y": None}, constants).graph, 1)
    assert [piece.outputs for piece in pieces] == [("h",), ("y",)]
    assert pieces[1].inputs == ("h",) and set(pieces[1].constants) == {"flag", "w1", "w2"}


def test_no_sequence_is_handed_on() -> None:
    nodes = [
        node("SequenceConstruct", ["x"], ["s"]), node("MatMul", ["x", "w0"], ["a"]), node("MatMul", ["a", "w1"], ["b"]),
        node("SequenceInsert", ["s", "b"], ["t"]), node("ConcatFromSequence", ["t"], ["c"], axis=0),
        node("MatMul", ["c", "w2"], ["y"]),
    ]  # fmt: skip
    graph = model(nodes, {"x": ["n", 8]}, {"y": None}, {f"w{each}": normal(8, 8) for each in range(3)}).graph
    assert [piece.outputs for piece in cut(graph, 1, {"s", "t"})] == [("c",), ("y",)]


def test_what_becomes_one_kernel_stays_together() -> None:
    """Codes are handed on, and never what lies between a product and the conversions around it."""
    nodes, constants = [], {"scale": np.float32(0.1), "zero": np.uint8(128)}
    for layer in range(3):
        before = f"q{layer - 1}" if layer else "x"
        nodes += [
            node("DequantizeLinear", [before, "scale", "zero"], [f"d{layer}"]),
            node("MatMul", [f"d{layer}", f"w{layer}"], [f"p{layer}"]),
            node("QuantizeLinear", [f"p{layer}", "scale", "zero"], [f"q{layer}"]),
        ]
        constants[f"w{layer}"] = normal(8, 8, seed=layer)
    proto = model(nodes, {"x": ["n", 8]}, {"q2": None}, constants, dtype=onnx.TensorProto.UINT8)
    pieces = cut(proto.graph, MATRIX)
    assert kinds(proto, pieces) == [["DequantizeLinear", "MatMul", "QuantizeLinear"]] * 3
    assert [piece.outputs for piece in pieces] == [("q0",), ("q1",), ("q2",)]


def test_a_piece_is_a_model_of_its_own() -> None:
    proto = chain(2)
    last = cut(proto.graph, 1)[-1]
    part = piece_of(proto, last, {"y0": helper.make_tensor_value_info("y0", onnx.TensorProto.FLOAT, ["n", 8])})
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(part))
    assert [port.name for port in part.graph.input] == ["y0"]
    assert [tensor.name for tensor in part.graph.initializer] == ["w1"]
