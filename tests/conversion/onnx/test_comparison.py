"""What is written is run: artifacts that compute something else are refused, with data and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantcli import calibrate, convert
from quantcli.calibration.statistics import CalibrationStats
from quantcli.conversion.onnx import comparison, explained, pipeline
from quantcli.conversion.onnx.equivalence import upgraded
from quantcli.conversion.staging import Staging
from quantcli.data.made_up import made_up_feeds, table_sizes
from quantcli.errors import InputError, UsageError
from quantcli.models.session import Session
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.values import add_initializer
from quantcli.onnx.rewrite import dynamic, expanded
from quantcli.onnx.weights.integer import IntegerWeight

RANDOM = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def save(
    path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: dict[str, Any], opset: int = 17
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def product(path: Path, columns: int = 96) -> Path:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    return save(path, nodes, {"w": weight(64, columns)}, {"x": (TensorProto.FLOAT, ["n", 64])})


def refused(model: Path, says: str, **options: Any) -> None:
    out = model.with_name("out.onnx")
    with pytest.raises(InputError, match=says) as raised:
        convert(model, out, **options)
    assert raised.value.exit_code == 3
    assert not out.exists()
    assert ".partial" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "nf4", "int8-dynamic"])
def test_outputs_are_compared_without_data(tmp_path: Path, scheme: str) -> None:
    report = convert(product(tmp_path / "model.onnx"), tmp_path / "out.onnx", scheme=scheme)
    outputs = report.details["outputs"]
    assert (outputs["compared"], outputs["made_up"], outputs["samples"]) == (True, True, 3)
    assert outputs["sqnr_db"] > 15
    assert not report.warnings
    assert open_onnx(tmp_path / "out.onnx").manifest.verified.get("compared") is None


def test_an_artifact_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "s"], ["y"])]
    model = save(
        tmp_path / "m.onnx", nodes, {"w": weight(512, 1), "s": weight(7)}, {"x": (TensorProto.FLOAT, ["n", 512])}
    )
    monkeypatch.setattr(dynamic, "_taken_for_bias", lambda node: False)
    refused(model, "does not run where the model does", scheme="int8-dynamic")


def test_a_kernel_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1] * 4),
        helper.make_node("AveragePool", ["h"], ["a"], **pool),
        helper.make_node("Conv", ["a", "w"], ["y"]),
    ]
    weights = {"w": weight(16, 16, 3, 3) / 3, "b": np.ones(16, np.float32)}
    model = save(tmp_path / "m.onnx", nodes, weights, {"x": (TensorProto.FLOAT, ["n", 16, 8, 8])})
    np.savez(tmp_path / "d.npz", x=RANDOM.standard_normal((8, 16, 8, 8)).astype(np.float32))
    for module in ("quantcli.onnx.plan.placement", "quantcli.onnx.rewrite.qdq"):
        monkeypatch.setattr(f"{module}.has_wrong_kernel", lambda node: False)
    refused(model, r"output y is wrong: it keeps \d+\.\d dB", scheme="int8-static", data=tmp_path / "d.npz")


def test_codes_that_stand_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(graph: ir.Graph, weight: IntegerWeight, original: ir.Value) -> ir.Value:
        values = np.ascontiguousarray(weight.codes.const_value.numpy()[::-1])  # type: ignore[union-attr]
        return decoded(graph, replace(weight, codes=add_initializer(graph, "turned", values)), original)

    decoded = expanded.decoded
    monkeypatch.setattr(expanded, "decoded", turned)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = save(tmp_path / "m.onnx", nodes, {"w": weight(64, 8, 3, 3)}, {"x": (TensorProto.FLOAT, ["n", 8, 8, 8])})
    refused(model, "output y is wrong", scheme="int8")


def test_honest_losses_are_kept(tmp_path: Path) -> None:
    # Eight layers of small random matrices at four bits: next to nothing of the output is left, and rightly so.
    nodes, weights, last = [], {}, "x"
    for number in range(8):
        weights[f"w{number}"] = weight(32, 32) * np.float32(3)
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"h{number}"]))
        nodes.append(helper.make_node("Sin", [f"h{number}"], [f"s{number}" if number < 7 else "y"]))
        last = f"s{number}"
    model = save(tmp_path / "m.onnx", nodes, weights, {"x": (TensorProto.FLOAT, ["n", 32])})
    report = convert(model, tmp_path / "out.onnx", scheme="int4")
    assert report.details["outputs"]["sqnr_db"] < 5


def far_reaching(path: Path, opset: int = 17) -> Path:
    """A model that takes no length but such as nobody would make up: only what runs it finds out."""
    nodes = [helper.make_node("Gather", ["x", "columns"], ["r"], axis=1), helper.make_node("MatMul", ["r", "w"], ["y"])]
    weights = {"w": weight(64, 96), "columns": np.arange(90_000, 90_064)}
    return save(path, nodes, weights, {"x": (TensorProto.FLOAT, ["n", "k"])}, opset)


def long_enough(folder: Path) -> Path:
    """A folder of feeds that it takes."""
    folder.mkdir()
    np.savez(folder / "d.npz", x=RANDOM.standard_normal((1, 90_100)).astype(np.float32))
    return folder


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int8-dynamic"])
def test_a_model_that_runs_on_nothing_that_is_made_up(tmp_path: Path, scheme: str) -> None:
    model = far_reaching(tmp_path / "m.onnx")
    refused(model, "Nothing would show what the artifact computes: on made-up inputs, .*Give --data", scheme=scheme)
    refused(model, "Nothing would show what the artifact computes", scheme=scheme, dry_run=True)
    np.savez(tmp_path / "d.npz", x=RANDOM.standard_normal((14, 64)).astype(np.float32))
    with pytest.raises(InputError, match="could not run the model"):
        convert(model, tmp_path / "out.onnx", scheme=scheme, data=tmp_path / "d.npz")
    report = convert(model, tmp_path / "out.onnx", scheme=scheme, data=long_enough(tmp_path / "fitting"))
    assert (report.details["outputs"]["compared"], report.details["outputs"]["made_up"]) == (True, False)
    assert report.details["outputs"]["sqnr_db"] > 30


def test_an_upgrade_is_proven_on_the_data_where_nothing_made_up_runs(tmp_path: Path) -> None:
    model = far_reaching(tmp_path / "m.onnx", opset=11)
    refused(model, "Nothing would show what the artifact computes", scheme="int8-dynamic")
    with pytest.raises(InputError, match="operator set 11 is not upgraded to 13, since nothing would show"):
        upgraded(open_onnx(model).ir, 13)
    report = convert(model, tmp_path / "out.onnx", scheme="int8-dynamic", data=long_enough(tmp_path / "fitting"))
    assert report.details["outputs"]["sqnr_db"] > 30
    assert report.details["verified"]["runtime"]["integer_kernels"]


@pytest.mark.parametrize("operator", ["Log", "Acosh", "Atanh", "Sqrt"])
def test_made_up_inputs_are_ones_for_which_there_are_numbers(tmp_path: Path, operator: str) -> None:
    nodes = [helper.make_node(operator, ["x"], ["l"]), helper.make_node("MatMul", ["l", "w"], ["y"])]
    model = save(tmp_path / "m.onnx", nodes, {"w": weight(64, 96)}, {"x": (TensorProto.FLOAT, ["n", 64])})
    report = convert(model, tmp_path / "out.onnx", scheme="int8")
    assert 30 < report.details["outputs"]["sqnr_db"] < 70


def framed(path: Path, frame: int) -> Path:
    """A model of sound that takes frames of its input, of any length: none where that is shorter than a frame."""
    nodes = [
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("Gather", ["size", "one"], ["length"]),
        helper.make_node("Div", ["length", "frame"], ["frames"]),
        helper.make_node("Mul", ["frames", "frame"], ["used"]),
        helper.make_node("Slice", ["x", "zero", "used", "one"], ["cut"]),
        helper.make_node("Concat", ["minus_one", "frame"], ["rows"], axis=0),
        helper.make_node("Reshape", ["cut", "rows"], ["framed"]),
        helper.make_node("MatMul", ["framed", "w"], ["y"]),
    ]
    numbers = {"zero": 0, "one": 1, "minus_one": -1, "frame": frame}
    weights = {"w": weight(frame, 96)} | {name: np.array([number]) for name, number in numbers.items()}
    return save(path, nodes, weights, {"x": (TensorProto.FLOAT, ["n", "length"])})


def test_made_up_sounds_are_long_enough_for_a_number(tmp_path: Path) -> None:
    report = convert(framed(tmp_path / "m.onnx", 400), tmp_path / "out.onnx", scheme="int8")
    assert report.details["outputs"]["sqnr_db"] > 30
    assert not report.warnings


def test_an_input_that_says_how_long_a_sound_is(tmp_path: Path) -> None:
    """A sound of one sample has no frame, and all zeros are equal to all zeros."""
    nodes = [
        helper.make_node("Range", ["zero", "width", "one"], ["steps"]),
        helper.make_node("Unsqueeze", ["lengths", "axis"], ["column"]),
        helper.make_node("Sub", ["column", "one"], ["last"]),
        helper.make_node("Less", ["steps", "last"], ["inside"]),
        helper.make_node("Cast", ["inside"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "mask"], ["y"]),
    ]
    numbers = {"zero": np.int64(0), "one": np.int64(1), "width": np.int64(96), "axis": np.array([1])}
    inputs = {"x": (TensorProto.FLOAT, ["n", 64]), "lengths": (TensorProto.INT64, ["n"])}
    model = save(tmp_path / "m.onnx", nodes, {"w": weight(64, 96)} | numbers, inputs)
    report = convert(model, tmp_path / "out.onnx", scheme="int8")
    assert 30 < report.details["outputs"]["sqnr_db"] < 70


def test_a_state_without_names_has_as_many_samples_as_the_input(tmp_path: Path) -> None:
    """And no other number of them: the input is a sound, of one sample as long as some frames."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "one"], ["channel"]),
        helper.make_node("Conv", ["channel", "w"], ["frames"], strides=[40]),
        helper.make_node("ReduceMax", ["frames"], ["h"], axes=[2], keepdims=0),
        helper.make_node("Unsqueeze", ["h", "zero"], ["row"]),
        helper.make_node("Concat", ["state", "row"], ["y"], axis=0),
    ]
    inputs = {"x": (TensorProto.FLOAT, [None, None]), "state": (TensorProto.FLOAT, [2, None, 96])}
    weights = {"w": weight(96, 1, 80), "zero": np.array([0]), "one": np.array([1])}
    model = save(tmp_path / "m.onnx", nodes, weights, inputs)
    report = convert(model, tmp_path / "out.onnx", scheme="int8")
    assert report.details["outputs"]["sqnr_db"] > 30


