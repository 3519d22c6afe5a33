"""Weights wherever they are: bodies, functions, Einsum, batched products, operators of onnxruntime, behind a Cast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from support.graphs import model, node, normal
from support.static_graphs import Converted

from quantcli.commands.calibrate import calibrate
from quantcli.commands.convert import convert
from quantcli.commands.inspect_onnx import inspect_onnx
from quantcli.errors import InputError
from quantcli.models.session import Session

MICROSOFT = "com.microsoft"
X = {"x": [2, 5, 64]}
LEAST = {"int8": 35, "int4": 14, "int8-dynamic": 30, "int8-static": 30, "fp16": 65}


@pytest.mark.parametrize("scheme", LEAST)
@pytest.mark.parametrize(
    ("equation", "shape", "product"),
    [
        ("btd,dh->bth", (64, 96), True), ("btd,hd->bth", (96, 64), True), ("dh,btd->bth", (64, 96), True),
        ("btd,dnh->btnh", (64, 4, 24), True), ("btd,nhd->btnh", (4, 24, 64), True),
        ("...d,dh->...h", (64, 96), True), ("btd,dh->hbt", (64, 96), False), ("btd,bdh->bth", (2, 64, 32), False),
        ("btd,d->bt", (64,), None), ("btd,td->bt", (5, 64), False), ("btd,dh", (64, 96), None),
    ],
)  # fmt: skip
def test_einsum(tmp_path: Path, equation: str, shape: tuple[int, ...], product: bool | None, scheme: str) -> None:
    first, second = ["w", "x"] if equation.startswith("dh") else ["x", "w"]
    held = {"w": normal(*shape, scale=0.2), "k": normal(64, 64, scale=0.1)}
    # A product beside it, so that there always is a layer to quantize.
    nodes = [node("Einsum", [first, second], ["y"], equation=equation), node("MatMul", ["x", "k"], ["z"])]
    found = Converted(model(nodes, X, {"y": None, "z": None}, held), tmp_path, None, scheme)
    assert found.sqnr_db() > LEAST[scheme]
    if product is not None:
        assert all(each.form for each in found.plan.nodes) and len(found.plan.nodes) == 2
        assert ("Einsum" in found.kernels) != product


def test_an_einsum_over_two_letters_of_the_input(tmp_path: Path) -> None:
    nodes = [node("Einsum", ["x", "w"], ["y"], equation="btnh,nhd->btd")]
    proto = model(nodes, {"x": [2, 3, 4, 16]}, {"y": None}, {"w": normal(4, 16, 96, scale=0.2)})
    found = Converted(proto, tmp_path, None, "int8-dynamic")
    assert found.kernels == {"Reshape": 1, "DynamicQuantizeMatMul": 1} and found.sqnr_db() > 33


@pytest.mark.parametrize("scheme", LEAST)
def test_products_of_more_dimensions_and_of_a_left_constant(tmp_path: Path, scheme: str) -> None:
    held = {"w": normal(2, 64, 48, scale=0.2), "k": normal(96, 5, scale=0.2)}
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("MatMul", ["k", "x"], ["z"])]
    found = Converted(model(nodes, X, {"y": None, "z": None}, held), tmp_path, None, scheme)
    assert found.kernels == {"MatMul": 2} and found.pairs == (0, 0)
    assert found.sqnr_db("y") > LEAST[scheme] and found.sqnr_db("z") > LEAST[scheme]


def test_a_transposed_convolution_of_onnxruntimes_own(tmp_path: Path) -> None:
    held = {"w": normal(64, 16, 3, 3, scale=0.1), "p": np.array([1, 1, 1, 1])}
    nodes = [node("ConvTransposeWithDynamicPads", ["x", "w", "p"], ["y"], domain=MICROSOFT, strides=[2, 2])]
    proto = model(nodes, {"x": [1, 64, 5, 5]}, {"y": [1, 16, 9, 9]}, held, domains={MICROSOFT: 1})
    assert Converted(proto, tmp_path, None, "int8").sqnr_db() > LEAST["int8"]


@pytest.mark.parametrize("scheme", LEAST)
def test_products_that_onnxruntime_fuses(tmp_path: Path, scheme: str) -> None:
    held = {"w": normal(96, 64, scale=0.2), "a": normal(64, 192, scale=0.2), "b": normal(192, scale=0.1)}
    nodes = [
        node("FusedMatMul", ["x", "w"], ["y"], domain=MICROSOFT, alpha=0.5, transB=1),
        node("Attention", ["x", "a", "b"], ["z"], domain=MICROSOFT, num_heads=4),
    ]
    proto = model(nodes, X, {"y": [2, 5, 96], "z": [2, 5, 64]}, held, domains={MICROSOFT: 1})
    found = Converted(proto, tmp_path, None, scheme)
    assert found.sqnr_db("y") > LEAST[scheme] and found.sqnr_db("z") > LEAST[scheme]
    assert all(each.form for each in found.plan.nodes) and len(found.plan.nodes) == 2


def branches(**held: np.ndarray) -> onnx.ModelProto:
    def graph(name: str, weight: str) -> onnx.GraphProto:
        own = [onnx.numpy_helper.from_array(held[weight], weight)] if weight.startswith("own") else []
        nodes = [node("MatMul", ["x", weight], ["p"]), node("Relu", ["p"], ["q"])]
        output = onnx.helper.make_tensor_value_info("q", onnx.TensorProto.FLOAT, None)
        return onnx.helper.make_graph(nodes, name, [], [output], own)

    nodes = [
        node("ReduceSum", ["x"], ["t"], keepdims=0), node("Greater", ["t", "limit"], ["c"]),
        node("If", ["c"], ["y"], then_branch=graph("one", "own1"), else_branch=graph("two", "outer")),
    ]  # fmt: skip
    return model(nodes, X, {"y": None}, {"outer": held["outer"], "limit": held["limit"]})


@pytest.mark.parametrize("scheme", LEAST)
@pytest.mark.parametrize("limit", [-1e9, 1e9])
def test_branches(tmp_path: Path, limit: float, scheme: str) -> None:
    """Weights of the branch itself, and of the graph around it; both branches are taken."""
    proto = branches(own1=normal(64, 96, scale=0.2), outer=normal(64, 96, seed=1, scale=0.2), limit=np.float32(limit))
    found = Converted(proto, tmp_path, None, scheme)
    assert found.sqnr_db() > LEAST[scheme] and all(each.form for each in found.plan.nodes)
    if scheme == "int8-static":
        assert {each.label for each in found.plan.nodes} == {"int8-dynamic"}


@pytest.mark.parametrize("scheme", LEAST)
def test_loops(tmp_path: Path, scheme: str) -> None:
    info, real = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    body = onnx.helper.make_graph(
        [
            node("Identity", ["more"], ["still"]), node("MatMul", ["s", "w"], ["p"]), node("Add", ["p", "b"], ["q"]),
            node("Tanh", ["q"], ["next"]), node("Mul", ["next", "two"], ["seen"]),
        ],
        "body",
        [info("i", onnx.TensorProto.INT64, []), info("more", onnx.TensorProto.BOOL, []), info("s", real, X["x"])],
        [info("still", onnx.TensorProto.BOOL, []), info("next", real, X["x"]), info("seen", real, X["x"])],
        [onnx.numpy_helper.from_array(normal(64, 64, scale=0.2), "w"), onnx.numpy_helper.from_array(normal(64), "b"),
         onnx.numpy_helper.from_array(np.float32(2), "two")],
    )  # fmt: skip
    outputs = {"y": X["x"], "z": [3, *X["x"]]}
    proto = model([node("Loop", ["n", "", "x"], ["y", "z"], body=body)], X, outputs, {"n": np.array(3)})
    found = Converted(proto, tmp_path, None, scheme)
    assert found.sqnr_db("y") > LEAST[scheme] - 5 and found.sqnr_db("z") > LEAST[scheme] - 5
    assert all(each.form for each in found.plan.nodes) and found.plan.nodes


def test_gptq_in_a_body_rounds_plainly(tmp_path: Path) -> None:
    proto = branches(own1=normal(64, 96, scale=0.2), outer=normal(64, 96, seed=1, scale=0.2), limit=np.float32(0))
    found = Converted(proto, tmp_path, None, "int4", algorithm="gptq")
    assert "inside a subgraph, whose values are not calibrated" in (found.plan.nodes[0].note or "")


@pytest.mark.parametrize("scheme", LEAST)
def test_local_functions(tmp_path: Path, scheme: str) -> None:
    constant = onnx.numpy_helper.from_array(normal(64, 96, scale=0.2), "k")
    inside = [node("Constant", [], ["k"], value=constant), node("MatMul", ["a", "k"], ["b"])]
    function = onnx.helper.make_function("mine", "Layer", ["a"], ["b"], inside, [onnx.helper.make_opsetid("", 17)])
    nodes = [node("Layer", ["x"], ["y"], domain="mine")]
    proto = model(nodes, X, {"y": None}, functions=[function], domains={"mine": 1})
    found = Converted(proto, tmp_path, None, scheme)
    assert found.sqnr_db() > LEAST[scheme] and [each.form for each in found.plan.nodes] != [None]


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_halves_behind_a_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """However large: where nothing is folded, they are weights all the same; and what is left is stored as it was."""
    monkeypatch.setattr("quantcli.onnx.graph.simplify._FOLDED_ELEMENTS", 16)
    halves = {name: normal(64, 64, seed=seed, scale=0.2).astype(np.float16) for seed, name in enumerate("wk")}
    nodes = [
        node("Cast", ["w"], ["wf"], to=1), node("Cast", ["k"], ["kf"], to=1),
        node("MatMul", ["x", "wf"], ["h"], name="one"), node("MatMul", ["h", "kf"], ["y"], name="two"),
    ]  # fmt: skip
    proto = model(nodes, X, {"y": None}, halves)
    found = Converted(proto, tmp_path, None, scheme, rules=[{"match": "two", "skip": True}])
    assert found.sqnr_db() > 33 and [bool(each.form) for each in found.plan.nodes] == [True, False]
    kept = found.graph.graph.initializers["k"].const_value
    assert kept.dtype.name == "FLOAT16" and np.array_equal(kept.numpy(), halves["k"])


class _Once(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: dict[str, np.ndarray]) -> None:
        self.feeds = iter([feeds])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


@pytest.mark.parametrize("kind", ["dynamic", "QDQ", "QOperator", "int8", "int4"])
@pytest.mark.parametrize("scheme", ["fp16", "bf16", "int8", "int4", "int8-dynamic", "int8-static"])
def test_partly_quantized_graphs(tmp_path: Path, kind: str, scheme: str) -> None:
    """What is quantized stays, code by code, and the rest is converted; the function stays that of the source."""
    held = {name: normal(64, 64, seed=seed, scale=0.15) for seed, name in enumerate(("w1", "w2", "w3"))}
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="m1"), node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "w2"], ["c"], name="m2"), node("Relu", ["c"], ["d"]),
        node("MatMul", ["d", "w3"], ["y"], name="m3"),
    ]  # fmt: skip
    path, part, x = tmp_path / "m.onnx", tmp_path / "part.onnx", normal(32, 64, seed=7)
    np.savez(tmp_path / "x.npz", x=x)
    onnx.save(model(nodes, {"x": ["n", 64]}, {"y": None}, held), path)
    if kind == "dynamic":
        quantize_dynamic(path, part, nodes_to_exclude=["m2"])
    elif kind in ("QDQ", "QOperator"):
        quantize_static(path, part, _Once({"x": x}), QuantFormat[kind], nodes_to_exclude=["m2"])
    else:
        convert(path, part, scheme=kind, skip=["w2"])
    assert "quantized in part" in " ".join(inspect_onnx(part).warnings)
    ranges = {}
    if scheme == "int8-static":
        calibrate(part, data=tmp_path / "x.npz", output=tmp_path / "s.safetensors")
        ranges = {"calibration": tmp_path / "s.safetensors"}
    report = convert(part, tmp_path / "o.onnx", scheme=scheme, **ranges)
    assert any("what is quantized stays as it is" in warning for warning in report.warnings)
    codes = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in onnx.load(part).graph.initializer
        if each.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and np.prod(each.dims) > 256
    }
    after = {each.name: each for each in onnx.load(tmp_path / "o.onnx").graph.initializer}
    assert len(codes) == 2
    for name, values in codes.items():
        assert np.array_equal(onnx.numpy_helper.to_array(after[name]), values)
    before = Session(part, threads=1).run({"x": x})["y"].astype(np.float64)
    noise = before - Session(tmp_path / "o.onnx", threads=1).run({"x": x})["y"]
    assert 10 * np.log10(np.square(before).sum() / np.square(noise).sum()) > (15 if scheme == "int4" else 30)


def test_codes_behind_a_cast_stay(tmp_path: Path) -> None:
    """What this very form wrote is not made floats of, and not quantized a second time."""
    held = {"w": normal(1, 256, 64, scale=0.1), "r": normal(1, 256, 64, seed=1, scale=0.1), "k": normal(64, 64)}
    nodes = [
        node("LSTM", ["x", "w", "r"], ["a"], hidden_size=64), node("Squeeze", ["a", "one"], ["s"]),
        node("MatMul", ["s", "k"], ["y"]),
    ]  # fmt: skip
    onnx.save(model(nodes, {"x": [5, 2, 64]}, {"y": None}, {**held, "one": np.array([1])}), tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", tmp_path / "part.onnx", scheme="int8", skip=["k"])
    report = convert(tmp_path / "part.onnx", tmp_path / "o.onnx", scheme="fp16")
    after = {each.name: each for each in onnx.load(tmp_path / "o.onnx").graph.initializer}
    assert after["w_quantized"].data_type == onnx.TensorProto.INT8 and "k" not in after
    reasons = {row.name: row.reason for row in report.layers}
    assert reasons["w_quantized"] == "quantized already: stays as it is"


def test_what_stays_is_named_with_the_true_reason(tmp_path: Path) -> None:
    held = {"k": normal(64, 64), "table": normal(400, 64), "b": normal(64)}
    nodes = [node("MatMul", ["x", "k"], ["h"]), node("Add", ["h", "b"], ["g"]), node("Mul", ["g", "table"], ["y"])]
    onnx.save(model(nodes, {"x": [400, 64]}, {"y": None}, held), tmp_path / "m.onnx")
    report = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8")
    reasons = {row.name: row.reason for row in report.layers}
    assert reasons["table"] == "no weight of a product or lookup that is known: Mul reads it"
    assert reasons["b"] == "bias, norm or constant: tiny, and sensitive"


@pytest.mark.parametrize(("scheme", "rest"), [*((scheme, None) for scheme in LEAST), ("int8", "fp16")])
def test_a_weight_that_is_an_output_stays(tmp_path: Path, scheme: str, rest: str | None) -> None:
    held = {"w": normal(64, 64, scale=0.1), "v": normal(64, 96, scale=0.1)}
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "v"], ["y"])]
    onnx.save(model(nodes, X, {"y": None, "w": [64, 64]}, held), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=normal(8, 5, 64))
    data = {"data": tmp_path / "d.npz"} if scheme == "int8-static" else {}
    recipe = {"scheme": scheme, "rest": rest} if rest else {"scheme": scheme}
    report = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", **recipe, **data)  # type: ignore[arg-type]
    assert {row.name: row.reason for row in report.layers if row.name in held} == {
        "w": "its weight is an output of the model", "v": None,
    }  # fmt: skip


@pytest.mark.parametrize("scheme", LEAST)
def test_weights_in_double_precision(tmp_path: Path, scheme: str) -> None:
    """A double graph stays one: no kernel of integers or of few bits takes doubles, but a Cast makes them."""
    weights = {"w": normal(64, 96, scale=0.1).astype(np.float64), "v": normal(96, 64, scale=0.1).astype(np.float64)}
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Gemm", ["g", "v"], ["y"])]
    nodes.insert(1, node("Reshape", ["h", "rows"], ["g"]))
    held = {**weights, "rows": np.array([-1, 96])}
    onnx.save(model(nodes, X, {"y": None}, held, dtype=onnx.TensorProto.DOUBLE), tmp_path / "m.onnx")
    x = normal(2, 5, 64, seed=3).astype(np.float64)
    np.savez(tmp_path / "d.npz", x=np.concatenate([x] * 4))
    data = tmp_path / "d.npz" if scheme == "int8-static" else None
    report = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme=scheme, data=data)
    before, after = (Session(tmp_path / name, threads=1).run({"x": x})["y"] for name in ("m.onnx", "o.onnx"))
    assert after.dtype == np.float64
    assert 10 * np.log10(np.square(before).sum() / np.square(before - after).sum()) > LEAST[scheme]
    bits = {"fp16": 16, "int4": 5}.get(scheme, 9)
    assert (tmp_path / "o.onnx").stat().st_size < 2 * 64 * 96 * bits / 8 + 4000
    assert not [row.reason for row in report.layers if row.scheme == "float"]
    if scheme.startswith("int8-"):
        assert "double precision" in " ".join(report.warnings)


@pytest.mark.parametrize("size", [1e50, 1e-50])
def test_doubles_that_float32_has_not_are_named_as_such(tmp_path: Path, size: float) -> None:
    weights = {"w": normal(64, 96).astype(np.float64) * size}
    proto = model([node("MatMul", ["x", "w"], ["y"])], X, {"y": None}, weights, dtype=onnx.TensorProto.DOUBLE)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"w holds numbers as large as .*, beyond what float32 scales can stand for"):
        convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8")


def test_a_weight_without_values_stays(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "y"), node("MatMul", ["x", "none"], "z")]
    held = {"w": normal(64, 96, scale=0.1), "none": np.zeros((64, 0), np.float32)}
    found = Converted(model(nodes, X, {"y": None, "z": None}, held), tmp_path, None, "int8-static")
    assert found.sqnr_db() >= LEAST["int8-static"]
    assert [layer.reason for layer in found.plan.nodes if not layer.form] == ["it holds no values"]


@pytest.mark.parametrize("scheme", LEAST)
@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
def test_layers_whose_input_is_constant(tmp_path: Path, operator: str, scheme: str) -> None:
    """As tables of positions that go through layers of their own, and are too many to be computed beforehand."""
    if operator == "MatMul":
        held = {"p": normal(200, 64), "w": normal(64, 96, scale=0.1), "v": normal(64, 96, scale=0.1)}
        shape: list[object] = ["n", 200, 64]
    else:
        held = {"p": normal(1, 3, 30, 30), "w": normal(96, 3, 3, 3, scale=0.2), "v": normal(96, 3, 3, 3, scale=0.2)}
        shape = ["n", 3, 30, 30]
    nodes = [node(operator, ["p", "w"], ["h"]), node(operator, ["x", "v"], ["z"]), node("Add", ["h", "z"], ["y"])]
    source, target = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(model(nodes, {"x": shape}, {"y": None}, held), source)
    x = {"x": normal(2, *shape[1:])}  # type: ignore[arg-type]
    np.savez(tmp_path / "d.npz", **x)
    report = convert(source, output=target, scheme=scheme, data=tmp_path / "d.npz", algorithm=None)
    rows = {row.name: row.scheme for row in report.layers}
    assert rows["v"] and "p" not in {name for name, label in rows.items() if label}
    expected, got = (Session(path).run(x)["y"] for path in (source, target))
    assert 10 * np.log10(np.square(expected).sum() / np.square(expected - got).sum()) > LEAST[scheme] - 5
