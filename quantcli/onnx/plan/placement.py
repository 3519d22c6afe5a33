"""Where integers pay: which values of a graph are quantized when its convolutions and products are.

The table is what onnxruntime's CPU kernels fuse; tests build each pattern and read the optimized graph.
Every other operator stays float: a QuantizeLinear/DequantizeLinear pair around it would be pure cost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from quantcli.onnx.graph.values import (
    array,
    constant,
    input_of,
    integer,
    integers,
    is_standard,
    only_consumer,
    rank,
    text,
)

if TYPE_CHECKING:
    import onnx_ir as ir

#: Have an integer kernel for a constant weight.
ANCHORS = ("Conv", "Gemm", "MatMul")

#: Have an integer kernel where all inputs and the output are quantized. Sigmoid and LeakyRelu look codes up in a
#: table of 256: with Mul, SiLU takes a quarter of the time that it takes in floats between two conversions.
INTEGER_OPS = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")

#: Move values, or choose among them: codes pass as they are, so input and output share their scale.
PASS_THROUGH = (
    "MaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice", "Resize", "Gather",
    "Expand", "Tile", "DepthToSpace", "ReduceMax", "ReduceMin",
)  # fmt: skip


def has_wrong_kernel(node: ir.Node) -> bool:
    """Whether the runtime's integer kernel computes something else, or cannot be loaded.

    With ``ceil_mode`` and ``count_include_pad`` QLinearAveragePool divides by places beyond the padding too, where the
    float operator does not. It knows no dilations. A Resize takes the value that it gives places outside of the image
    for a code (onnxruntime 1.32; tests look at all of them).
    """
    if is_standard(node, "Resize"):
        return text(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    if not is_standard(node, "AveragePool"):
        return False
    dilated = any(dilation != 1 for dilation in integers(node, "dilations") or ())
    return dilated or bool(integer(node, "ceil_mode", 0) and integer(node, "count_include_pad", 0))


def has_slow_kernel(node: ir.Node) -> bool:
    """Whether the runtime's integer kernel takes longer than the float one and the conversions around it.

    QLinearSoftmax does: 1.1 to 2.2 times as long along the last dimension, 1.2 to 1.3 along others (onnxruntime 1.32).
    """
    return is_standard(node, "Softmax")


@dataclass(frozen=True)
class Placement:
    """What gets a QuantizeLinear and a DequantizeLinear.

    ``values``: each with the value whose range it takes (itself, or the source of a pass-through chain).
    ``nodes``: those that run on integers and so read dequantized values.
    """

    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    nodes: set[ir.Node] = field(default_factory=set)


def tail(node: ir.Node) -> ir.Value:
    """The value that a node's integer kernel writes: its output, past what is absorbed."""
    value = node.outputs[0]
    follower = only_consumer(value)
    while follower is not None and follower.inputs[0] is value and _is_absorbed(follower):
        value = follower.outputs[0]
        follower = only_consumer(value)
    return value


def _is_absorbed(node: ir.Node) -> bool:
    """Whether a node vanishes into the integer kernel before it: codes end where it cuts.

    The runtime wants the grid of the codes within the bounds. From zero upwards that is exact; other
    lower bounds lie between two codes, and then the convolution would stay float for the sake of the cut.
    """
    if is_standard(node, "Relu"):
        return True
    if not is_standard(node, "Clip"):
        return False
    low, high = array(input_of(node, 1)), input_of(node, 2)
    most = array(high)
    if low is None or float(low) != 0 or (high is not None and most is None):
        return False
    if most is None:
        return True
    highest_code = np.float32(255) * (np.float32(most) / np.float32(255))
    return bool(most > 0 and highest_code - np.float32(most) <= np.finfo(np.float32).eps)


def needs_quantized_output(node: ir.Node) -> bool:
    """Whether an anchor runs on integers only where its output is quantized too.

    A convolution does. A product of a matrix whose result goes into a sum would be made a float Gemm.
    """
    if node.op_type == "Conv":
        return True
    follower = only_consumer(node.outputs[0])
    data = node.inputs[0]
    return (
        node.op_type == "MatMul" and data is not None and rank(data) in (2, None)
        and follower is not None and is_standard(follower, "Add")
    )  # fmt: skip