def test_a_loss_within_a_branch_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches use the same names; every artifact is looked at closely here."""
    monkeypatch.setattr(explained, "_FIRST_LOOK_DB", -1000.0)
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", name], ["h"]), helper.make_node("Relu", ["h"], [f"{name}_y"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(weight(64, 96), name)],
        )
        for name in ("a", "b")
    ]
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])]
    inputs = {"x": (TensorProto.FLOAT, ["n", 64]), "c": (TensorProto.BOOL, [])}
    model = save(tmp_path / "m.onnx", nodes, {}, inputs)
    report = convert(model, tmp_path / "out.onnx", scheme="int8-dynamic")
    assert 25 < report.details["outputs"]["sqnr_db"] < 60


def test_an_output_that_stays_empty_is_told(tmp_path: Path) -> None:
    report = convert(framed(tmp_path / "m.onnx", 20000), tmp_path / "out.onnx", scheme="int8")
    assert report.details["outputs"]["sqnr_db"] is None
    assert any("The output y was not compared" in warning for warning in report.warnings)


def test_a_sound_that_is_padded_by_what_mirrors_it(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["wide"], mode="reflect"),
        helper.make_node("Unsqueeze", ["wide", "axis"], ["channel"]),
        helper.make_node("Conv", ["channel", "w"], ["y"], strides=[160]),
    ]
    weights = {"pads": np.array([0, 200, 0, 200]), "axis": np.array([1]), "w": weight(64, 1, 400)}
    model = save(tmp_path / "m.onnx", nodes, weights, {"x": (TensorProto.FLOAT, ["n", "length"])}, opset=18)
    report = convert(model, tmp_path / "out.onnx", scheme="int8")
    assert report.details["outputs"]["sqnr_db"] > 30


def test_masks_whose_ones_mean_padding(tmp_path: Path) -> None:
    """All of it masked, a softmax is NaN: the model has numbers for zeros."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Where", ["mask", "low", "h"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"]),
    ]  # fmt: skip
    inputs = {"x": (TensorProto.FLOAT, ["n", 64]), "mask": (TensorProto.BOOL, ["n", 96])}
    model = save(tmp_path / "m.onnx", nodes, {"w": weight(64, 96), "low": np.float32(-np.inf)}, inputs)
    report = convert(model, tmp_path / "out.onnx", scheme="int8")
    assert report.details["outputs"]["sqnr_db"] > 25


