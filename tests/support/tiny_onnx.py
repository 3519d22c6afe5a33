"""Tiny ONNX models for tests, made with onnx's own helper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def save(path: Path, nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes, "tiny", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((8, 7)).astype(np.float32), generator.standard_normal(7).astype(np.float32)


def classifier(
    path: Path, weight: np.ndarray, bias: np.ndarray, *, output: str = "logits", kind: int = FLOAT, batch: object = "n"
) -> Path:
    """``x [n, inputs] @ weight + bias``, all in one dtype."""
    dtype = np.float16 if kind == HALF else np.float32
    return save(
        path,
        [helper.make_node("Gemm", ["x", "w", "b"], [output], name="gemm")],
        [helper.make_tensor_value_info("x", kind, [batch, weight.shape[0]])],
        [helper.make_tensor_value_info(output, kind, [batch, weight.shape[1]])],
        {"w": weight.astype(dtype), "b": bias.astype(dtype)},
    )


def language_model(path: Path, table: np.ndarray, head: np.ndarray, *, output: str = "logits") -> Path:
    """Logits of each token from itself alone: ``table[ids] @ head``, behind a mask that must be ones."""
    return save(
        path,
        [
            helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
            helper.make_node("Unsqueeze", ["mask", "axis"], ["column"]),
            helper.make_node("Mul", ["hidden", "column"], ["masked"]),
            helper.make_node("MatMul", ["masked", "head"], [output]),
        ],
        [
            helper.make_tensor_value_info("input_ids", INT64, ["n", "s"]),
            helper.make_tensor_value_info("attention_mask", INT64, ["n", "s"]),
        ],
        [helper.make_tensor_value_info(output, FLOAT, ["n", "s", head.shape[1]])],
        {"table": table, "head": head, "axis": np.array([2])},
    )