def place(model: ir.Model, anchors: Iterable[ir.Node]) -> Placement:
    """Decide which values are quantized so that ``anchors`` run on integers.

    A convolution needs its input and its output quantized; a matrix product mostly its input only, and its
    output stays float unless that is quantized anyway. Other operators join where it takes no further pair.
    """
    chosen = list(anchors)
    placement = Placement()
    for node in chosen:
        data = node.inputs[0]
        assert data is not None
        placement.nodes.add(node)
        placement.values[data] = data
        if needs_quantized_output(node):
            output = tail(node)
            placement.values[output] = output
    _join_integer_ops(model, placement)
    _share_ranges(model, placement)
    return placement


def _join_integer_ops(model: ir.Model, placement: Placement) -> None:
    """Add operators all of whose inputs and outputs are quantized, or become so by what else joins.

    All that could join is taken at first, and what has an input in floats, or no reader of codes, goes again until
    nothing more does.
    """
    joined = [node for node in model.graph if node not in placement.nodes and _may_join(node)]
    before = 0
    while before != len(joined):
        before = len(joined)
        written = {*placement.values, *(output for node in joined for output in _written(node))}
        for node in list(joined):
            # In graph order, so that one round tells of all that has no codes to read.
            if not written.issuperset(_read(node)):
                joined.remove(node)
                written -= {*_written(node)} - placement.values.keys()
        readers = {*placement.nodes, *joined}
        for node in reversed(list(joined)):
            if not any(_read_as_codes(output, readers, placement) for output in _written(node)):
                joined.remove(node)
                readers.remove(node)
    for node in joined:
        placement.nodes.add(node)
        for output in _written(node):
            placement.values.setdefault(output, output)


def _read_as_codes(value: ir.Value, readers: Collection[ir.Node], placement: Placement) -> bool:
    return value in placement.values or any(
        node in readers and value in (_read(node) if _may_join(node) else node.inputs[:1]) for node in value.consumers()
    )


def _read(node: ir.Node) -> list[ir.Value | None]:
    """The inputs that an operator with no weight reads as codes."""
    return [node.inputs[0]] if is_standard(node, *PASS_THROUGH) else list(node.inputs)


def _written(node: ir.Node) -> list[ir.Value]:
    """The values that such an operator leaves as codes."""
    return list(node.outputs) if is_standard(node, *PASS_THROUGH) else [tail(node)]


def _may_join(node: ir.Node) -> bool:
    if not is_standard(node, *INTEGER_OPS, *PASS_THROUGH) or has_wrong_kernel(node):
        return False
    if is_standard(node, "Resize"):
        # Others than nearest neighbours are mixed.
        return text(node, "mode", "nearest") == "nearest"
    if is_standard(node, "Gather") and constant(node.inputs[0]) is not None:
        return False
    every_output_is_read = all(output.uses() or output.is_graph_output() for output in node.outputs)
    return len(node.outputs) == 1 or (is_standard(node, "Split") and every_output_is_read)


def _share_ranges(model: ir.Model, placement: Placement) -> None:
    """Let the output of a pass-through operator take its input's range, so that the codes stay as they are."""
    for node in model.graph:
        if node in placement.nodes and is_standard(node, *PASS_THROUGH):
            source = node.inputs[0]
            assert source is not None
            placement.values.update((output, placement.values[source]) for output in node.outputs)


def observed_values(model: ir.Model) -> Iterator[ir.Value]:
    """Values whose range static quantization may need, in graph order, each once.

    They are those placed when every layer runs on integers: with fewer, no other value is.
    """
    anchors = [node for node in model.graph if is_standard(node, *ANCHORS) and constant(input_of(node, 1)) is not None]
    placed = place(model, anchors).values
    in_order = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    yield from (value for value in in_order if value in placed)