def test_a_model_without_inputs(tmp_path: Path) -> None:
    nodes = [helper.make_node("RandomNormal", [], ["r"], shape=[4, 64]), helper.make_node("Cos", ["r"], ["c"]),
             helper.make_node("MatMul", ["c", "w"], ["h"]), helper.make_node("Shape", ["h"], ["s"]),
             helper.make_node("ConstantOfShape", ["s"], ["y"])]  # fmt: skip
    model = save(tmp_path / "m.onnx", nodes, {"w": weight(64, 96)}, {})
    np.savez(tmp_path / "d.npz")
    for data in (None, tmp_path / "d.npz"):
        report = convert(model, tmp_path / "out.onnx", scheme="int8", data=data, force=True)
        assert report.details["outputs"]["compared"] is True


def test_a_model_that_returns_no_number(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]), helper.make_node("Neg", ["e"], ["n"]),
        helper.make_node("Log", ["n"], ["l"]),
        helper.make_node("MatMul", ["l", "w"], ["y"]),
    ]  # fmt: skip
    model = save(tmp_path / "m.onnx", nodes, {"w": weight(64, 96)}, {"x": (TensorProto.FLOAT, ["n", 64])})
    refused(model, "returns no finite number for made-up inputs", scheme="int8")
    np.savez(tmp_path / "d.npz", x=RANDOM.standard_normal((3, 64)).astype(np.float32))
    refused(model, "returns no finite number for 3 samples", scheme="int8", data=tmp_path / "d.npz")


