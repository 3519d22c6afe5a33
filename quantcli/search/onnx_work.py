"""What a layer of a graph takes in one run, stored in one way or another, in multiplications of a float convolution.

What decides between mixes must be the same on every machine, so nothing is timed. A kernel takes a share of the float
kernel's time, and quantizing or restoring a value takes as long as some multiplications. The figures are of onnxruntime
1.32 with one thread on AVX-512 with VNNI: profiles of PP-OCRv4's recognizer and EfficientNet-Lite0, and products of 384
to 2048 channels with 1 to 64 rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import prod

from quantcli.onnx.graph.operands import channel_axis
from quantcli.onnx.graph.values import constant, is_standard
from quantcli.onnx.plan.plan import GraphPlan, NodePlan

#: The time of a kernel by that of the float one. Of `nbits` that is so with blocks of 32; larger ones take less.
_SHARE = {
    "static": 0.33, "dynamic": 0.3, "recurrent": 0.6, "nbits": 0.9, "expanded": 1.02, "stored": 1.02, "cast": 1.02
}  # fmt: skip
#: By what that of `nbits` gets less with each doubling of the block.
_PER_DOUBLING = 0.1
#: A convolution of one channel per group takes so much for a multiplication, and as integers not less.
_DEPTHWISE, _DEPTHWISE_STATIC = 2.5, 1.3
#: Multiplications in the time that a value takes to be quantized with a range that is known, or that is to be found,
#: and to be restored.
_QUANTIZE, _FIND_RANGE, _RESTORE = 8.0, 40.0, 7.0


def works(plan: GraphPlan, sizes: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """What layers take as floats, and as a plan has them, by the names of weights.

    Args:
        plan: what becomes of each node; its weights are still there.
        sizes: bytes of float32 values in one run, by their names.
    """
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for node in plan.nodes:
        plain = _multiplications(node, sizes) * (_DEPTHWISE if _is_depthwise(node) else 1.0)
        before = found[node.name]
        found[node.name] = before[0] + plain, before[1] + (_planned(node, plain, sizes) if plain else 0.0)
    return found


def _planned(plan: NodePlan, plain: float, sizes: Mapping[str, int]) -> float:
    """What a node takes in its form, which takes ``plain`` as floats."""
    if plan.form is None:
        return plain
    share = _SHARE.get(plan.form, 1.0)
    data = next((value for value in plan.node.inputs if value is not None and value is not plan.weight), None)
    read, written = (sizes.get((value and value.name) or "", 0) / 4 for value in (data, plan.node.outputs[0]))
    if plan.form == "static":
        share = _DEPTHWISE_STATIC if _is_depthwise(plan) else share
        return share * plain + _QUANTIZE * read + _RESTORE * written
    if plan.form == "dynamic":
        return share * plain + _FIND_RANGE * read
    if plan.form == "nbits":
        block = plan.scheme.weights.granularity.size if plan.scheme else None
        share -= _PER_DOUBLING * max(0, min(block or 32, 128).bit_length() - 6)
    return share * plain


def _is_depthwise(plan: NodePlan) -> bool:
    """Whether a node is a convolution each of whose channels is made of one."""
    tensor = constant(plan.weight)
    return is_standard(plan.node, "Conv") and tensor is not None and tensor.shape.numpy()[1] == 1


def _multiplications(plan: NodePlan, sizes: Mapping[str, int]) -> float:
    """Of a node in one run; those of operators without products count for nothing."""
    if is_standard(plan.node, "Gather"):
        return 0.0
    outputs = sizes.get(plan.node.outputs[0].name or "", 0) / 4
    tensor = constant(plan.weight)
    if tensor is None or not is_standard(plan.node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return float(plan.info.numel)
    shape = tensor.shape.numpy()
    if is_standard(plan.node, "ConvTranspose"):
        return outputs * prod(shape[2:]) * shape[0]
    if is_standard(plan.node, "MatMul") and plan.weight is plan.node.inputs[0]:
        return outputs * shape[-1]
    axis = channel_axis(plan.node) if plan.weight is plan.node.inputs[1] else len(shape) - 1
    return outputs * plan.info.numel / max(1, shape[axis])
