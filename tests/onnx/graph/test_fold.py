"""Folding into weights: the same function before and after in onnxruntime, and what must be left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support.graphs import model, node, normal, operators, prepared, run, same_function

SIZES = {"Conv": (6, 4, 3, 3), "ConvTranspose": (4, 6, 3, 3), "Gemm": (4, 6)}


def batch_norm(channels: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "gamma": normal(channels, seed=3),
        "beta": normal(channels, seed=4),
        "mean": normal(channels, seed=5),
        "variance": rng.uniform(0.01, 3, channels).astype(np.float32),
    }


def layer(
    op: str,
    *followers: onnx.NodeProto,
    bias: bool = True,
    weight: np.ndarray | None = None,
    constants: dict[str, np.ndarray] | None = None,
    outputs: Any = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """x -> op -> h -> followers -> y."""
    weight = normal(*SIZES[op], seed=1) if weight is None else weight
    inputs = ["x", "w", *(["b"] if bias else [])]
    channels = {"Conv": weight.shape[0], "ConvTranspose": weight.shape[1] * attributes.get("group", 1)}.get(
        op, weight.shape[0 if attributes.get("transB") else 1]
    )
    held = {"w": weight, **({"b": normal(channels, seed=2)} if bias else {}), **(constants or {})}
    spatial = weight.ndim - 2
    shape = ["n", 4, *[9] * spatial] if op != "Gemm" else ["n", 4]
    return model([node(op, inputs, ["h"], **attributes), *followers], {"x": shape}, outputs or {"y": None}, held)


def fed(proto: onnx.ModelProto, batch: int = 3) -> dict[str, np.ndarray]:
    dims = [each.dim_value or batch for each in proto.graph.input[0].type.tensor_type.shape.dim]
    return {"x": normal(*dims, seed=11)}


NORM = node("BatchNormalization", ["h", "gamma", "beta", "mean", "variance"], ["y"], epsilon=3e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [("Conv", {"pads": [1, 1, 1, 1]}), ("ConvTranspose", {"strides": [2, 2]}), ("Gemm", {}), ("Gemm", {"transB": 1})],
)
def test_batch_norm_goes_into_the_weight(op: str, attributes: dict[str, Any], bias: bool) -> None:
    weight = normal(6, 4, seed=1) if "transB" in attributes else None
    proto = layer(op, NORM, bias=bias, constants=batch_norm(), weight=weight, **attributes)
    after = prepared(proto)
    same_function(proto, fed(proto), after)
    assert operators(after) == {op: 1}
    assert len(after.graph.initializers) == 2


def test_batch_norm_after_a_grouped_and_a_depthwise_convolution_is_folded() -> None:
    for group, shape in ((2, (6, 2, 3, 3)), (4, (4, 1, 3, 3)), (4, (8, 1, 3, 3))):
        proto = layer("Conv", NORM, weight=normal(*shape), constants=batch_norm(shape[0]), group=group)
        after = prepared(proto)
        same_function(proto, fed(proto), after)
        assert operators(after) == {"Conv": 1}


def test_a_grouped_transposed_convolution_keeps_its_batch_norm() -> None:
    proto = layer("ConvTranspose", NORM, weight=normal(4, 3, 3, 3), constants=batch_norm(), group=2)
    after = prepared(proto)
    same_function(proto, fed(proto), after)
    assert operators(after) == {"ConvTranspose": 1, "BatchNormalization": 1}


def test_a_batch_norm_in_training_mode_stays() -> None:
    norm = node("BatchNormalization", ["h", "gamma", "beta", "mean", "variance"], ["y", "m", "v"], training_mode=1)
    proto = layer("Conv", norm, constants=batch_norm())
    after = prepared(proto)
    same_function(proto, fed(proto), after)
    assert operators(after)["BatchNormalization"] == 1


CONV_SHAPES = [(), (1,), (1, 1, 1), (6, 1, 1), (1, 6, 1, 1)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div"])
def test_constants_after_a_convolution_are_folded(op: str, shape: tuple[int, ...], first: bool) -> None:
    constant = np.asarray(normal(*shape, seed=9) + 3)
    proto = layer("Conv", node(op, ["h", "c"] if first else ["c", "h"], ["y"]), constants={"c": constant})
    after = prepared(proto)
    same_function(proto, fed(proto), after)
    kept = not first and op in ("Sub", "Div")
    assert operators(after) == ({"Conv": 1, op: 1} if kept else {"Conv": 1})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (1, 6)])
@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div"])
@pytest.mark.parametrize("bias", [True, False])
def test_constants_after_a_gemm_are_folded(op: str, shape: tuple[int, ...], bias: bool) -> None:
    constant = np.asarray(normal(*shape, seed=9) + 3)
    proto = layer("Gemm", node(op, ["h", "c"], ["y"]), bias=bias, constants={"c": constant})
    after = prepared(proto)
    same_function(proto, fed(proto), after)
    assert operators(after) == {"Gemm": 1}


@pytest.mark.parametrize(
    ("op", "shape", "batch"),
    [
        ("Conv", (7,), 3), ("Conv", (7, 7), 3), ("Conv", (7, 1), 3), ("Conv", (1, 7, 7), 3),  # over space
        ("Conv", (6, 7, 7), 3), ("Conv", (6, 1, 7), 3), ("Conv", (6, 7, 1), 3),
        ("Conv", (3, 1, 1, 1), 3), ("Conv", (3, 6, 1, 1), 3), ("Conv", (2, 6, 1, 1), 1),  # over samples
        ("Conv", (1, 1, 6, 1, 1), 3), ("Conv", (1, 1, 1, 1, 1), 3), ("Conv", (1, 1, 1, 1), 3),  # of more dimensions
        ("Gemm", (3, 1), 3), ("Gemm", (3, 6), 3), ("Gemm", (6, 1), 1), ("Gemm", (1, 1, 6), 3), ("Gemm", (1, 1, 1), 3),
        ("Gemm", (6, 1, 1), 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("follower", ["Add", "Mul"])
def test_other_constants_are_left_or_change_nothing(op: str, shape: tuple[int, ...], batch: int, follower: str) -> None:
    proto = layer(op, node(follower, ["h", "c"], ["y"]), constants={"c": normal(*shape, seed=9)})
    after = prepared(proto)
    same_function(proto, fed(proto, batch), after)
    if shape != (1, 1, 1, 1):
        assert operators(after) == {op: 1, follower: 1}


@pytest.mark.parametrize("shape", [(6, 1), (1, 6, 1), (6, 1, 1), (1, 6, 1, 1), (7,), (1,)])
def test_constants_after_a_convolution_over_one_dimension(shape: tuple[int, ...]) -> None:
    proto = layer("Conv", node("Mul", ["h", "c"], ["y"]), weight=normal(6, 4, 3), constants={"c": normal(*shape)})
    after = prepared(proto)
    same_function(proto, fed(proto, batch=1), after)
    assert ("Mul" not in operators(after)) == (shape in ((6, 1), (1, 6, 1), (1,)))


@pytest.mark.parametrize("shape", [(7, 1, 1), (7, 1, 1, 1), (1, 7, 1, 1, 1), (1, 7, 1, 1)])
def test_constants_after_a_convolution_over_three_dimensions(shape: tuple[int, ...]) -> None:
    """Channels and depth are both 7, so that a mistake is no error."""
    proto = layer("Conv", node("Mul", ["h", "c"], ["y"]), weight=normal(7, 4, 3, 3, 3), constants={"c": normal(*shape)})
    after = prepared(proto)
    same_function(proto, fed(proto, batch=1), after)
    assert ("Mul" not in operators(after)) == (shape in ((7, 1, 1, 1), (1, 7, 1, 1, 1)))


def test_a_chain_of_affine_nodes_vanishes() -> None:
    chain = [
        node("Sub", ["h", "a"], ["h1"]), node("Mul", ["h1", "c"], ["h2"]),
        node("BatchNormalization", ["h2", "gamma", "beta", "mean", "variance"], ["h3"]),
        node("Add", ["h3", "c"], ["y"]),
    ]  # fmt: skip
    constants = {"a": normal(6, 1, 1, seed=1), "c": normal(6, 1, 1, seed=2), **batch_norm()}
    proto = layer("Conv", *chain, constants=constants)
    after = prepared(proto)
    same_function(proto, fed(proto), after)
    assert operators(after) == {"Conv": 1}


@pytest.mark.parametrize("extra", ["h", "second"])
def test_a_value_that_others_see_is_not_changed(extra: str) -> None:
    """The convolution's own output is also read by another node, or is an output of the graph."""
    nodes = [node("Mul", ["h", "c"], ["y"]), *([node("Relu", ["h"], ["second"])] if extra == "second" else [])]
    proto = layer("Conv", *nodes, constants={"c": normal(6, 1, 1)}, outputs={"y": None, extra: None})
    after = prepared(proto)
    same_function(proto, fed(proto), after)
    assert operators(after)["Mul"] == 1


