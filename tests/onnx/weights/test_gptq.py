"""GPTQ on ONNX graphs, end to end: codes against the naive oracle, error on held-out data, and what is said."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from benchmarks import scoring
from support import oracles, real_models
from support.graphs import model, node, normal, prepared

import quantcli
from quantcli.cli.app import main
from quantcli.core.numerics import quantize
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.core.tensors import Hessian, QuantizedTensor
from quantcli.errors import InputError, UsageError
from quantcli.evaluation import contamination
from quantcli.models.session import Session
from quantcli.onnx.execution.nbits_decode import decode
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.plan import NodePlan
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.onnx.rewrite.transform import transform
from quantcli.onnx.weights.compensation import compensate
from quantcli.planning.recipe import Recipe, validate

TOKENS = 300
INT8 = NumberFormat("int8", Granularity("channel"), narrow=True)


def mixed(*shape: int, seed: int) -> np.ndarray:
    """Float32 values whose last axis is correlated, some channels far larger than others."""
    columns = shape[-1]
    mixing = normal(columns, columns, seed=7) * np.random.default_rng(8).random(columns) ** 2
    return (normal(*shape, seed=seed) @ mixing).astype(np.float32)


def images(count: int, seed: int, channels: int = 8) -> np.ndarray:
    """Smooth images ``[count, channels, 10, 10]`` of correlated channels."""
    found = mixed(count, 10, 10, channels, seed=seed)
    return np.ascontiguousarray(np.moveaxis((found + np.roll(found, 1, 1) + np.roll(found, 1, 2)) / 3, -1, 1))


def product_model(columns: int, rows: int) -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "w"], ["y"], name="product")]
    return model(nodes, {"x": ["n", columns]}, {"y": ["n", rows]}, {"w": normal(columns, rows, seed=1)})


def convolution_model(group: int) -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w"], ["y"], name="conv", group=group, pads=[1, 1, 1, 1])]
    held = {"w": normal(32 * group, 8 // group, 3, 3, seed=1)}
    return model(nodes, {"x": ["n", 8, 10, 10]}, {"y": ["n", 32 * group, 10, 10]}, held)


@dataclass
class Case:
    """A converted model of one layer, what it was calibrated on, and the layer's inputs as rows of groups."""

    source: Path
    artifact: Path
    report: Any
    held_out: np.ndarray

    def graph(self) -> ir.Model:
        return open_onnx(self.artifact).ir

    def error(self, artifact: Path | None = None) -> float:
        expected, got = (
            Session(path, threads=1).run({"x": self.held_out})["y"].astype(np.float64)
            for path in (self.source, artifact or self.artifact)
        )
        return float(np.square(expected - got).sum())


def converted(folder: Path, proto: onnx.ModelProto, x: np.ndarray, held_out: np.ndarray, **wishes: Any) -> Case:
    source, out = folder / "model.onnx", folder / f"{wishes.get('algorithm', 'gptq')}.onnx"
    onnx.save(proto, source)
    np.savez(folder / "x.npz", x=x)
    report = quantcli.convert(
        source, out, data=folder / "x.npz", samples=len(x), force=True, **({"algorithm": "gptq"} | wishes)
    )
    return Case(source, out, report, held_out)


def oracle_codes(weight: np.ndarray, scale: np.ndarray, rows: np.ndarray, number_format: NumberFormat) -> np.ndarray:
    """What the naive GPTQ makes of a weight ``[rows, columns]`` on given scales ``[rows, groups]``."""
    gram = rows.astype(np.float64).T @ rows.astype(np.float64)
    base = QuantizedTensor(
        torch.zeros(weight.shape, dtype=torch.int8), torch.from_numpy(scale.copy()), None, weight.shape, number_format
    )
    return oracles.gptq(torch.from_numpy(weight), torch.from_numpy(gram).float(), base, 0.01)


def same_as_oracle(got: np.ndarray, naive: np.ndarray, weight: np.ndarray, rows: np.ndarray, most: float) -> None:
    ours, theirs = (np.square(rows.astype(np.float64) @ (each - weight).T).sum() for each in (got, naive))
    assert ours == pytest.approx(theirs, rel=0.03)
    # Float32 may tip a value that lies between two codes, and what follows it.
    assert np.mean(np.abs(got - naive) > 1e-5) < most


