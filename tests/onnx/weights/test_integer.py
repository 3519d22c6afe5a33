"""Integer weights: no sum of two products leaves 16 bits, in numpy and in the runtime; biases fit into 32 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from support.graphs import codes_of, model, node, normal, run
from support.static_graphs import Converted, net

from quantcli.core.scheme import PRESETS, Granularity, NumberFormat
from quantcli.models.session import Session
from quantcli.onnx.weights.integer import integer_weight
from quantcli.onnx.weights.saturation import exact_scale, pairing

INT8 = PRESETS["int8"].weights
TENSOR = NumberFormat("int8", Granularity("tensor"))


def layer(op: str, weight: np.ndarray, **attributes: Any) -> tuple[ir.Graph, ir.Node]:
    proto = model([node(op, ["x", "w"], ["y"], **attributes)], {"x": None}, {"y": None}, {"w": weight})
    graph = ir.from_proto(proto).graph
    return graph, graph[0]


def in_order(op: str, codes: np.ndarray, trans: int = 0) -> np.ndarray:
    """Codes as ``[channels, k]``, in the order in which products are taken: images with channels last."""
    if op == "Conv":
        return np.moveaxis(codes, 1, -1).reshape(codes.shape[0], -1)
    return codes if trans else codes.T


def saturates(rows: np.ndarray) -> bool:
    """Whether some bytes make a sum of two neighbouring products leave 16 bits: each is 0 or 255 at its worst."""
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    pairs = rows.astype(np.int64).reshape(rows.shape[0], -1, 2)
    sums = [pairs @ np.array(x) for x in ((255, 255), (255, 0), (0, 255))]
    return any(bool((s != np.clip(s, -(2**15), 2**15 - 1)).any()) for s in sums)


ADVERSARIAL = {
    "normal": lambda shape: normal(*shape, seed=3),
    "all equal": lambda shape: np.ones(shape, dtype=np.float32),
    "all negative": lambda shape: -np.ones(shape, dtype=np.float32),
    "signs": lambda shape: np.where(np.indices(shape).sum(0) % 2, 1, -1).astype(np.float32),
    "one pair": lambda shape: np.where(np.arange(np.prod(shape)).reshape(shape) % 7 < 2, 1, 1e-3).astype(np.float32),
    "almost half": lambda shape: np.where(np.random.default_rng(0).random(shape) < 0.5, 1.0, 0.996).astype(np.float32),
    "spikes": lambda shape: normal(*shape, seed=4) ** 5,
    "tiny": lambda shape: normal(*shape, seed=5) * np.float32(1e-30),
    "zeros": lambda shape: np.zeros(shape, dtype=np.float32),
}
LAYERS: list[tuple[str, tuple[int, ...], dict[str, int]]] = [
    ("MatMul", (32, 24), {}), ("MatMul", (33, 5), {}), ("Gemm", (32, 24), {}), ("Gemm", (24, 33), {"transB": 1}),
    ("Conv", (8, 16, 1, 1), {}), ("Conv", (8, 16, 3, 3), {}), ("Conv", (8, 3, 3, 3), {}), ("Conv", (8, 5, 1, 1), {}),
    ("Conv", (8, 3, 3, 3), {"group": 2}), ("Conv", (8, 1, 3, 3), {}), ("Conv", (8, 1, 3, 3), {"group": 4}),
    ("Conv", (8, 6, 5), {}),
]  # fmt: skip


@pytest.mark.parametrize("number_format", [INT8, TENSOR], ids=["channel", "tensor"])
@pytest.mark.parametrize("algorithm", ["rtn", "mse"])
@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize(("op", "shape", "attributes"), LAYERS)
def test_no_pair_of_products_can_saturate(
    op: str, shape: tuple[int, ...], attributes: dict[str, int], kind: str, algorithm: str, number_format: NumberFormat
) -> None:
    weight = ADVERSARIAL[kind](shape)
    graph, each = layer(op, weight, **attributes)
    found = integer_weight(graph, each, number_format, algorithm)
    assert found.codes.const_value is not None
    codes = found.codes.const_value.numpy()
    assert codes.dtype == np.int8 and codes.shape == shape
    assert not saturates(in_order(op, codes, attributes.get("transB", 0)))
    scales = found.scales.reshape([-1 if axis == found.axis else 1 for axis in range(len(shape))])
    assert np.isfinite(scales).all() and (scales > 0).all()
    restored = codes * scales.astype(np.float64)
    # Narrowed to half its codes at the worst; mse may cut the largest.
    assert np.abs(restored - weight).max() <= np.abs(weight).max() * (0.5 if algorithm == "mse" else 1.01 / 127)


@pytest.mark.parametrize(("op", "shape", "attributes"), LAYERS)
def test_unprotected_weights_would_saturate(op: str, shape: tuple[int, ...], attributes: dict[str, int]) -> None:
    """The test above can fail."""
    graph, each = layer(op, np.ones(shape, dtype=np.float32), **attributes)
    found = integer_weight(graph, each, INT8, "rtn", floats=True)
    assert found.codes.const_value is not None and found.narrowed == 0
    assert saturates(in_order(op, found.codes.const_value.numpy(), attributes.get("transB", 0)))


def test_only_channels_that_need_it_are_narrowed() -> None:
    weight = normal(64, 8) * 0.01
    weight[10] = 1  # Alone among small ones: its pair stays far below.
    weight[20:22, 3] = 5
    graph, each = layer("MatMul", weight)
    found, plain = integer_weight(graph, each, INT8, "rtn"), integer_weight(graph, each, INT8, "rtn", floats=True)
    wider = found.scales > 1.04 * plain.scales
    assert wider.tolist() == [channel == 3 for channel in range(8)] and found.narrowed >= 1
    np.testing.assert_allclose(found.scales[3], 10 / 127, rtol=1e-6)


def test_a_depthwise_convolution_keeps_all_its_codes() -> None:
    ones = np.ones((16, 1, 3, 3), dtype=np.float32)
    graph, each = layer("Conv", ones, group=16)
    assert not exact_scale(pairing(each, ones), ones).any()
    assert (np.abs(codes_of_value(integer_weight(graph, each, INT8, "rtn").codes)) == 127).all()


def codes_of_value(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def has_saturating_arithmetic() -> bool:
    """Ask the runtime: bytes of 255 times codes of 127, with a kernel that adds pairs in 16 bits, or does not."""
    weight = np.full((64, 16), 127, dtype=np.int8)
    nodes = [node("MatMulInteger", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 2, [4, 64])], [helper.make_tensor_value_info("y", 6, [4, 16])],
        [helper.make_tensor("w", 3, weight.shape, weight.tobytes(), raw=True)],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    x = np.full((4, 64), 255, dtype=np.uint8)
    got = Session(proto.SerializeToString(), threads=1).run({"x": x})["y"]
    return bool((got != 64 * 255 * 127).any())


SATURATING = pytest.mark.skipif(
    not has_saturating_arithmetic(), reason="this CPU adds products in 32 bits (VNNI, or not x86): nothing saturates"
)


def byte_inputs(*shape: int) -> np.ndarray:
    """Mostly ends of the range, so that pairs are at their worst."""
    rng = np.random.default_rng(1)
    x = np.where(rng.random(shape) < 0.8, 1.0, rng.random(shape)).astype(np.float32)
    x.reshape(-1)[0] = 0
    return x


def error_of(found: Converted) -> float:
    """Largest deviation from the stored numbers: from onnx's own reference, or in floats where pairs are unfused."""
    proto = onnx.load(found.path)
    if found.plan.of_mode("dynamic"):
        wide = ReferenceEvaluator(proto).run(None, found.feeds)[0]
    else:
        wide = run(proto, found.feeds)["y"]
    return float(np.abs(wide - found.after["y"]).max() / np.abs(wide).max())


