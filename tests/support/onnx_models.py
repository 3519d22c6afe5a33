"""Small ONNX models: a convolutional network and an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from support.graphs import model, node, normal


def cnn() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "stem.weight"], ["a"], name="stem", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", "gamma", "beta", "beta", "gamma"], ["an"]), node("Relu", ["an"], ["ar"]),
        node("Conv", ["ar", "body.weight", "body.bias"], ["c"], name="body", pads=[1, 1, 1, 1]),
        node("Add", ["c", "ar"], ["s"]), node("Relu", ["s"], ["sr"]),
        node("GlobalAveragePool", ["sr"], ["p"]), node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "head.weight", "head.bias"], ["y"], name="head", transB=1),
    ]  # fmt: skip
    held = {
        "stem.weight": normal(64, 3, 3, 3, scale=0.3), "gamma": np.abs(normal(64, seed=1)) + 0.5, "beta": normal(64),
        "body.weight": normal(64, 64, 3, 3, seed=2, scale=0.05), "body.bias": normal(64, seed=3),
        "head.weight": normal(128, 64, seed=4), "head.bias": normal(128, seed=5),
    }  # fmt: skip
    return model(nodes, {"x": ["n", 3, 12, 12]}, {"y": ["n", 128]}, held)


def encoder() -> onnx.ModelProto:
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("MatMul", ["e", "up.weight"], ["u"], name="up"), node("Add", ["u", "up.bias"], ["ub"]),
        node("Erf", ["ub"], ["g"]),
        node("MatMul", ["g", "down.weight"], ["d"], name="down"), node("Add", ["d", "e"], ["s"]),
        node("LayerNormalization", ["s", "ln", "lb"], ["y"]),
    ]  # fmt: skip
    held = {
        "table": normal(300, 64), "up.weight": normal(64, 256, seed=1, scale=0.1), "up.bias": normal(256, seed=2),
        "down.weight": normal(256, 64, seed=3, scale=0.1), "ln": np.ones(64, np.float32),
        "lb": np.zeros(64, np.float32),
    }  # fmt: skip
    proto = model(nodes, {}, {"y": ["n", "m", 64]}, held)
    proto.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "m"]))
    return proto


def feeds(name: str, count: int = 16) -> dict[str, np.ndarray]:
    if name == "cnn":
        return {"x": normal(count, 3, 12, 12, seed=9)}
    return {"ids": np.random.default_rng(9).integers(0, 300, (count, 7))}


def halved(proto: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name))
    for each in (*proto.graph.input, *proto.graph.output):
        if each.type.tensor_type.elem_type == TensorProto.FLOAT:
            each.type.tensor_type.elem_type = TensorProto.FLOAT16
    return proto


def save_products(path: Path, layers: int, width: int) -> Path:
    """A chain of products of square float32 matrices, which lie in a file beside it: ``4 * layers * width ** 2`` bytes.

    They are written one by one, so that whoever measures memory holds none.
    """
    nodes: list[onnx.NodeProto] = []
    proto = model(nodes, {"x": ["n", width]}, {f"y{layers - 1}": ["n", width]}, {})
    beside = path.with_name(f"{path.name}.data")
    with beside.open("wb") as stream:
        for layer in range(layers):
            tensor = onnx.TensorProto(name=f"w{layer}", dims=[width, width], data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": beside.name, "offset": stream.tell(), "length": 4 * width**2}.items():
                tensor.external_data.add(key=key, value=str(value))
            stream.write(normal(width, width, seed=layer, scale=width**-0.5).tobytes())
            proto.graph.initializer.append(tensor)
            before = f"y{layer - 1}" if layer else "x"
            proto.graph.node.append(node("MatMul", [before, tensor.name], [f"a{layer}"], name=f"product{layer}"))
            proto.graph.node.append(node("Relu", [f"a{layer}"], [f"y{layer}"]))
    onnx.save(proto, path)
    return path