def test_integers_strings_and_maps_are_compared(tmp_path: Path) -> None:
    comparing = comparison.OutputComparison
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ArgMax", ["h"], ["y"], axis=1)]
    values = weight(64, 96)
    one, other = (
        save(tmp_path / f"{name}.onnx", nodes, {"w": w}, {"x": (TensorProto.FLOAT, ["n", 64])})
        for name, w in (("one", values), ("other", np.ascontiguousarray(values[:, ::-1])))
    )
    for path in (one, other):
        proto = onnx.load(path)
        proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
        onnx.save(proto, path)
    x = {"x": RANDOM.standard_normal((20, 64)).astype(np.float32)}
    same, differing = (comparing(one, lambda: [(x, 20)], tmp_path).against(path) for path in (one, other))
    assert (same.equal, same.sqnr_db, same.outputs) == (1.0, None, {})
    assert differing.equal is not None and differing.equal < 0.2
    assert differing.to_json() == {"samples": 20, "sqnr_db": None, "equal": differing.equal}


def test_what_is_infinite_stays_infinite(tmp_path: Path) -> None:
    paths = []
    for name, masked in (("one", -np.inf), ("other", 0.0)):
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "mask"], ["y"])]
        mask = np.where(np.arange(96) % 2, masked, 0).astype(np.float32)
        paths.append(
            save(tmp_path / f"{name}.onnx", nodes, {"w": np.ones((64, 96), np.float32), "mask": mask},
                 {"x": (TensorProto.FLOAT, ["n", 64])})
        )  # fmt: skip
    x = {"x": RANDOM.standard_normal((2, 64)).astype(np.float32)}
    with pytest.raises(InputError, match="output y of the artifact is finite where the original's is not"):
        comparison.OutputComparison(paths[0], lambda: [(x, 2)], tmp_path).against(paths[1])