def positive(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).uniform(0.9, 1, shape).astype(np.float32)


IN_THE_RUNTIME = [
    ("MatMul", (64, 24), {}, ["n", "m", 64], (2, 5, 64)), ("MatMul", (65, 24), {}, ["n", 65], (1, 65)),
    ("MatMul", (64, 24), {}, ["n", 64], (7, 64)), ("Gemm", (64, 24), {}, ["n", 64], (7, 64)),
    ("Gemm", (24, 65), {"transB": 1}, ["n", 65], (7, 65)), ("Gemm", (24, 65), {"transB": 1}, ["n", 65], (1, 65)),
    ("Conv", (40, 16, 1, 1), {}, ["n", 16, 8, 8], (2, 16, 8, 8)),
    ("Conv", (16, 16, 3, 3), {}, ["n", 16, 8, 8], (2, 16, 8, 8)),
    ("Conv", (16, 3, 3, 3), {}, ["n", 3, 8, 8], (2, 3, 8, 8)),
    ("Conv", (16, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}, ["n", 3, 8, 8], (2, 3, 8, 8)),
    ("Conv", (16, 3, 3, 3), {"group": 2}, ["n", 6, 8, 8], (2, 6, 8, 8)),
    ("Conv", (32, 1, 3, 3), {}, ["n", 1, 8, 8], (2, 1, 8, 8)),
    ("Conv", (32, 1, 3, 3), {"group": 8}, ["n", 8, 8, 8], (2, 8, 8, 8)),
    ("Conv", (32, 1, 3, 3), {"group": 32}, ["n", 32, 8, 8], (2, 32, 8, 8)),
    ("Conv", (32, 1, 5, 5), {"group": 32}, ["n", 32, 8, 8], (2, 32, 8, 8)),
    ("Conv", (32, 16, 5), {}, ["n", 16, 20], (2, 16, 20)),
    ("Conv", (32, 1, 9), {"group": 32}, ["n", 32, 20], (2, 32, 20)),
    ("Conv", (16, 4, 3, 3, 3), {}, ["n", 4, 6, 6, 6], (2, 4, 6, 6, 6)),
]  # fmt: skip