def test_a_value_added_to_itself_is_not_a_constant() -> None:
    proto = layer("Conv", node("Add", ["h", "h"], ["y"]))
    same_function(proto, fed(proto), prepared(proto))


def test_shared_weights_are_scaled_for_one_layer_only() -> None:
    nodes = [
        node("Conv", ["x", "w", "b"], ["h1"], pads=[1, 1, 1, 1]), node("Mul", ["h1", "c"], ["r"]),
        node("Conv", ["r", "w", "b"], ["y"]),
    ]  # fmt: skip
    constants = {"w": normal(4, 4, 3, 3), "b": normal(4), "c": normal(4, 1, 1, seed=2)}
    proto = model(nodes, {"x": ["n", 4, 8, 8]}, {"y": None}, constants)
    after = prepared(proto)
    same_function(proto, fed(proto), after)
    assert operators(after) == {"Conv": 2}


def test_a_weight_that_is_an_output_too_keeps_its_values() -> None:
    outputs = {"y": None, "w": (6, 4, 3, 3)}
    proto = layer("Conv", node("Mul", ["h", "c"], ["y"]), constants={"c": normal(6, 1, 1)}, outputs=outputs)
    same_function(proto, fed(proto), prepared(proto))


def test_a_weight_that_is_computed_is_left() -> None:
    nodes = [node("Conv", ["x", "v"], ["h"]), node("Mul", ["h", "c"], ["y"])]
    inputs = {"x": ["n", 4, 9, 9], "v": [6, 4, 3, 3]}
    proto = model(nodes, inputs, {"y": None}, {"c": normal(6, 1, 1)})
    after = prepared(proto)
    same_function(proto, {**fed(proto), "v": normal(6, 4, 3, 3, seed=5)}, after)
    assert operators(after) == {"Conv": 1, "Mul": 1}


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}])
def test_a_scaled_gemm_is_left(attributes: dict[str, float]) -> None:
    proto = layer("Gemm", NORM, constants=batch_norm(), **attributes)
    after = prepared(proto)
    same_function(proto, fed(proto), after)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (3, 6), (1, 6)])