def test_four_bit_products_are_the_oracles(tmp_path: Path) -> None:
    x = mixed(TOKENS, 128, seed=2)
    case = converted(tmp_path, product_model(128, 48), x, mixed(200, 128, seed=3), scheme="int4", group_size=32)
    (found,) = (each for each in case.graph().graph if each.op_type == "MatMulNBits")
    scale = found.inputs[2].const_value.numpy().reshape(48, 4)
    weight = normal(128, 48, seed=1).T.copy()
    naive = oracle_codes(weight, scale, x, NumberFormat("int4", Granularity("group", 32)))
    same_as_oracle(decode(found), naive, weight, x, 0.03)
    assert case.report.layers[0].scheme == "int4 group 32"


def windows(x: np.ndarray, group: int) -> list[np.ndarray]:
    """Rows of each group of a 3 x 3 convolution with one pixel of padding, window by window."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    per = x.shape[1] // group
    return [
        np.array([
            image[g * per : (g + 1) * per, top : top + 3, left : left + 3].reshape(-1)
            for image in padded
            for top, left in product(range(10), range(10))
        ])
        for g in range(group)
    ]  # fmt: skip


@pytest.mark.parametrize("group", [1, 2, 8])
def test_convolutions_are_the_oracles_group_by_group(tmp_path: Path, group: int) -> None:
    x = images(6, 2)
    case = converted(tmp_path, convolution_model(group), x, images(6, 3), scheme="int8")
    graph = case.graph().graph
    codes, scale = (graph.initializers[f"w_{part}"].const_value.numpy() for part in ("quantized", "scale"))
    weight, scale = normal(32 * group, 8 // group, 3, 3, seed=1).reshape(32 * group, -1), scale.reshape(-1)
    for g, rows in enumerate(windows(x, group)):
        part = slice(32 * g, 32 * (g + 1))
        naive = oracle_codes(weight[part], scale[part, None], rows, INT8)
        got = codes.reshape(weight.shape)[part] * scale[part, None]
        same_as_oracle(got, naive, weight[part], rows, 0.05)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_integer_products_are_the_oracles_and_cannot_saturate(tmp_path: Path, scheme: str) -> None:
    x = mixed(TOKENS, 96, seed=2)
    case = converted(tmp_path, product_model(96, 40), x, mixed(200, 96, seed=3), scheme=scheme)
    graph = case.graph().graph
    codes, scale = (graph.initializers[f"w_{part}"].const_value.numpy() for part in ("quantized", "scale"))
    weight = normal(96, 40, seed=1).T.copy()
    naive = oracle_codes(weight, scale[:, None], x, INT8)
    same_as_oracle(codes.T * scale[:, None], naive, weight, x, 0.05)
    pairs = codes.T.astype(int).reshape(40, 48, 2)
    assert max(np.maximum(sign * pairs, 0).sum(-1).max() for sign in (1, -1)) <= 128
    # The naive codes may well: that is what was drawn in.
    assert np.abs(codes).max() <= 127


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("product", "int4"), ("product", "int8"), ("product", "int8-dynamic"), ("conv", "int8"), ("conv", "int8-static")],
)
def test_held_out_error_is_lower_than_without_data(tmp_path: Path, kind: str, scheme: str) -> None:
    if kind == "product":
        proto, x, held_out = product_model(128, 48), mixed(TOKENS, 128, seed=2), mixed(200, 128, seed=3)
    else:
        proto, x, held_out = convolution_model(1), images(24, 2), images(12, 3)
    errors = {
        algorithm: converted(tmp_path, proto, x, held_out, scheme=scheme, algorithm=algorithm).error()
        for algorithm in ("rtn", "mse", "gptq")
    }
    # Products of eight-bit weights round their inputs as well, which then is most of the error.
    shares = {"int4": 0.8, "int8": 0.8 if kind == "conv" else 0.9, "int8-dynamic": 0.95, "int8-static": 0.99}
    assert errors["gptq"] < shares[scheme] * min(errors["rtn"], errors["mse"])


def test_nf4_is_nearer_than_without_data_where_its_blocks_end_with_rows(tmp_path: Path) -> None:
    case = converted(
        tmp_path, product_model(128, 48), mixed(TOKENS, 128, seed=2), mixed(200, 128, seed=3), scheme="nf4"
    )
    quantcli.convert(case.source, tmp_path / "rtn.onnx", scheme="nf4")
    assert case.error() < 0.8 * case.error(tmp_path / "rtn.onnx")
    ragged = converted(tmp_path, product_model(96, 48), mixed(TOKENS, 96, seed=2), mixed(9, 96, seed=3), scheme="nf4")
    because = "rtn in place of gptq: its blocks reach over the ends of rows"
    assert any(because in warning for warning in ragged.report.warnings)


def encoder() -> onnx.ModelProto:
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("Gather", ["tied", "ids"], ["t"], name="embed again"), node("Add", ["e", "t"], ["s"]),
        node("MatMul", ["s", "up"], ["u"], name="up"), node("Erf", ["u"], ["g"]),
        node("MatMul", ["g", "down"], ["d"], name="down"),
        node("Reshape", ["d", "flat"], ["f"]), node("Gemm", ["f", "tied"], ["y"], name="head", transB=1),
    ]  # fmt: skip
    held = {
        "table": normal(300, 64), "up": normal(64, 256, seed=1, scale=0.1),
        "down": normal(256, 64, seed=3, scale=0.1), "tied": normal(300, 64, seed=4), "flat": np.array([-1, 64]),
    }  # fmt: skip
    proto = model(nodes, {}, {"y": ["k", 300]}, held)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", "m"]))
    return proto


@pytest.fixture
def home(tmp_path: Path) -> Path:
    onnx.save(encoder(), tmp_path / "encoder.onnx")
    np.savez(tmp_path / "ids.npz", ids=np.random.default_rng(9).integers(0, 300, (24, 16)))
    return tmp_path


def test_the_manifest_names_each_layers_algorithm_and_the_report_what_fell_back(home: Path) -> None:
    wishes: dict[str, Any] = {"scheme": "int4", "algorithm": "gptq", "data": home / "ids.npz"}
    report = quantcli.convert(home / "encoder.onnx", home / "out.onnx", **wishes)
    quantcli.convert(home / "encoder.onnx", home / "again.onnx", **wishes)
    assert (home / "out.onnx").read_bytes() == (home / "again.onnx").read_bytes()
    manifest = open_onnx(home / "out.onnx").manifest.to_json()
    assert manifest["algorithm"] == "gptq and mse and rtn"
    algorithms = {name: layer["algorithm"] for name, layer in manifest["layers"].items()}
    assert algorithms == {"up": "gptq", "down": "gptq", "table": "mse", "tied": "rtn", "head": "rtn"}
    assert "mse in place of gptq: a lookup multiplies by nothing" in manifest["layers"]["table"]["note"]
    said = " ".join(report.warnings)
    assert "1 layer: mse in place of gptq: a lookup multiplies by nothing." in said
    assert "rtn in place of gptq: a lookup reads the same table." in said
    ids = np.load(home / "ids.npz")["ids"]
    # That eval can tell when it is given the same text.
    assert contamination.overlap(manifest["calibration_fingerprint"], [{"ids": row[None]} for row in ids]) == 1.0
    assert not (home / ".out.onnx.partial").exists()


def test_what_cannot_be_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert = ["convert", str(home / "encoder.onnx"), "-o", str(home / "out.onnx")]

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*convert, *arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and not (home / "out.onnx").exists() and not (home / ".out.onnx.partial").exists()
        return " ".join(shown.err.split())

    gptq = ["--scheme", "int4", "--algorithm", "gptq"]
    assert "gptq needs calibration data: give --data." in refused(*gptq)
    assert "gptq needs calibration data: give --data." in refused(*gptq, "--dry-run")
    quantcli.calibrate(home / "encoder.onnx", data=home / "ids.npz", output=home / "s.safetensors")
    said = refused("--scheme", "int8-static", "--algorithm", "gptq", "--calibration", str(home / "s.safetensors"))
    assert "gptq needs calibration data: give --data. STATS hold the ranges" in said
    data = ["--data", str(home / "ids.npz")]
    said = refused("--scheme", "int4", "--algorithm", "awq", *data)
    assert "The algorithm awq does not work on ONNX graphs. Choose among rtn, mse, gptq, qat." in said
    assert "--device cuda does not apply to ONNX" in refused(*gptq, *data, "--device", "cuda")


@pytest.mark.parametrize(
    "recipe", [{"steps": ["smoothquant", "gptq"]}, {"rules": [{"match": "up", "algorithm": "awq"}]}]
)
def test_recipes_with_other_algorithms_are_refused(home: Path, recipe: dict[str, Any]) -> None:
    wishes = validate({"scheme": "int4", **recipe}, "recipe")
    with pytest.raises(UsageError, match="does not work on ONNX graphs"):
        quantcli.convert(home / "encoder.onnx", home / "out.onnx", recipe=wishes, data=home / "ids.npz")


def test_recipes_choose_layers_and_damping(home: Path) -> None:
    wishes = validate({"scheme": "int4", "rules": [{"match": "up", "algorithm": "gptq"}]}, "recipe")
    quantcli.convert(home / "encoder.onnx", home / "one.onnx", recipe=wishes, data=home / "ids.npz")
    layers = open_onnx(home / "one.onnx").manifest.to_json()["layers"]
    assert {name: layer["algorithm"] for name, layer in layers.items() if name in ("up", "down")} == {
        "up": "gptq", "down": "mse",
    }  # fmt: skip
    outputs = []
    for damping in (0.01, 1.0):
        wishes = validate({"scheme": "int4", "steps": [{"gptq": {"damping": damping}}]}, "recipe")
        quantcli.convert(home / "encoder.onnx", home / "d.onnx", recipe=wishes, data=home / "ids.npz", force=True)
        outputs.append(Session(home / "d.onnx").run({"ids": np.arange(16)[None]})["y"])
    assert not np.array_equal(*outputs)


def test_where_another_scheme_is_tried_it_has_the_same_inputs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.conversion.onnx.advice.GOOD_OUTPUT_SQNR_DB", 1000.0)
    wishes: dict[str, Any] = {"scheme": "int8-static", "algorithm": "gptq", "data": home / "ids.npz"}
    report = quantcli.convert(home / "encoder.onnx", home / "out.onnx", **wishes)
    assert any("int8-dynamic" in warning and "dB" in warning for warning in report.warnings)


def test_inputs_that_are_zero_in_every_sample(tmp_path: Path) -> None:
    case = converted(tmp_path, product_model(64, 32), np.zeros((8, 64), np.float32), normal(8, 64), scheme="int4")
    assert "1 layer: mse in place of gptq: its input was zero in every sample." in case.report.warnings
    assert case.report.models[1].details["algorithm"] == "mse"
    plain = converted(tmp_path, product_model(64, 32), normal(8, 64), normal(8, 64), scheme="int4", algorithm="mse")
    assert case.error() == plain.error()


BROKEN = torch.ones(1, 64, 64) * 1e6 + torch.eye(64) * (1 - 1e6)


class Fake:
    """Hessians that no algorithm can use: off-diagonal entries far larger than the diagonal."""

    def of(self, _: NodePlan) -> Hessian:
        return Hessian(BROKEN)

    def problem(self, _: NodePlan) -> str | None:
        return None


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-dynamic"])
def test_a_singular_hessian_falls_back_and_says_so(scheme: str) -> None:
    plain, fallen = prepared(product_model(64, 32)), prepared(product_model(64, 32))
    base = "mse" if scheme == "int4" else "rtn"
    transform(plain, resolve_graph(Recipe(scheme=scheme, algorithm=base), plain, Path("m")), Evidence())
    plan = resolve_graph(Recipe(scheme=scheme, algorithm="gptq"), fallen, Path("m"))
    (outcome,) = transform(fallen, plan, Evidence(hessians=Fake()))
    assert outcome.rounding is not None
    assert outcome.rounding.note == f"{base} in place of gptq: its inputs' Hessian cannot be factored"
    assert outcome.plan.algorithm == base and outcome.rounding.note in (outcome.plan.note or "")
    assert ir.to_proto(plain).SerializeToString() == ir.to_proto(fallen).SerializeToString()


def grid(weight: torch.Tensor) -> QuantizedTensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = quantize(weight[:, None], scale, None, INT8)[:, 0]
    return QuantizedTensor(codes, scale, None, tuple(weight.shape), INT8)


def test_groups_that_fail_and_groups_that_see_nothing() -> None:
    weight = torch.from_numpy(normal(6, 64))
    base = grid(weight)
    rows = torch.from_numpy(mixed(300, 64, seed=1))
    good = (rows.T @ rows)[None]
    found = compensate(weight, base, torch.float32, Hessian(torch.cat([good, BROKEN, torch.zeros(1, 64, 64)])))
    assert found.rounding.algorithm == "gptq"
    assert found.rounding.note == "rtn in place of gptq in 1 of 3 groups: its inputs' Hessian cannot be factored"
    assert torch.equal(found.tensor.codes[2:], base.codes[2:])
    assert not torch.equal(found.tensor.codes[:2], base.codes[:2])
    # Not positive definite by little: more damping helps.
    shifted = good - 0.05 * good.diagonal(dim1=1, dim2=2).mean() * torch.eye(64)
    found = compensate(weight, base, torch.float32, Hessian(shifted))
    assert (found.rounding.algorithm, found.rounding.note) == ("gptq", "gptq's damping raised to 0.1")


def test_a_bias_still_takes_back_what_weights_shift(tmp_path: Path) -> None:
    x = images(24, 2) + 1
    nodes = [node("Conv", ["x", "w", "b"], ["y"], name="conv")]
    held = {"w": normal(32, 8, 3, 3, seed=1) ** 3, "b": normal(32, seed=2)}
    proto = model(nodes, {"x": ["n", 8, 10, 10]}, {"y": ["n", 32, 8, 8]}, held)
    case = converted(tmp_path, proto, x, x, scheme="int8-static")
    expected, got = (Session(path).run({"x": x})["y"] for path in (case.source, case.artifact))
    shift, noise = (expected - got).mean((0, 2, 3)), (expected - got).std((0, 2, 3))
    assert np.abs(shift).mean() < 0.1 * noise.mean()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    proto = product_model(64, 32)
    values = normal(64, 32)
    values[3, 4] = np.inf
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    with pytest.raises(InputError, match="w holds NaN or infinite values"):
        converted(tmp_path, proto, normal(8, 64), normal(8, 64), scheme="int4")


@pytest.mark.slow
def test_a_real_encoder_is_nearer_than_without_data(tmp_path: Path) -> None:
    source, checkpoint = real_models.minilm(tmp_path)
    calibration, test = real_models.prose_halves(tmp_path)
    samples = real_models.sentences(test, source, checkpoint, 32)
    expected = scoring.outputs(source, samples)
    cosines = {}
    for algorithm in ("rtn", "mse", "gptq"):
        out = tmp_path / f"{algorithm}.onnx"
        quantcli.convert(
            source, out, scheme="int4", algorithm=algorithm, data=str(calibration), tokenizer=checkpoint, samples=64,
            seq_len=128,
        )  # fmt: skip
        cosines[algorithm] = scoring.cosine(expected, scoring.outputs(out, samples))
    # Measured on 64 sentences: 0.928, 0.940, 0.974.
    assert cosines["gptq"] > 0.965
    assert 1 - cosines["gptq"] < 0.6 * (1 - max(cosines["rtn"], cosines["mse"]))
    recipe = Path(__file__).parents[3] / "configs" / "encoder-int4-gptq.yaml"
    quantcli.convert(
        source, tmp_path / "recipe.onnx", recipe=recipe, data=str(calibration), tokenizer=checkpoint, samples=256,
        seq_len=128,
    )  # fmt: skip
    embeddings = [
        [each.reshape(-1, each.shape[-1]).mean(0) for each in found]
        for found in (expected, scoring.outputs(tmp_path / "recipe.onnx", samples))
    ]
    # Measured on 64 sentences: 0.991.
    assert np.mean([scoring.cosine([ours], [theirs]) for ours, theirs in zip(*embeddings, strict=True)]) >= 0.99


def test_a_weight_that_is_read_in_two_ways_is_rounded_plainly(tmp_path: Path) -> None:
    """As the right factor of a product and the left one of another: it is stored for both."""
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["w", "h"], ["g"]), node("MatMul", ["g", "v"], ["y"])]
    proto = model(nodes, {"x": [64, 64]}, {"y": None}, {"w": normal(64, 64), "v": normal(64, 64, seed=1)})
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=normal(2, 64, 64, seed=2))
    report = quantcli.convert(
        tmp_path / "m.onnx", tmp_path / "q.onnx", scheme="int4", algorithm="gptq", data=tmp_path / "d.npz",
        allow_larger=True,
    )  # fmt: skip
    notes = {row.name: row.details.get("note") or "" for row in report.layers if row.scheme}
    assert "in place of gptq: its weight is stored for readers of several kinds" in notes["w"]
    assert "in place of gptq" not in notes["v"]