def test_a_loss_that_cannot_be_judged_is_told(tmp_path: Path) -> None:
    values = weight(64, 96)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "much"], ["m"]),
        helper.make_node("Mod", ["m", "one"], ["y"], fmod=1),
    ]  # fmt: skip
    weights = {"w": values, "much": np.float32(1000), "one": np.float32(1)}
    model = save(tmp_path / "m.onnx", nodes, weights, {"x": (TensorProto.FLOAT, ["n", 64])})
    report = convert(model, tmp_path / "out.onnx", scheme="int8")
    assert report.details["outputs"]["sqnr_db"] < 5
    assert any("was not judged: operators follow that make a large error of a small one" in w for w in report.warnings)


def test_another_order_of_outputs(tmp_path: Path) -> None:
    model = product(tmp_path / "m.onnx")
    nodes = [helper.make_node("MatMul", ["z", "w"], ["y"])]
    renamed = save(tmp_path / "o.onnx", nodes, {"w": weight(64, 96)}, {"z": (TensorProto.FLOAT, ["n", 64])})
    outputs = comparison.OutputComparison(model, lambda: [], tmp_path)
    with pytest.raises(InputError, match=r"inputs would be z \(float32\); those of the model are x \(float32\)"):
        outputs.against(renamed)


def test_indices_lie_within_tables(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["i"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "i"], ["e"]),
        helper.make_node("ReduceSum", ["e"], ["y"], keepdims=0),
    ]
    weights = {"table": weight(7, 64)}
    inputs = {"ids": (TensorProto.INT64, ["n", "length"]), "mask": (TensorProto.INT64, ["n", "length"])}
    model = save(tmp_path / "m.onnx", nodes, weights, inputs)
    assert table_sizes(open_onnx(model).ir) == {"ids": 7}
    found = made_up_feeds(Session(model).inputs, 40, 5, 0, tables={"ids": 7})
    assert found["ids"].shape == (40, 5)
    assert set(np.unique(found["ids"])) == set(range(7))
    assert (found["mask"] == 1).all()


@pytest.mark.parametrize("scheme", ["fp16", "bf16", "int8", "int4", "nf4", "int8-dynamic", "int8-static"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("operator", ["MatMul", "Conv", "Gather", "Gemm"])
def test_weights_that_are_not_finite(tmp_path: Path, scheme: str, value: float, operator: str) -> None:
    values = weight(64, 16, 3, 3) if operator == "Conv" else weight(64, 96)
    values[3, 4] = value
    shape: list[Any] = ["n", 16, 8, 8] if operator == "Conv" else ["n", 64]
    kind = TensorProto.INT64 if operator == "Gather" else TensorProto.FLOAT
    names = ["w", "x"] if operator == "Gather" else ["x", "w"]
    model = save(tmp_path / "m.onnx", [helper.make_node(operator, names, ["y"])], {"w": values}, {"x": (kind, shape)})
    data = RANDOM.standard_normal((2, *shape[1:])).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=(np.abs(data).astype(np.int64) if operator == "Gather" else data))
    place = r"\[3, 4, 0, 0\]" if operator == "Conv" else r"\[3, 4\]"
    refused(
        model,
        rf"w holds NaN or infinite values, which cannot be quantized: {value} at {place} is the first",
        scheme=scheme,
        data=tmp_path / "d.npz",
    )


@pytest.mark.parametrize(("factor", "says"), [(1e6, "values lie beyond 65504"), (1e-30, "values are too small")])
def test_weights_that_halves_cannot_hold(tmp_path: Path, factor: float, says: str) -> None:
    values = {"w": weight(64, 96) * np.float32(factor)}
    model = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        values,
        {"x": (TensorProto.FLOAT, [2, 64])},
    )
    refused(model, rf"fp16 applies to nothing in .*m\.onnx: stays fp32: .*{says}", scheme="fp16", allow_larger=True)


def masked(path: Path, operator: str, value: float) -> Path:
    """Logits of which some classes are masked out by a constant."""
    mask = np.zeros(96, np.float32)
    mask[::3] = value
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "m"], ["y"])]
    if operator == "Gemm":
        nodes = [helper.make_node("Gemm", ["x", "w", "m"], ["y"])]
    return save(path, nodes, {"w": weight(64, 96), "m": mask}, {"x": (TensorProto.FLOAT, ["n", 64])})


