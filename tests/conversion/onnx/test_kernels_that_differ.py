"""Graphs for which onnxruntime's integer kernels compute something else: artifacts keep clear of these kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantcli import convert


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[Any], opset: int) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def outputs(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def kept_db(model: Path, artifact: Path, x: np.ndarray) -> float:
    before, after = outputs(model, x), outputs(artifact, x)
    assert before.shape == after.shape
    noise = np.square(before.astype(np.float64) - after).sum()
    return float(10 * np.log10(np.square(before.astype(np.float64)).sum() / noise))


@pytest.mark.parametrize("pool", [{"ceil_mode": 1, "count_include_pad": 1}, {"dilations": [2, 2]}, {"ceil_mode": 1}])
@pytest.mark.parametrize("last", ["Conv", "Relu"])
def test_pools(tmp_path: Path, pool: dict[str, Any], last: str) -> None:
    generator = np.random.default_rng(0)
    weights = {"w": (generator.standard_normal((16, 16, 3, 3)) * 0.1).astype(np.float32), "b": np.ones(16, np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1] * 4),
        helper.make_node("AveragePool", ["h"], ["a"], kernel_shape=[3, 3], strides=[2, 2], **pool),
        helper.make_node("Conv", ["a", "w"], ["y" if last == "Conv" else "z"], pads=[1] * 4),
    ]
    if last == "Relu":
        nodes.append(helper.make_node("Relu", ["z"], ["y"]))
    x = generator.standard_normal((8, 16, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    model = save(tmp_path / "model.onnx", nodes, weights, ["n", 16, 12, 12], 19)
    convert(model, tmp_path / "out.onnx", scheme="int8-static", data=tmp_path / "data.npz")
    assert kept_db(model, tmp_path / "out.onnx", x) > 30


@pytest.mark.parametrize(
    ("channels", "added"), [(1, (7,)), (1, (1, 7)), (7, (1, 1, 7)), (7, (7,)), (7, (4, 1)), (7, (2, 4, 7))]
)
def test_a_sum_that_is_no_bias(tmp_path: Path, channels: int, added: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    weights = {"w": (generator.standard_normal((512, channels)) * 0.1).astype(np.float32)}
    weights["s"] = generator.standard_normal(added).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["s", "h"], ["y"])]
    model = save(tmp_path / "model.onnx", nodes, weights, ["n", 512], 17)
    convert(model, tmp_path / "out.onnx", scheme="int8-dynamic")
    assert kept_db(model, tmp_path / "out.onnx", generator.standard_normal((4, 512)).astype(np.float32)) > 25


def test_a_gemm_whose_bias_is_one_value_per_row(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = {"w": (generator.standard_normal((512, 7)) * 0.1).astype(np.float32)}
    weights["c"] = 5 * generator.standard_normal((7, 1)).astype(np.float32)
    x = generator.standard_normal((28, 512)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x[:, None].repeat(7, 1))
    model = save(tmp_path / "model.onnx", [helper.make_node("Gemm", ["x", "w", "c"], ["y"])], weights, [7, 512], 17)
    convert(model, tmp_path / "out.onnx", scheme="int8-static", data=tmp_path / "data.npz")
    assert kept_db(model, tmp_path / "out.onnx", x[:7]) > 25


def test_a_bias_made_for_half_precision(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = {"w": (generator.standard_normal((64, 8, 3, 3)) * 0.1).astype(np.float16)}
    x = 1 + generator.standard_normal((16, 8, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    model = save(tmp_path / "model.onnx", nodes, weights, ["n", 8, 8, 8], 17)
    convert(model, tmp_path / "out.onnx", scheme="int8", data=tmp_path / "data.npz")
    assert kept_db(model, tmp_path / "out.onnx", x) > 35
