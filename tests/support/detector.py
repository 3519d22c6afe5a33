"""A detector of the YOLO kind as a graph: SiLU, Split, Concat, MaxPool, Resize, and a head that ends in a Softmax."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from support.graphs import model, node

#: Bins of a box's side, of which the head takes the mean.
BINS = 16


class Detector:
    """Builds the graph; values are called after the nodes that write them.

    Args:
        side: rows and columns of a picture, a multiple of 32.
        width: channels of the first layer.
        classes: what is told apart.
    """

    def __init__(self, side: int = 320, width: int = 16, classes: int = 80) -> None:
        self.side, self.width, self.classes = side, width, classes
        self.nodes: list[onnx.NodeProto] = []
        self.held: dict[str, np.ndarray] = {}
        self._random = np.random.default_rng(0)

    def graph(self) -> onnx.ModelProto:
        """From ``image`` ``[batch, 3, side, side]`` to ``boxes`` ``[batch, 4, places]`` and ``scores``."""
        w = self.width
        x = self._silu_conv("image", 3, w, stride=2)
        x = self._silu_conv(x, w, 2 * w, stride=2)
        x = self._block(x, 2 * w)
        fine = self._block(self._silu_conv(x, 2 * w, 4 * w, stride=2), 4 * w)
        middle = self._block(self._silu_conv(fine, 4 * w, 8 * w, stride=2), 8 * w)
        coarse = self._pooled(self._silu_conv(middle, 8 * w, 16 * w, stride=2), 16 * w)
        up = self._concat(self._twice(coarse), middle)
        middle = self._block(self._silu_conv(up, 24 * w, 8 * w, size=1), 8 * w)
        up = self._concat(self._twice(middle), fine)
        fine = self._block(self._silu_conv(up, 12 * w, 4 * w, size=1), 4 * w)
        levels = ((fine, 4 * w), (middle, 8 * w), (coarse, 16 * w))
        boxes, scores = zip(*(self._head(x, channels) for x, channels in levels), strict=True)
        places = sum((self.side // stride) ** 2 for stride in (8, 16, 32))
        self._boxes(self._concat(*boxes, axis=2), places)
        self.nodes.append(node("Sigmoid", [self._concat(*scores, axis=2)], ["scores"]))
        image = {"image": ["batch", 3, self.side, self.side]}
        return model(self.nodes, image, {"boxes": None, "scores": None}, self.held)

    def _add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        name = f"{operator.lower()}{len(self.nodes)}"
        names = [name, *(f"{name}_{number}" for number in range(1, outputs))]
        self.nodes.append(node(operator, list(inputs), names, name=name, **attributes))
        return name

    def _constant(self, name: str, values: object, dtype: type = np.int64) -> str:
        self.held[name] = np.asarray(values, dtype)
        return name

    def _conv(self, x: str, inputs: int, outputs: int, size: int = 3, stride: int = 1, gain: float = 1.3) -> str:
        number, count = len(self.nodes), inputs * size * size
        weight = self._random.standard_normal((outputs, inputs, size, size)) * gain / np.sqrt(count)
        bias = self._random.standard_normal(outputs) / 4
        parts = self._constant(f"w{number}", weight, np.float32), self._constant(f"b{number}", bias, np.float32)
        return self._add("Conv", x, *parts, pads=[size // 2] * 4, strides=[stride] * 2)

    def _silu_conv(self, x: str, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> str:
        x = self._conv(x, inputs, outputs, size, stride)
        return self._add("Mul", x, self._add("Sigmoid", x))

    def _concat(self, *values: str, axis: int = 1) -> str:
        return self._add("Concat", *values, axis=axis)

    def _block(self, x: str, channels: int) -> str:
        """Two halves, of which one goes through two layers that it is added to."""
        half = channels // 2
        first = self._add("Split", self._silu_conv(x, channels, channels, size=1), outputs=2, axis=1)
        second = f"{first}_1"
        inner = self._silu_conv(self._silu_conv(second, half, half), half, half)
        joined = self._concat(first, second, self._add("Add", second, inner))
        return self._silu_conv(joined, 3 * half, channels, size=1)

    def _pooled(self, x: str, channels: int) -> str:
        """What is largest within 5, 9 and 13 places, beside the value itself."""
        half = channels // 2
        found = [self._silu_conv(x, channels, half, size=1)]
        for _ in range(3):
            found.append(self._add("MaxPool", found[-1], kernel_shape=[5, 5], pads=[2] * 4))
        return self._silu_conv(self._concat(*found), 4 * half, channels, size=1)

    def _twice(self, x: str) -> str:
        scales = self._constant("scales", [1, 1, 2, 2], np.float32)
        return self._add(
            "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        )

    def _head(self, x: str, channels: int) -> tuple[str, str]:
        """Bins of the four sides, and scores of the classes, ``[batch, ..., places]``, as small as trained ones are."""
        found = []
        for outputs in (4 * BINS, self.classes):
            inner = self._silu_conv(self._silu_conv(x, channels, outputs), outputs, outputs)
            flat = self._constant(f"flat{outputs}", [0, outputs, -1])
            found.append(self._add("Reshape", self._conv(inner, outputs, outputs, size=1, gain=6.0), flat))
        return found[0], found[1]

    def _boxes(self, bins: str, places: int) -> None:
        sides = self._add("Reshape", bins, self._constant("sides", [0, 4, BINS, places]))
        shares = self._add("Softmax", self._add("Transpose", sides, perm=[0, 2, 1, 3]), axis=1)
        mean = self._constant("mean", np.arange(BINS).reshape(1, BINS, 1, 1), np.float32)
        whole = self._constant("whole", [0, 4, places])
        self.nodes.append(node("Reshape", [self._add("Conv", shares, mean), whole], ["boxes"]))


def save_detector(path: Path) -> Path:
    """The graph as a file."""
    onnx.save(Detector().graph(), path)
    return path
