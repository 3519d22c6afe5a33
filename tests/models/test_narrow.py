"""Numbers of types that numpy lacks go into onnxruntime and come back as they were."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper
from support.tiny_onnx import save

import quantcli
from quantcli.models.narrow import packed, unpacked
from quantcli.models.session import Session

TYPES = {
    "bfloat16": TensorProto.BFLOAT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8_e5m2": TensorProto.FLOAT8E5M2,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int2": TensorProto.INT2,
    "uint2": TensorProto.UINT2,
}


def numbers(name: str) -> np.ndarray:
    return np.array([[0, 1, 2], [3, 1, 0], [1, 2, 3]]).astype(np.float32).astype(getattr(ml_dtypes, name))


@pytest.mark.parametrize("name", TYPES)
def test_a_session_takes_and_gives_them(tmp_path: Path, name: str) -> None:
    values = numbers(name)
    if name in ("int4", "int2"):
        values = (values.astype(np.int8) - 2).astype(values.dtype)
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["wide"], ["narrow"], to=TYPES[name]),
    ]
    inputs = [helper.make_tensor_value_info("x", TYPES[name], [3, 3])]
    outputs = [
        helper.make_tensor_value_info("wide", TensorProto.FLOAT, [3, 3]),
        helper.make_tensor_value_info("narrow", TYPES[name], [3, 3]),
    ]
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    found = Session(model.SerializeToString()).run({"x": values})
    assert found["narrow"].dtype == values.dtype
    np.testing.assert_array_equal(found["wide"], values.astype(np.float32))
    np.testing.assert_array_equal(found["narrow"].astype(np.float32), values.astype(np.float32))


@pytest.mark.parametrize("name", TYPES)
def test_packing_is_undone(name: str) -> None:
    values = numbers(name)
    laid_out = packed(values)
    assert laid_out.shape == values.shape
    np.testing.assert_array_equal(unpacked(laid_out.tobytes(), values.dtype, values.shape), values)


def test_two_numbers_of_four_bits_share_a_byte_lowest_bits_first() -> None:
    values = np.array([1, -2, 3]).astype(ml_dtypes.int4)
    assert packed(values)[:2].tolist() == [0xE1, 0x03]


def brain_floats(path: Path) -> Path:
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["wide", "w"], ["z"]),
        helper.make_node("Cast", ["z"], ["y"], to=TensorProto.BFLOAT16),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n", size])]
        for name, size in (("x", 64), ("y", 96))
    )
    weights = {"w": generator.standard_normal((64, 96)).astype(np.float32)}
    return save(path, nodes, inputs, outputs, weights)


def test_inputs_and_outputs_of_bfloat16(tmp_path: Path) -> None:
    model, data = brain_floats(tmp_path / "m.onnx"), tmp_path / "d.npz"
    np.savez(data, x=np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32))
    stats, artifact = tmp_path / "s.safetensors", tmp_path / "o.onnx"
    quantcli.calibrate(model, data=data, output=stats)
    assert quantcli.convert(model, artifact, scheme="int8-static", calibration=stats).details["outputs"]["compared"]
    found = quantcli.evaluate(model, [artifact], data=data, by_layer=True)
    assert found.models[1].metrics["sqnr_db"] > 25  # type: ignore[operator]


@pytest.mark.slow
def test_inputs_of_bfloat16_reach_a_process_of_its_own(tmp_path: Path) -> None:
    assert quantcli.bench(brain_floats(tmp_path / "m.onnx"), runs=2).passed