#: Convolutions are never made dynamic.
BY_SCHEME = [(*case, "int8-static") for case in IN_THE_RUNTIME]
BY_SCHEME += [(*case, "int8-dynamic") for case in IN_THE_RUNTIME if case[0] != "Conv"]


@pytest.mark.parametrize("signs", ["positive", "negative", "by channel", "by position"])
@pytest.mark.parametrize(("op", "shape", "attributes", "dims", "fed", "scheme"), BY_SCHEME)
def test_the_runtime_computes_exactly_what_is_stored(
    tmp_path: Path, op: str, shape: tuple[int, ...], attributes: dict[str, Any], dims: list[Any],
    fed: tuple[int, ...], scheme: str, signs: str,
) -> None:  # fmt: skip
    """Bytes of 255 on codes as large as they come, in each order of taking pairs that a kernel may have."""
    weight = positive(*shape) * (-1 if signs == "negative" else 1)
    if signs == "by channel" and len(shape) > 2:
        weight[:, ::2] *= -1
    elif signs == "by position" and len(shape) > 2:
        weight[..., ::2] *= -1
    proto = net([node(op, ["x", "w"], ["y"], **attributes)], inputs={"x": dims}, w=weight)
    found = Converted(proto, tmp_path, {"x": byte_inputs(*fed)}, scheme)
    assert not found.proof.floating
    # Static convolutions write bytes: one step of 255.
    tolerance = 1.01 / 255 if op == "Conv" and scheme == "int8-static" else 1e-5
    assert error_of(found) <= tolerance


@SATURATING
@pytest.mark.parametrize(("op", "shape", "attributes", "dims", "fed"), IN_THE_RUNTIME[:4])
def test_this_cpu_does_saturate_without_protection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, shape: tuple[int, ...], attributes: dict[str, Any],
    dims: list[Any], fed: tuple[int, ...],
) -> None:  # fmt: skip
    """So the test above can fail here."""
    zeros = lambda kind, rows: np.zeros(rows.shape[0], dtype=np.float32)  # noqa: E731
    monkeypatch.setattr("quantcli.onnx.weights.saturation.exact_scale", zeros)
    proto = net([node(op, ["x", "w"], ["y"], **attributes)], inputs={"x": dims}, w=positive(*shape))
    assert error_of(Converted(proto, tmp_path, {"x": byte_inputs(*fed)})) > 0.05


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_the_bias_of_a_channel_without_weights_fits_into_32_bits(tmp_path: Path, op: str) -> None:
    shape, dims = ((8, 8, 3, 3), ["n", 8, 10, 10]) if op == "Conv" else ((32, 24), ["n", 32])
    weight, bias = normal(*shape, seed=1), normal(shape[0] if op == "Conv" else 24, seed=2)
    dead = (0,) if op == "Conv" else (slice(None), 0)
    tiny = (1,) if op == "Conv" else (slice(None), 1)
    weight[dead], weight[tiny] = 0, 1e-12
    bias[:3] = [100.0, -100.0, 0.0]
    proto = net([node(op, ["x", "w", "b"], ["y"])], inputs={"x": dims}, w=weight, b=bias)
    found = Converted(proto, tmp_path)
    codes = codes_of(found.graph, "b_quantized")
    assert codes.dtype == np.int32 and np.abs(codes.astype(np.int64)).max() <= 2**30 + 128
    scales = codes_of(found.graph, "b_scale").astype(np.float64)
    np.testing.assert_allclose(codes * scales, bias, rtol=1e-5, atol=scales.max())
    step = float(codes_of(found.graph, "y_scale")) if op == "Conv" else 1e-3
    got, expected = (each.swapaxes(0, 1)[:2] for each in (found.after["y"], found.before["y"]))
    np.testing.assert_allclose(got, expected, atol=0.51 * step + 1e-3)


def test_a_zero_weight_and_a_zero_input_have_scales_all_the_same(tmp_path: Path) -> None:
    weight = np.zeros((32, 24), dtype=np.float32)
    proto = net([node("Gemm", ["x", "w", "b"], ["y"])], inputs={"x": ["n", 32]}, w=weight, b=normal(24))
    found = Converted(proto, tmp_path, {"x": np.zeros((3, 32), dtype=np.float32)})
    np.testing.assert_allclose(found.after["y"], found.before["y"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [{}, {"b": np.array([1.5], np.float32)}])
def test_a_layer_of_several_slabs_whose_channels_share_a_least_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bias: dict[str, np.ndarray]
) -> None:
    proto = net([node("Gemm", ["x", "w", *bias], ["y"])], inputs={"x": ["n", 32]}, w=normal(32, 24), **bias)
    whole = Converted(proto, tmp_path)
    monkeypatch.setattr("quantcli.onnx.weights.integer._SLAB_ELEMENTS", 32 * 10)
    (tmp_path / "slabs").mkdir()
    slabs = Converted(proto, tmp_path / "slabs")
    assert np.array_equal(codes_of(slabs.graph, "w_quantized"), codes_of(whole.graph, "w_quantized"))