@pytest.mark.parametrize(
    ("operator", "scheme"),
    [
        *(("Gemm", scheme) for scheme in ("int4", "int8-dynamic", "fp16", "int8-static")),
        *(("MatMul", scheme) for scheme in ("int8", "int8-static")),
    ],
)
def test_classes_that_are_masked_out(tmp_path: Path, operator: str, scheme: str) -> None:
    np.savez(tmp_path / "d.npz", x=RANDOM.standard_normal((8, 64)).astype(np.float32))
    model = masked(tmp_path / "m.onnx", operator, -np.inf)
    data = {"data": tmp_path / "d.npz"} if scheme == "int8-static" else {}
    report = convert(model, tmp_path / "out.onnx", scheme=scheme, **data)  # type: ignore[arg-type]
    assert report.details["outputs"]["sqnr_db"] > 15
    if (operator, scheme) == ("Gemm", "int8-static"):
        (layer,) = [row for row in report.layers if row.name == "w"]
        assert "its bias is infinite in places" in layer.details["note"]


@pytest.mark.parametrize("scheme", ["int8-static", "int8"])
def test_a_bias_that_is_no_number(tmp_path: Path, scheme: str) -> None:
    np.savez(tmp_path / "d.npz", x=RANDOM.standard_normal((8, 64)).astype(np.float32))
    model = masked(tmp_path / "m.onnx", "Gemm", np.nan)
    refused(model, r"m holds NaN or infinite values.* nan at \[0\]", scheme=scheme, data=tmp_path / "d.npz")


def test_far_below_needs_more_than_a_few_decibels() -> None:
    decoded = comparison.Comparison(1, 30.0, outputs={"a": 30.0, "b": 30.0, "c": None})
    assert explained._far_below({"a": 25.0, "b": 10.0, "c": 5.0}, decoded) == ["b", "c"]


def test_made_up_inputs_lie_in_calibrated_ranges(tmp_path: Path) -> None:
    """Outside of them, clipping alone decides what comes out: a sound artifact would look broken."""
    model = product(tmp_path / "m.onnx")
    data = RANDOM.uniform(0, 0.01, (64, 64)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=data)
    calibrate(model, data=tmp_path / "d.npz", output=tmp_path / "stats.safetensors")
    stats = tmp_path / "stats.safetensors"
    outputs = convert(model, tmp_path / "o.onnx", scheme="int8-static", calibration=stats).details["outputs"]
    assert outputs["made_up"]
    assert outputs["sqnr_db"] > 30
    drawn = CalibrationStats.load(stats).draws()["x"](np.random.default_rng(0), (3, 64))
    assert (drawn.min() >= data.min(), drawn.max() <= data.max(), drawn.std() > 0.5 * data.std()) == (True,) * 3


def test_a_dry_run_knows_what_halves_take(tmp_path: Path) -> None:
    """A weight behind a Cast is seen in 32 bits, and is stored in 16."""
    convert(product(tmp_path / "m.onnx", columns=1024), tmp_path / "half.onnx", scheme="fp16")
    halves = tmp_path / "half.onnx"
    foreseen = convert(halves, tmp_path / "out.onnx", scheme="int8", dry_run=True).models[-1].size_bytes
    convert(halves, tmp_path / "out.onnx", scheme="int8")
    assert abs(foreseen - (tmp_path / "out.onnx").stat().st_size) < 0.1 * foreseen


@pytest.mark.parametrize("trained", [False, True])
def test_a_usage_error_leaves_nothing_but_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    """Hours of training are no less worth for a file that stands in the way."""

    def begins(job: Any, staging: Staging) -> None:
        staging.begin("fingerprint", force=False)
        if trained:
            staging.checkpoint.write_bytes(b"so far")
        raise UsageError("a file stands in the way")

    monkeypatch.setattr(pipeline, "_convert", begins)
    with pytest.raises(UsageError):
        convert(product(tmp_path / "m.onnx"), tmp_path / "out.onnx", scheme="int8")
    assert (tmp_path / ".out.onnx.partial" / "training.pt").exists() == trained
    assert (tmp_path / ".out.onnx.partial").exists() == trained


