"""Which kernels the runtime says it runs: integer ones, float ones with weights, conversions that were left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from support.tiny_onnx import FLOAT, classifier, save, weights

from quantcli.models.kernels import INTEGER_KERNELS, Proof, prove

X = helper.make_tensor_value_info("x", FLOAT, ["n", 8])
Y = helper.make_tensor_value_info("y", FLOAT, ["n", 7])


def test_a_float_model(tmp_path: Path) -> None:
    proof = prove(classifier(tmp_path / "m.onnx", *weights()))
    assert proof.integer == {} and proof.conversions == 0
    assert sum(map(len, proof.floating.values())) == 1 and set(proof.floating) <= {"Gemm", "FusedGemm"}
    assert proof.to_json()["float_kernels"] == dict.fromkeys(proof.floating, 1)
    assert proof.runtime.startswith("onnxruntime 1.")


def test_a_product_of_activations_is_not_heavy(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info("x", FLOAT, [4, 4])
    out = helper.make_tensor_value_info("y", FLOAT, [4, 4])
    proof = prove(save(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "x"], ["y"])], [info], [out], {}))
    assert proof.kernels.get("MatMul") == 1 and proof.floating == {}


def test_a_dynamic_product_is_integer(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-127, 127, (8, 7), np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["p"]),
        helper.make_node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "scale"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    constants = {"w": codes, "scale": np.array(0.01, np.float32)}
    proof = prove(save(tmp_path / "m.onnx", nodes, [X], [Y], constants))
    assert sum(proof.integer.values()) == 1 and proof.integer.keys() <= INTEGER_KERNELS
    assert proof.floating == {}


def test_weights_that_are_expanded_first_are_float_work(tmp_path: Path) -> None:
    """A pair that the runtime cannot fuse, since the input is not quantized, is a conversion beside a float product."""
    constants = {"w": np.ones((8, 7), np.int8), "scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wide"]),
        helper.make_node("MatMul", ["x", "wide"], ["y"], name="product"),
    ]
    proof = prove(save(tmp_path / "m.onnx", nodes, [X], [Y], constants))
    assert list(proof.floating.values()) in ([["product"]], []) and not proof.integer.keys() & {"QLinearMatMul"}
    assert proof.floating or sum(proof.integer.values()) == 1  # newer runtimes multiply with the codes themselves


def test_counts_are_told_apart() -> None:
    proof = Proof("r", {"QGemm": 2, "QuantizeLinear": 1, "DequantizeLinear": 3, "Relu": 1}, {"Conv": ["a", "b"]})
    assert proof.to_json() == {
        "runtime": "r", "integer_kernels": {"QGemm": 2}, "float_kernels": {"Conv": 2}, "conversions_left": 4,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["QLinearConv", "MatMulNBits", "DynamicQuantizeMatMul"])
def test_what_our_rewrites_become_is_integer(name: str) -> None:
    assert name in INTEGER_KERNELS
