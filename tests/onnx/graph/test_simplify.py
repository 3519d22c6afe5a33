"""Simplifications keep what a graph computes: aliases, bodies, sequences, strings, and nothing grows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.graphs import model, node, normal, opened, operators, prepared, run, same_function

from quantcli.onnx.graph import prepare as steps
from quantcli.onnx.graph.model import constants, open_onnx
from quantcli.onnx.graph.opset import upgrade
from quantcli.onnx.graph.prepare import STEPS, prepare
from quantcli.onnx.graph.save import save_graph

X = {"x": normal(3, 8)}


def info(name: str, shape: list[int | str] | None = None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def kept(proto: onnx.ModelProto, feeds: dict[str, np.ndarray] = X) -> ir.Model:
    """What becomes of a graph, whose outputs are the same in number, names, order and values."""
    after = prepared(proto)
    assert [value.name for value in after.graph.outputs] == [value.name for value in proto.graph.output]
    same_function(proto, feeds, after)
    return after


PRODUCT = node("MatMul", ["x", "w"], ["h"])
WEIGHT = {"w": normal(8, 8)}


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([PRODUCT, node("Identity", ["h"], ["y"])], ["h", "y"]),
        ([PRODUCT, node("Identity", ["h"], ["y"]), node("Identity", ["h"], ["z"])], ["z", "y"]),
        ([PRODUCT, node("Identity", ["h"], ["a"]), node("Identity", ["a"], ["y"]), node("Identity", ["a"], ["z"])],
         ["y", "h", "z"]),
        ([PRODUCT, node("Identity", ["x"], ["y"])], ["y", "h"]),
        ([PRODUCT, node("Identity", ["w"], ["y"])], ["h", "y"]),
        ([PRODUCT, node("Identity", ["h"], ["i"]), node("Relu", ["i"], ["y"])], ["y"]),
    ],
)  # fmt: skip
def test_outputs_that_alias_stay_apart(nodes: list[onnx.NodeProto], outputs: list[str]) -> None:
    kept(model(nodes, {"x": ["n", 8]}, dict.fromkeys(outputs), WEIGHT))


def test_an_identity_that_tells_nothing_apart_goes() -> None:
    nodes = [PRODUCT, node("Identity", ["h"], ["i"]), node("Relu", ["i"], ["r"]), node("Identity", ["r"], ["y"])]
    assert operators(kept(model(nodes, {"x": ["n", 8]}, {"y": None}, WEIGHT))) == {"MatMul": 1, "Relu": 1}


def scan() -> onnx.ModelProto:
    """The state of every step is collected as well."""
    body = helper.make_graph(
        [node("Add", ["s", "xt"], ["a"]), node("MatMul", ["a", "w"], ["z"]), node("Tanh", ["z"], ["s_out"]),
         node("Identity", ["s_out"], ["y_out"])],
        "body", [info("s", ["n", 8]), info("xt", ["n", 8])], [info("s_out", ["n", 8]), info("y_out", ["n", 8])],
    )  # fmt: skip
    nodes = [node("Scan", ["s0", "xs"], ["last", "all"], body=body, num_scan_inputs=1)]
    return model(nodes, {"s0": ["n", 8], "xs": ["t", "n", 8]}, {"all": None, "last": None}, WEIGHT)


def loop() -> onnx.ModelProto:
    """The body hands its state on, and collects it."""
    body = helper.make_graph(
        [node("Identity", ["c"], ["c2"]), node("Add", ["s", "h"], ["s2"]), node("Identity", ["s2"], ["y2"]),
         node("Identity", ["h"], ["z2"])],
        "body", [info("i", [], TensorProto.INT64), info("c", [], TensorProto.BOOL), info("s", ["n", 8])],
        [info("c2", [], TensorProto.BOOL), info("s2", ["n", 8]), info("y2", ["n", 8]), info("z2", ["n", 8])],
    )  # fmt: skip
    nodes = [PRODUCT, node("Loop", ["three", "", "x"], ["y", "z", "u"], body=body)]
    return model(nodes, {"x": ["n", 8]}, {"y": None, "z": None, "u": None}, WEIGHT | {"three": np.int64(3)})


def branches(condition: onnx.NodeProto | None = None) -> onnx.ModelProto:
    """One branch hands an outer value on; with a condition that is constant one branch is all there is."""
    then = helper.make_graph([node("MatMul", ["h", "w"], ["t"])], "then", [], [info("t")])
    otherwise = helper.make_graph([node("Identity", ["h"], ["e"])], "else", [], [info("e")])
    test = [condition] if condition else [node("ReduceSum", ["x"], ["s"], keepdims=0), node("Less", ["s", "o"], ["c"])]
    nodes = [PRODUCT, *test, node("If", ["c"], ["y"], then_branch=then, else_branch=otherwise)]
    return model(nodes, {"x": ["n", 8]}, {"y": None, "h": None}, WEIGHT | {"o": np.float32(0)})


def constant_branches(which: bool) -> onnx.ModelProto:
    return branches(node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(which))))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_branch_may_hand_an_outer_value_on(sign: int) -> None:
    kept(branches(), {"x": sign * np.abs(X["x"])})


@pytest.mark.parametrize("which", [True, False])
def test_a_branch_that_is_always_taken(which: bool) -> None:
    kept(constant_branches(which))


def test_bodies_of_loops_keep_their_outputs_apart() -> None:
    kept(scan(), {"s0": normal(2, 8), "xs": normal(5, 2, 8, seed=1)})
    kept(loop())


@pytest.mark.parametrize(
    ("nodes", "more"),
    [
        ([node("SplitToSequence", ["h", "s"], ["q"], axis=1), node("SequenceAt", ["q", "i"], ["y"])],
         {"s": np.int64(4)}),
        ([node("SplitToSequence", ["h", "s"], ["q"], axis=1), node("SequenceAt", ["q", "i"], ["a"]),
          node("SequenceInsert", ["q", "a"], ["q2"]), node("ConcatFromSequence", ["q2"], ["y"], axis=1)],
         {"s": np.array([3, 5])}),
        ([node("SequenceEmpty", [], ["q0"], dtype=1), node("SequenceInsert", ["q0", "h"], ["q"]),
          node("SequenceInsert", ["q", "x"], ["q1"]), node("SequenceAt", ["q1", "i"], ["y"])], {}),
        ([node("RandomNormal", [], ["z"], shape=[1, 8], seed=1.0), node("Mul", ["z", "none"], ["n"]),
          node("Add", ["h", "n"], ["y"])], {"none": np.float32(0)}),
        ([node("Optional", ["h"], ["q"]), node("OptionalGetElement", ["q"], ["y"])], {}),
        ([node("Optional", ["w"], ["q"]), node("OptionalGetElement", ["q"], ["v"]), node("MatMul", ["h", "v"], ["y"])],
         {}),
    ],
)  # fmt: skip
def test_sequences_optionals_and_nodes_without_inputs(nodes: list[onnx.NodeProto], more: dict[str, np.ndarray]) -> None:
    proto = model([PRODUCT, *nodes], {"x": ["n", 8]}, {"y": None}, WEIGHT | {"i": np.int64(1)} | more, opset=18)
    kept(proto)


def test_what_is_no_tensor_is_an_input_and_an_output() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    proto = model([node("SequenceInsert", ["q", "w"], ["r"])], {}, {}, WEIGHT)
    proto.graph.input.append(helper.make_value_info("q", kind))
    proto.graph.output.append(helper.make_value_info("r", kind))
    source = opened(proto)
    assert "sequence" in str(source.inputs[0]).lower() and source.outputs[0].kind
    (got,) = run(prepare(source), {"q": [X["x"]]}).values()  # type: ignore[dict-item]
    assert len(got) == 2
    np.testing.assert_array_equal(got[1], WEIGHT["w"])


def test_strings_are_left() -> None:
    nodes = [node("StringConcat", ["a", "b"], ["s"]), node("Identity", ["s"], ["y"]), PRODUCT]
    proto = model(nodes, {"x": ["n", 8]}, {"h": None}, WEIGHT, opset=20, ir_version=9)
    proto.graph.output.append(info("y", None, TensorProto.STRING))
    for name in "ab":
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.STRING, [1], [name.encode()]))
    assert run(prepared(proto), X)["y"].tolist() == run(proto, X)["y"].tolist() == ["ab"]


def nbytes(graph: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in constants(graph))


@pytest.mark.parametrize(
    "mask",
    [
        [node("Range", ["zero", "many", "one"], ["r"]), node("Unsqueeze", ["r", "axis"], ["u"]),
         node("Less", ["r", "u"], ["m"]), node("Cast", ["m"], ["mask"], to=1)],
        [node("Expand", ["row", "shape"], ["mask"])],
        [node("Tile", ["row", "times"], ["mask"])],
        [node("ConstantOfShape", ["shape"], ["mask"])],
    ],
)  # fmt: skip
def test_masks_are_not_written_out(mask: list[onnx.NodeProto]) -> None:
    numbers = {
        "zero": np.int64(0), "many": np.int64(512), "one": np.int64(1), "axis": np.array([1]),
        "row": normal(1, 512), "shape": np.array([512, 512]), "times": np.array([512, 1]),
    }  # fmt: skip
    names = {name for each in mask for name in each.input}
    constants_used = {name: value for name, value in numbers.items() if name in names} | {"w": normal(8, 512)}
    nodes = [*mask, node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "mask"], ["y"])]
    proto = model(nodes, {"x": [512, 8]}, {"y": None}, constants_used)
    after = kept(proto, {"x": normal(512, 8)})
    assert nbytes(after) <= nbytes(opened(proto).ir) + 8192


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.bool_])
def test_codes_and_masks_are_not_made_floats(dtype: type) -> None:
    codes = np.arange(64 * 64).reshape(64, 64).astype(dtype)
    nodes = [
        node("Cast", ["q"], ["f"], to=1), node("Mul", ["f", "s"], ["w"]), node("MatMul", ["x", "w"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, {"x": ["n", 64]}, {"y": None}, {"q": codes, "s": np.float32(0.1)})
    assert nbytes(kept(proto, {"x": normal(3, 64)})) == codes.nbytes + 4


def test_a_table_that_is_the_heads_matrix_is_one() -> None:
    table = normal(300, 64)
    nodes = [
        node("Gather", ["e", "ids"], ["h"]), node("Transpose", ["e"], ["t"], perm=[1, 0]),
        node("MatMul", ["h", "t"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, {"ids": ["n"]}, {"y": None}, {"e": table}, dtype=TensorProto.FLOAT)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    after = kept(proto, {"ids": np.array([3, 299, 0])})
    assert nbytes(after) == table.nbytes


def test_a_head_whose_matrix_is_looked_up_in_is_stored_as_a_table() -> None:
    matrix = normal(64, 300)
    nodes = [
        node("Transpose", ["e"], ["t"], perm=[1, 0]), node("Gather", ["t", "ids"], ["h"]),
        node("MatMul", ["h", "e"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, {"ids": ["n"]}, {"y": None}, {"e": matrix})
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    after = kept(proto, {"ids": np.array([3, 299, 0])})
    assert nbytes(after) == matrix.nbytes
    assert next(each for each in after.graph if each.op_type == "Gather").inputs[0].is_initializer()  # type: ignore[union-attr]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_is_left_out(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(graph: ir.Model) -> None:
        graph.graph.outputs.clear()
        raise RuntimeError("no idea of this")

    functions = dict(zip(STEPS, steps._functions(), strict=True)) | {step: failing}
    monkeypatch.setattr(steps, "_functions", lambda: tuple(functions.values()))
    for proto, feeds in ((loop(), X), (constant_branches(True), X)):
        kept(proto, feeds)


@pytest.mark.parametrize(("opset", "newer"), [(17, 17), (11, 13)])
def test_a_map_is_an_output(tmp_path: Path, opset: int, newer: int) -> None:
    """As classifiers of scikit-learn return probabilities."""
    nodes = [PRODUCT, node("ZipMap", ["h"], ["y"], domain="ai.onnx.ml", classlabels_int64s=list(range(8)))]
    proto = model([*nodes, node("MatMul", ["h", "w"], ["z"])], {"x": ["n", 8]}, {"z": None}, WEIGHT, opset=opset)
    proto.opset_import.add(domain="ai.onnx.ml", version=3)
    values = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    proto.graph.output.append(helper.make_value_info("y", helper.make_sequence_type_proto(values)))
    onnx.save(proto, tmp_path / "m.onnx")
    after = upgrade(prepare(open_onnx(tmp_path / "m.onnx")), newer)
    shapes = {value.name: value.shape for each in after.graph for value in each.outputs}
    assert shapes["z"] is not None, "the rest is inferred all the same"
    save_graph(after, tmp_path / "after.onnx")
    saved = onnx.load(tmp_path / "after.onnx")
    onnx.checker.check_model(saved)
    assert saved.graph.output[1] == proto.graph.output[1] and saved.opset_import[0].version == newer
    expected, got = run(proto, X), run(after, X)
    assert list(got) == ["z", "y"]
    assert [list(row) for row in got["y"]] == [list(row) for row in expected["y"]]


@pytest.mark.parametrize("coordinates", [False, True])
def test_sparse_constants_are_written_out(tmp_path: Path, coordinates: bool) -> None:
    """As initializers and in Constant nodes, of a body, too."""
    dense = np.where(normal(8, 8) > 1, normal(8, 8, seed=1), np.float32(0))
    places = np.argwhere(dense) if coordinates else np.flatnonzero(dense)
    values, indices = numpy_helper.from_array(dense[dense != 0], "w"), numpy_helper.from_array(places)
    sparse = helper.make_sparse_tensor(values, indices, [8, 8])
    body = [helper.make_node("Constant", [], ["v"], sparse_value=sparse), node("MatMul", ["a", "v"], ["b"])]
    branch = helper.make_graph(body, "then", [], [info("b")])
    other = helper.make_graph([node("Neg", ["a"], ["c"])], "else", [], [info("c")])
    choice = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other)
    proto = model([node("MatMul", ["x", "w"], ["a"]), choice], {"x": ["n", 8]}, {"y": None}, {"yes": np.array(True)})
    proto.graph.sparse_initializer.append(sparse)
    onnx.save(proto, tmp_path / "m.onnx")
    found = run(prepare(open_onnx(tmp_path / "m.onnx")), X)["y"]
    np.testing.assert_allclose(found, X["x"] @ dense @ dense, rtol=1e-4, atol=1e-5)