@pytest.mark.parametrize(
    ("scheme", "spoilt"), [("int8-dynamic", np.inf), ("int8-dynamic", np.nan), ("int8", np.nan), ("fp16", np.nan)]
)
def test_data_that_is_not_finite_is_named(tmp_path: Path, scheme: str, spoilt: float) -> None:
    """In a scheme whose ranges are taken at inference one infinity leaves no number in any row."""
    values = RANDOM.standard_normal((4, 6, 64)).astype(np.float32)
    values[2, 3, 5] = spoilt
    np.savez(tmp_path / "data.npz", x=values)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    file = save(tmp_path / "m.onnx", nodes, {"w": weight(64, 96)}, {"x": (TensorProto.FLOAT, ["n", 6, 64])})
    run = lambda: convert(file, tmp_path / "o.onnx", scheme=scheme, data=tmp_path / "data.npz")  # noqa: E731
    named = f"Sample 2 of {tmp_path / 'data.npz'}, in the input x"
    if scheme == "int8-dynamic" and np.isinf(spoilt):
        with pytest.raises(InputError, match="not finite where the original's is") as caught:
            run()
        assert named in caught.value.message and "report" not in (caught.value.hint or "")
    else:
        assert any(named in warning for warning in run().warnings)


def detector(path: Path, gain: float) -> Path:
    """Of noise around zero a sigmoid makes nothing but zeros; of values as large as pixels it makes a map."""
    random = np.random.default_rng(1)
    weights = {
        "w": random.standard_normal((16, 3, 3, 3)).astype(np.float32) / 5,
        "v": np.abs(random.standard_normal((1, 16, 3, 3))).astype(np.float32) / 5,
        "b": np.array([-150.0], np.float32),
        "gain": np.array(gain, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "v", "b"], ["s"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["s", "gain"], ["g"]),
        helper.make_node("Sigmoid", ["g"], ["y"]),
    ]
    return save(path, nodes, weights, {"x": (TensorProto.FLOAT, ["n", 3, "h", "w"])})


def test_made_up_inputs_are_chosen_by_what_outputs_tell_apart(tmp_path: Path) -> None:
    report = convert(detector(tmp_path / "m.onnx", 0.05), tmp_path / "o.onnx", scheme="fp16", allow_larger=True)
    assert 20 < report.details["outputs"]["sqnr_db"] < 90
    assert not any("constant" in warning for warning in report.warnings)


def test_outputs_that_stay_flat_are_told(tmp_path: Path) -> None:
    report = convert(detector(tmp_path / "m.onnx", -1000.0), tmp_path / "o.onnx", scheme="fp16", allow_larger=True)
    (told,) = [warning for warning in report.warnings if "all but constant" in warning]
    assert "the output y" in told


def with_past(path: Path, dims: str) -> Path:
    """The mask is as long as the two inputs that a Concat joins; names do not tell."""
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["all"], axis=1),
        helper.make_node("MatMul", ["all", "w"], ["h"]),
        helper.make_node("MatMul", ["mask", "h"], ["y"]),
    ]
    kind = TensorProto.FLOAT
    inputs = {"past": (kind, ["a", "past", 64]), "x": (kind, ["b", "new", 64]), "mask": (kind, ["c", dims, "total"])}
    return save(path, nodes, {"w": weight(64, 96)}, inputs)


def test_sizes_are_found_that_an_inner_node_binds(tmp_path: Path) -> None:
    report = convert(with_past(tmp_path / "m.onnx", "rows"), tmp_path / "o.onnx", scheme="int8")
    assert report.details["outputs"]["made_up"] and report.details["outputs"]["sqnr_db"] > 30


def test_it_is_told_how_many_sizes_were_tried(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Reshape", ["h", "shape"], ["y"])]
    weights = {"w": weight(64, 96), "shape": np.array([7, 1009, -1])}
    file = save(tmp_path / "m.onnx", nodes, weights, {"x": (TensorProto.FLOAT, ["n", "t", 64])})
    with pytest.raises(InputError, match=r"\d+ choices of its free sizes were tried"):
        convert(file, tmp_path / "o.onnx", scheme="int8")