def test_a_gemm_with_a_bias_of_another_shape(shape: tuple[int, ...]) -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["h"]), node("Mul", ["h", "c"], ["y"])]
    constants = {"w": normal(4, 6), "b": np.asarray(normal(*shape, seed=1)), "c": normal(6, seed=2)}
    proto = model(nodes, {"x": ["n", 4]}, {"y": None}, constants)
    same_function(proto, fed(proto), prepared(proto))


def test_a_division_by_zero_stays_one() -> None:
    divisor = np.array([1, 2, 0, 4, 5, 6], dtype=np.float32).reshape(6, 1, 1)
    proto = layer("Conv", node("Div", ["h", "c"], ["y"]), constants={"c": divisor})
    after = prepared(proto)
    with np.errstate(all="raise"):
        expected, got = run(proto, fed(proto))["y"], run(after, fed(proto))["y"]
    np.testing.assert_array_equal(np.isinf(expected), np.isinf(got))
    assert np.isfinite(expected[:, 0]).all() and np.isinf(expected[:, 2]).all()


def half_conv(factor: float) -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w"], ["h"]), node("Mul", ["h", "c"], ["y"])]
    constants = {"w": normal(6, 4, 3, 3).astype(np.float16), "c": np.full((6, 1, 1), factor, dtype=np.float16)}
    return model(nodes, {"x": ["n", 4, 9, 9]}, {"y": None}, constants, dtype=TensorProto.FLOAT16)


def test_half_precision_is_folded_and_stays_so() -> None:
    proto = half_conv(3.0)
    after = prepared(proto)
    assert operators(after) == {"Conv": 1}
    same_function(proto, {"x": fed(proto)["x"].astype(np.float16)}, after, 5e-3)


def test_what_would_overflow_half_precision_is_left() -> None:
    """The product with a small input fits, the weight times the factor does not."""
    proto = half_conv(60000.0)
    after = prepared(proto)
    same_function(proto, {"x": (fed(proto)["x"] * 1e-3).astype(np.float16)}, after, 5e-3)
    assert operators(after) == {"Conv": 1, "Mul": 1}


def test_a_weight_that_others_share_is_not_copied() -> None:
    """As in heads that share their convolutions and have norms of their own."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]), node("Mul", ["a", "s"], ["y"]),
        node("Conv", ["x", "w"], ["b"]), node("Mul", ["b", "t"], ["z"]),
    ]  # fmt: skip
    constants = {"w": normal(64, 32, 1, 1), "s": normal(64, 1, 1, seed=1), "t": normal(64, 1, 1, seed=2)}
    proto = model(nodes, {"x": ["n", 32, 4, 4]}, {"y": None, "z": None}, constants)
    after = prepared(proto)
    assert operators(after) == {"Conv": 2, "Mul": 2}
    same_function(proto, {"x": normal(2, 32, 4, 4)}, after)
