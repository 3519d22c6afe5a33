"""What a layer's weight is multiplied by: rows of one value of the graph, or the windows of an image.

A convolution is the product of its weight and of the windows that it slides over, one column for each place in
a window (im2col); a grouped one is as many products as it has groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantcli.onnx.graph.operands import operand_of
from quantcli.onnx.graph.padding import auto_padding
from quantcli.onnx.graph.values import constant, input_of, integer, integers

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

#: Values of windows that are held at a time: an image's windows are as many times larger as they overlap.
_WINDOW_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Windows:
    """How a convolution slides over images. Sizes are of rows and columns; sequences are images of one column.

    ``pads``: top, left, bottom, right; None where ``auto_pad`` tells them from the image's size.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int] | None
    auto_pad: str

    @property
    def spans(self) -> list[int]:
        """How many rows and columns a window reaches over."""
        return [(size - 1) * dilation + 1 for size, dilation in zip(self.kernel, self.dilations, strict=True)]

    def padding(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, bottom and right of an image of rows and columns."""
        if self.pads is not None:
            return self.pads
        (top, bottom), (left, right) = auto_padding(self.auto_pad, size, self.spans, self.strides)
        return top, left, bottom, right


@dataclass(frozen=True)
class LayerInput:
    """One value of the graph as a layer's weight meets it: rows of ``columns`` for each of ``groups``.

    ``turned``: the value's columns are the rows (a Gemm with transA). ``weight_turned``: how the weight lies in the
    file, so that one weight's readers can be told apart.
    """

    value: str
    columns: int
    groups: int = 1
    turned: bool = False
    weight_turned: bool = False
    windows: Windows | None = None

    @property
    def gram_bytes(self) -> int:
        """Size of the sum of x x^T, float32."""
        return 4 * self.groups * self.columns**2

    def rows(self, values: np.ndarray) -> Iterator[Tensor]:
        """The rows, float32 ``[groups, rows, columns]``, in parts that fit in memory."""
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        if self.windows is None:
            yield (tensor.T if self.turned else tensor).reshape(1, -1, self.columns)
        else:
            for image in tensor:
                for part in _unfolded(image, self.windows):
                    yield part.reshape(self.groups, self.columns, -1).mT


def layer_input(node: ir.Node, weight: ir.TensorProtocol) -> LayerInput | str:
    """What a node multiplies its weight by, or why there is no such thing."""
    data = input_of(node, 0)
    if node.op_type == "Gather":
        return "a lookup multiplies by nothing"
    if data is None or data.name is None or constant(data) is not None:
        return "its input is constant"
    if node.op_type == "Conv":
        return _convolution(node, data.name, tuple(weight.shape.numpy()))
    operand = operand_of(node)
    if isinstance(operand, str):
        return operand
    turned = node.op_type == "Gemm" and bool(integer(node, "transA", 0))
    return LayerInput(data.name, operand.columns, turned=turned, weight_turned=operand.transposed)


def _convolution(node: ir.Node, value: str, shape: Sequence[int]) -> LayerInput | str:
    _, channels, *kernel = shape
    if len(kernel) not in (1, 2):
        return f"a convolution over {len(kernel)} dimensions"
    strides = integers(node, "strides") or [1] * len(kernel)
    dilations = integers(node, "dilations") or [1] * len(kernel)
    auto = node.attributes.get("auto_pad")
    auto_pad = "NOTSET" if auto is None else auto.as_string()
    pads = (integers(node, "pads") or [0] * 2 * len(kernel)) if auto_pad == "NOTSET" else None
    if len(kernel) == 1:
        kernel, strides, dilations = [*kernel, 1], [*strides, 1], [*dilations, 1]
        pads = None if pads is None else [pads[0], 0, pads[1], 0]
    windows = Windows(
        (kernel[0], kernel[1]),
        (strides[0], strides[1]),
        (dilations[0], dilations[1]),
        None if pads is None else (pads[0], pads[1], pads[2], pads[3]),
        auto_pad,
    )
    return LayerInput(value, channels * kernel[0] * kernel[1], integer(node, "group", 1), windows=windows)


def _unfolded(image: Tensor, windows: Windows) -> Iterator[Tensor]:
    """Windows of one image ``[channels, ..., columns]`` as columns ``[channels * kernel, places]``, in strips."""
    from torch.nn import functional

    image = image.reshape(*image.shape[:2], -1)
    top, left, bottom, right = windows.padding((image.shape[1], image.shape[2]))
    padded = functional.pad(image, (left, right, top, bottom))
    spans = windows.spans
    high, wide = (
        (length - span) // stride + 1
        for length, span, stride in zip(padded.shape[1:], spans, windows.strides, strict=True)
    )
    stride = windows.strides[0]
    strip = max(1, _WINDOW_ELEMENTS // max(1, len(image) * windows.kernel[0] * windows.kernel[1] * wide))
    for start in range(0, high, strip):
        stop = min(start + strip, high)
        part = padded[:, start * stride : (stop - 1) * stride + spans[0]]
        yield functional.unfold(part[None], windows.kernel, windows.dilations, stride=windows.strides)[0]
