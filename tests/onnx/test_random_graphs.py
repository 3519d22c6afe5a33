"""Networks drawn at random: whatever follows whatever, layers planned as integers are integers, and others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.graphs import model, node
from support.static_graphs import IMAGE, Converted, conv, net, normal

#: Every value is an image of 8 channels and 10 x 10 positions.
_KINDS = [
    *["conv"] * 3, "bias", "depthwise", "small", "add", "mul", "sub", "concat", "Relu", "Clip", "hardtanh", "MaxPool",
    "AveragePool", "Sigmoid", "Tanh", "LeakyRelu", "add_constant", "transposes", "reshapes", "norm", "resize", "pad",
]  # fmt: skip


class _Net:
    """A network in the making."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.held: dict[str, np.ndarray] = {}
        self.values = ["x"]
        for _ in range(self.rng.integers(4, 14)):
            self.values.append(self.grow(self.rng.choice(_KINDS), self.rng.choice(self.values[-3:])))
        last = self.op("Conv", self.values[-1], self.weight(8, 8, 3, 3), pads=[1, 1, 1, 1])
        if self.rng.random() < 0.5:
            flat = self.op("Flatten", self.op("GlobalAveragePool", last))
            self.nodes.append(node("Gemm", [flat, self.weight(8, 40), self.weight(40)], ["y"]))
        else:
            self.nodes.append(node("Relu", [last], ["y"]))

    def name(self) -> str:
        return f"v{len(self.nodes)}_{len(self.held)}"

    def constant(self, values: Any) -> str:
        name = f"c{len(self.held)}"
        self.held[name] = np.asarray(values)
        return name

    def weight(self, *shape: int) -> str:
        size = np.prod(shape[1:]) if len(shape) > 1 else 1
        return self.constant((self.rng.standard_normal(shape) / np.sqrt(size)).astype(np.float32))

    def op(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = self.name()
        self.nodes.append(node(op, list(inputs), [output], **attributes))
        return output

    def grow(self, kind: str, value: str) -> str:
        other = self.values[self.rng.integers(len(self.values))]
        same = {"pads": [1, 1, 1, 1]}
        if kind == "conv":
            return self.op("Conv", value, self.weight(8, 8, 3, 3), **same)
        if kind == "bias":
            return self.op("Conv", value, self.weight(8, 8, 3, 3), self.weight(8), **same)
        if kind == "depthwise":
            return self.op("Conv", value, self.weight(8, 1, 7, 7), group=8, pads=[3, 3, 3, 3])
        if kind == "small":  # too small a weight to be quantized
            return self.op("Conv", value, self.weight(8, 8, 1, 1))
        if kind in ("add", "mul", "sub"):
            return self.op(kind.capitalize(), value, other)
        if kind == "concat":
            both = self.op("Concat", value, other, axis=1)
            return self.op("Conv", both, self.weight(8, 16, 3, 3), **same)
        if kind in ("Clip", "hardtanh"):
            bounds = (0, 1.5) if kind == "Clip" else (-1, 1)
            return self.op("Clip", value, *(self.constant(np.float32(bound)) for bound in bounds))
        if kind in ("MaxPool", "AveragePool"):
            return self.op(kind, value, kernel_shape=[3, 3], **same)
        if kind == "add_constant":
            return self.op("Add", value, self.weight(10, 10))
        if kind == "transposes":
            return self.op("Transpose", self.op("Transpose", value, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])
        if kind == "reshapes":
            flat = self.op("Reshape", value, self.constant(np.array([0, 8, 100])))
            return self.op("Reshape", flat, self.constant(np.array([0, 8, 10, 10])))
        if kind == "norm":
            parts = [self.constant((np.abs(self.rng.standard_normal(8)) + 0.5).astype(np.float32)) for _ in range(4)]
            return self.op("BatchNormalization", value, *parts)
        if kind == "resize":
            large = self.op("Resize", value, "", self.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
            return self.op("MaxPool", large, kernel_shape=[2, 2], strides=[2, 2])
        if kind == "pad":
            wide = self.op("Pad", value, self.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
            return self.op("Conv", wide, self.weight(8, 8, 3, 3))
        return self.op(kind, value)

    def model(self) -> onnx.ModelProto:
        outputs = ["y", *({self.values[self.rng.integers(1, len(self.values))]} if self.rng.random() < 0.4 else ())]
        return model(self.nodes, IMAGE, dict.fromkeys(outputs), self.held)


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(tmp_path: Path, seed: int) -> None:
    found = Converted(_Net(seed).model(), tmp_path)
    planned = sum(each.node.op_type in ("Conv", "Gemm") for each in found.plan.of_mode("static"))
    assert found.kernels.get("QLinearConv", 0) + found.kernels.get("QGemm", 0) == planned
    for name, expected in found.before.items():
        noise = np.square(expected - found.after[name]).mean()
        # A network of so few layers, of which some cancel their inputs.
        assert noise <= 0.05 * np.square(expected).mean() + 1e-4


def test_an_output_that_is_pooled_and_read_on_keeps_its_range(tmp_path: Path) -> None:
    """Its name goes to what is dequantized, and calibration still knows it by that name."""
    nodes = [
        conv("x", "w", "z", "b"), node("MaxPool", ["z"], ["p"], kernel_shape=[2, 2]), conv("p", "w2", "y"),
    ]  # fmt: skip
    found = Converted(net(nodes, outputs=("y", "z")), tmp_path)
    assert found.kernels == {"QLinearConv": 2, "MaxPool": 1}
    assert found.sqnr_db("z") > 30 and found.sqnr_db("y") > 25


def test_a_float_layer_behind_what_codes_can_pass_stays_float(tmp_path: Path) -> None:
    nodes = [
        conv("x", "w", "a"), node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2]), conv("p", "w2", "c"),
        node("Reshape", ["c", "s"], ["r"]), conv("r", "w3", "y"),
    ]  # fmt: skip
    weight = normal(8, 8, 3, 3)
    weight[0, 0] = 50
    found = Converted(net(nodes, w2=weight, s=np.array([0, 8, 9, 9])), tmp_path, skip=["w2"])
    assert found.kernels["QLinearConv"] == 2 and sum(map(len, found.proof.floating.values())) == 1
