"""What a value reaches through bodies: the way must not end at their borders, nor begin where nothing goes."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from quantcli.onnx.graph.flow import Flow


def value(name: str, shape: list[int] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def flag(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.BOOL, [])


def model(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[str]) -> ir.Model:
    graph = helper.make_graph(nodes, "graph", inputs, [value(name) for name in outputs])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


def meets(found: ir.Model, start: str, operator: str) -> bool:
    graphs = list(found.graphs())
    values = [each for graph in graphs for each in (*graph.inputs, *(v for node in graph for v in node.outputs))]
    first = next(each for each in values if each.name == start)
    return Flow(found).meets([first], lambda node: node.op_type == operator)


def loop(condition: str = "more") -> ir.Model:
    """Two states that a body hands on: ``a`` to ``b`` in one turn, and ``b`` out; ``c`` stays alone."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", [condition], ["again"]),
            helper.make_node("Neg", ["c"], ["c_out"]),
            helper.make_node("Abs", ["a"], ["b_out"]),
            helper.make_node("Neg", ["b"], ["a_out"]),
            helper.make_node("Cast", ["b"], ["b_flag"], to=TensorProto.BOOL),
            helper.make_node("Relu", ["b"], ["row"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            flag("more"),
            value("a"),
            value("b"),
            value("c"),
        ],
        [flag("again"), value("a_out"), value("b_out"), value("c_out"), value("row")],
    )
    nodes = [
        helper.make_node("Loop", ["count", "first", "x", "y", "z"], ["ya", "yb", "yc", "rows"], body=body),
        helper.make_node("Floor", ["ya"], ["fa"]),
        helper.make_node("Ceil", ["yb"], ["fb"]),
        helper.make_node("Round", ["yc"], ["fc"]),
        helper.make_node("Sign", ["rows"], ["fr"]),
    ]
    count = helper.make_tensor_value_info("count", TensorProto.INT64, [])
    return model(nodes, [count, flag("first"), *map(value, "xyz")], ["fa", "fb", "fc", "fr"])


@pytest.mark.parametrize(
    ("start", "reached"),
    [
        # From one turn to the next: a -> b, b -> a.
        ("x", {"Floor", "Ceil", "Sign"}),
        ("b", {"Floor", "Ceil", "Sign"}),
        ("z", {"Round"}),
        ("c", {"Round"}),
        ("row", {"Sign"}),
    ],
)
def test_the_turns_of_a_loop(start: str, reached: set[str]) -> None:
    found = loop()
    assert {name for name in ("Floor", "Ceil", "Round", "Sign") if meets(found, start, name)} == reached


def test_what_says_how_often_a_loop_turns() -> None:
    assert not meets(loop(), "x", "NonZero")
    assert meets(loop("b_flag"), "x", "NonZero")
    assert meets(loop(), "count", "NonZero")
    assert meets(loop(), "first", "NonZero")


@pytest.mark.parametrize(
    ("start", "reached"), [("s_out", {"Floor", "Ceil"}), ("row", {"Ceil"}), ("part", {"Floor", "Ceil"}), ("p", set())]
)
def test_the_turns_of_a_scan(start: str, reached: set[str]) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["s", "part"], ["s_out"]),
            helper.make_node("Abs", ["s"], ["row"]),
            helper.make_node("Neg", ["part"], ["p"]),
        ],
        "body",
        [value("s"), value("part")],
        [value("s_out"), value("row")],
    )
    nodes = [
        helper.make_node("Scan", ["x", "parts"], ["last", "rows"], body=body, num_scan_inputs=1),
        helper.make_node("Floor", ["last"], ["fl"]),
        helper.make_node("Ceil", ["rows"], ["fr"]),
    ]
    found = model(nodes, [value("x"), value("parts")], ["fl", "fr"])
    assert {name for name in ("Floor", "Ceil") if meets(found, start, name)} == reached


def test_a_branch_and_what_chooses_it() -> None:
    def branch(name: str, operator: str, source: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(operator, [source], [name]), helper.make_node("Neg", [name], [f"{name}_y"])],
            name,
            [],
            [value(f"{name}_y")],
        )

    node = helper.make_node(
        "If", ["chosen"], ["y"], then_branch=branch("then", "Abs", "x"), else_branch=branch("else", "Relu", "other")
    )
    found = model([node, helper.make_node("Floor", ["y"], ["z"])], [flag("chosen"), value("x"), value("other")], ["z"])
    assert meets(found, "x", "Floor")
    assert meets(found, "then", "Floor")
    assert not meets(found, "x", "Relu")
    assert not meets(found, "x", "NonZero")
    assert meets(found, "chosen", "NonZero")
