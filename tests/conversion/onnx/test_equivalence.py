"""What is built upon was seen to compute the same: simplifications and upgrades that do not are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from support.graphs import model, node, normal, operators, run, same_function

from quantcli import convert
from quantcli.conversion.onnx import equivalence
from quantcli.conversion.onnx.equivalence import simplified, upgraded
from quantcli.errors import InputError
from quantcli.models.session import Session, session_of_lean
from quantcli.onnx.graph import model as graph_model
from quantcli.onnx.graph import prepare as steps
from quantcli.onnx.graph.external import LARGE_BYTES
from quantcli.onnx.graph.model import from_message, open_onnx
from quantcli.onnx.graph.prepare import STEPS
from quantcli.onnx.graph.save import lean, save_graph


def saved(proto: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    return path


def rows(op: str, axis: int | None, shape: list[int | str], opset: int) -> onnx.ModelProto:
    attributes = {} if axis is None else {"axis": axis}
    nodes = [node("MatMul", ["x", "w"], ["a"]), node(op, ["a"], ["p"], **attributes), node("MatMul", ["p", "v"], ["y"])]
    ir_version = 3 + (opset > 8) + (opset > 9) + (opset > 10)
    proto = model(nodes, {"x": shape}, {"y": None}, {"w": normal(8, 96), "v": normal(96, 96, seed=1)}, opset=opset)
    proto.ir_version = max(4, ir_version)
    return proto


@pytest.mark.parametrize("op", ["Hardmax", "Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("axis", "rank"), [(None, 3), (1, 3), (2, 3), (0, 3), (None, 2), (2, 4), (1, 4)])
@pytest.mark.parametrize("opset", [7, 11])
def test_what_flattens_below_operator_set_13_flattens_above(
    op: str, axis: int | None, rank: int, opset: int, tmp_path: Path
) -> None:
    middle = [3, 5, 8][: rank - 2]
    proto = rows(op, axis, ["n", *middle, 8], opset)
    after = upgraded(simplified(open_onnx(saved(proto, tmp_path))), 13)
    assert after.opset_imports[""] == 13
    for batch in (1, 4):
        same_function(proto, {"x": normal(batch, *middle, 8)}, after)


def test_an_input_of_unknown_rank_is_flattened(tmp_path: Path) -> None:
    proto = rows("Hardmax", 1, ["n", 3, 8], 11)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    from quantcli.onnx.graph.opset import upgrade

    after = upgrade(simplified(open_onnx(saved(proto, tmp_path))), 13)
    for shape in ((4, 3, 8), (2, 8), (2, 3, 2, 8)):
        same_function(proto, {"x": normal(*shape)}, after)


def old_net(opset: int) -> onnx.ModelProto:
    """What exporters of 2018 wrote: attributes where inputs are now, and initializers that are inputs."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "g", "b", "b", "g"], ["n"]),
        node("Clip", ["n"], ["k"], min=0.0, max=6.0), node("Dropout", ["k"], ["d"], ratio=0.5),
        node("MaxPool", ["d"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Pad", ["m"], ["p"], pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="constant", value=0.0),
        node("GlobalAveragePool", ["p"], ["a"]), node("Squeeze", ["a"], ["s"], axes=[2, 3]),
        node("Gemm", ["s", "v", "o"], ["h"]),
        node("Slice", ["h"], ["l"], axes=[1], starts=[0], ends=[8]) if opset < 10
        else node("Slice", ["h", "start", "end", "axis"], ["l"]),
        node("Softmax", ["l"], ["y"]),
    ]  # fmt: skip
    constants = {
        "w": normal(32, 3, 3, 3), "g": np.abs(normal(32)) + 1, "b": normal(32, seed=2), "v": normal(32, 64),
        "o": normal(64), "start": np.array([0]), "end": np.array([8]), "axis": np.array([1]),
    }  # fmt: skip
    inputs = {"x": ["n", 3, 8, 8], **{name: list(value.shape) for name, value in constants.items()}}
    proto = model(nodes, inputs, {"y": None}, constants, opset=opset, ir_version=3)
    for value in proto.graph.input:
        if value.name in ("start", "end", "axis"):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT64
    return proto


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
@pytest.mark.parametrize("scheme", ["fp16", "int8", "int8-dynamic"])
def test_old_operator_sets_are_read_and_converted(opset: int, scheme: str, tmp_path: Path) -> None:
    proto = old_net(opset)
    source, target = saved(proto, tmp_path), tmp_path / "q.onnx"
    convert(source, output=target, scheme=scheme)
    x = normal(4, 3, 8, 8)
    expected, got = (Session(path).run({"x": x})["y"] for path in (source, target))
    noise = float(np.square(expected - got).sum() / np.square(expected).sum())
    assert noise < 1e-2


def test_a_step_that_changes_a_result_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = rows("Softmax", -1, ["n", 8], 17)

    def wrong(graph: ir.Model) -> None:
        for each in graph.graph:
            if each.op_type == "Softmax":
                each.attributes.add(ir.AttrInt64("axis", 0))

    functions = dict(zip(STEPS, steps._functions(), strict=True)) | {"turn weights": wrong}
    monkeypatch.setattr(steps, "_functions", lambda: tuple(functions.values()))
    same_function(proto, {"x": normal(4, 8)}, simplified(open_onnx(saved(proto, tmp_path))))


def test_an_upgrade_that_changes_a_result_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the scheme needs it, it is refused; where only some layers do, those stay as they are."""
    proto = rows("Softmax", 2, ["n", 3, 8], 11)

    def wrong(graph: ir.Model, opset: int) -> ir.Model:
        other = graph.clone()
        other.opset_imports[""] = opset
        next(each for each in other.graph if each.op_type == "Softmax").attributes.add(ir.AttrInt64("axis", 1))
        return other

    monkeypatch.setattr(equivalence, "upgrade", wrong)
    monkeypatch.setattr(equivalence, "restamp", wrong)
    path = saved(proto, tmp_path)
    with pytest.raises(InputError, match="operator set 11 cannot be upgraded to 13"):
        upgraded(simplified(open_onnx(path)), 13)
    with pytest.raises(InputError, match="int8-dynamic takes a newer operator set"):
        convert(path, output=tmp_path / "q.onnx", scheme="int8-dynamic")
    convert(path, output=tmp_path / "q.onnx", scheme="int8")
    x = {"x": normal(4, 3, 8)}
    np.testing.assert_allclose(Session(tmp_path / "q.onnx").run(x)["y"], Session(path).run(x)["y"], rtol=0.1, atol=0.1)


def test_random_numbers_are_no_difference(tmp_path: Path) -> None:
    nodes = [node("RandomNormalLike", ["x"], ["z"]), node("Add", ["x", "z"], ["h"]), node("MatMul", ["h", "w"], ["y"])]
    proto = model(
        [*nodes, node("Identity", ["y"], ["v"])], {"x": ["n", 8]}, {"y": None, "v": None}, {"w": normal(8, 8)}
    )
    assert operators(simplified(open_onnx(saved(proto, tmp_path)))).keys() >= {"RandomNormalLike", "MatMul"}


def test_a_graph_of_other_domains_alone_has_no_old_operator_set(tmp_path: Path) -> None:
    proto = model([helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0], scale=[2.0])],
                  {"x": ["n", 1]}, {"y": ["n", 1]}, domains={"ai.onnx.ml": 1})  # fmt: skip
    del proto.opset_import[0]
    opened = open_onnx(saved(proto, tmp_path))
    assert opened.opset == 0
    graph = upgraded(simplified(opened), 13)
    assert graph.opset_imports[""] == 13
    np.testing.assert_array_equal(run(graph, {"x": normal(3, 1)})["y"], run(proto, {"x": normal(3, 1)})["y"])


def test_large_weights_are_run_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a model is, its simplification is compared: neither copied nor written."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]), node("Softmax", ["a"], ["p"], axis=-1), node("MatMul", ["p", "v"], ["y"]),
    ]  # fmt: skip
    weights = {"w": normal(8, 600), "v": normal(600, 600, seed=1)}
    proto = model(nodes, {"x": ["n", 8]}, {"y": None}, weights)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    found = lean(open_onnx(path).ir)
    assert (found.proto.ByteSize() < 100_000, found.weights, found.folder) == (True, {}, tmp_path)
    x = {"x": normal(4, 8)}
    got = session_of_lean(found, optimize=False).run(x)["y"]
    np.testing.assert_allclose(got, Session(path, optimize=False).run(x)["y"], atol=1e-5)

    def wrong(graph: ir.Model) -> None:
        for each in graph.graph:
            if each.op_type == "Softmax":
                each.attributes.add(ir.AttrInt64("axis", 0))

    functions = dict(zip(STEPS, steps._functions(), strict=True)) | {"turn weights": wrong}
    monkeypatch.setattr(steps, "_functions", lambda: tuple(functions.values()))
    save_graph(simplified(open_onnx(path)), tmp_path / "after.onnx")
    np.testing.assert_allclose(Session(tmp_path / "after.onnx").run(x)["y"], got, atol=1e-5)


def test_a_branch_that_all_ones_do_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are ones and, beside them, zeros and ones: a step that forgets what zeros do is seen."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]), node("Where", ["m", "a", "other"], ["p"]), node("MatMul", ["p", "v"], ["y"]),
    ]  # fmt: skip
    weights = {"w": normal(8, 96), "v": normal(96, 96, seed=1), "other": np.float32(7)}
    proto = model(nodes, {"x": ["n", 8], "m": ["n", 96]}, {"y": None}, weights)
    proto.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.BOOL

    def wrong(graph: ir.Model) -> None:
        for each in graph.graph:
            if each.op_type == "Where":
                each.replace_input_with(2, each.inputs[1])

    functions = dict(zip(STEPS, steps._functions(), strict=True)) | {"turn weights": wrong}
    monkeypatch.setattr(steps, "_functions", lambda: tuple(functions.values()))
    graph = simplified(open_onnx(saved(proto, tmp_path)))
    same_function(proto, {"x": normal(4, 8), "m": normal(4, 96) > 0}, graph)


@pytest.mark.parametrize("kind", ["sequence", "optional"])
def test_sequences_and_optionals_are_made_up(tmp_path: Path, kind: str) -> None:
    if kind == "sequence":
        nodes = [node("ConcatFromSequence", ["x"], ["h"], axis=0)]
        taken = helper.make_tensor_sequence_value_info("x", onnx.TensorProto.FLOAT, None)
    else:
        tensor = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, ["n", 16])
        nodes = [node("OptionalGetElement", ["x"], ["h"])]
        taken = helper.make_value_info("x", helper.make_optional_type_proto(tensor))
    proto = model([*nodes, node("MatMul", ["h", "w"], ["y"])], {}, {"y": None}, {"w": normal(16, 96)}, opset=18)
    proto.graph.input.append(taken)
    report = convert(saved(proto, tmp_path), output=tmp_path / "q.onnx", scheme="int8")
    assert report.details["outputs"]["sqnr_db"] > 30


def test_large_weights_inside_a_file_are_given_to_the_runtime(tmp_path: Path) -> None:
    """They are not looked for in files, of which there are none."""
    weight = normal(8, LARGE_BYTES // 32 + 1)
    path = saved(model([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 8]}, {"y": None}, {"w": weight}), tmp_path)
    found = lean(open_onnx(path).ir)
    assert (found.proto.ByteSize() < 100_000, list(found.weights), found.folder) == (True, ["w"], None)
    np.testing.assert_array_equal(found.weights["w"].numpy(), weight)
    assert convert(path, tmp_path / "o.onnx", scheme="int8").details["verified"]["codes"] == "equal"


def test_a_default_whose_shapes_the_runtime_stumbles_over_stays_an_input(tmp_path: Path) -> None:
    """A Range is given a list of one number: the runtime notices where it can compute that before it runs."""
    nodes = [node("Gather", ["size", "first"], ["end"]), node("Range", ["start", "end", "step"], ["rows"])]
    nodes += [node("Cast", ["rows"], ["places"], to=onnx.TensorProto.FLOAT), node("MatMul", ["x", "w"], ["a"])]
    nodes += [node("Add", ["a", "places"], ["y"])]
    numbers = {"size": np.array([1200, 5]), "first": np.array([0]), "start": np.array(0), "step": np.array(1)}
    proto = model(nodes, {"x": ["n", 64]}, {"y": None}, {"w": normal(64, 1200), **numbers})
    proto.graph.input.append(helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [2]))
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [64, 1200]))

    convert(saved(proto, tmp_path), tmp_path / "q.onnx", scheme="int8", allow_larger=True)

    written = onnx.load(tmp_path / "q.onnx")
    assert [entry.name for entry in written.graph.input] == ["x", "size"]
    assert "MatMulNBits" in [each.op_type for each in written.graph.node]


def test_a_graph_that_is_read_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact of it would differ from the model, and so would its decoded form: the error would look explained."""
    proto = rows("Softmax", -1, ["n", 8], 17)
    path = saved(proto, tmp_path)

    def misread(read: onnx.ModelProto) -> ir.Model:
        found = from_message(read)
        for each in found.graph:
            if each.op_type == "Softmax":
                each.attributes.add(ir.AttrInt64("axis", 0))
        return found

    monkeypatch.setattr(graph_model, "from_message", misread)
    with pytest.raises(InputError, match=r"computes something else once it is read and written anew"):
        simplified(open_onnx(path))


def test_data_of_an_optional_input(tmp_path: Path) -> None:
    tensor = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, ["n", 16])
    nodes = [node("OptionalGetElement", ["x"], ["h"]), node("MatMul", ["h", "w"], ["y"])]
    proto = model(nodes, {}, {"y": None}, {"w": normal(16, 96)}, opset=18)
    proto.graph.input.append(helper.make_value_info("x", helper.make_optional_type_proto(tensor)))
    np.savez(tmp_path / "d.npz", x=normal(8, 16))
    out = tmp_path / "q.onnx"
    report = convert(saved(proto, tmp_path), output=out, scheme="int8-static", data=tmp_path / "d.npz")
    assert report.details["outputs"]["sqnr_db"] > 25 and report.details["outputs"]["samples"] == 8
