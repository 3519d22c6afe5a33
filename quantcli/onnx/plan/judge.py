"""What calibration changes in a plan: layers that fixed ranges would ruin, inputs that tell nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from quantcli.core.tensors import Hessian
from quantcli.onnx.graph.opset import NARROW_OPSET, QDQ_OPSET
from quantcli.onnx.plan.placement import needs_quantized_output, tail
from quantcli.onnx.plan.plan import GraphPlan, NodePlan, counted

if TYPE_CHECKING:
    import numpy as np

#: Below this, 256 levels over a tensor's range leave too little of it: a few outliers own the range.
MIN_ACTIVATION_SQNR_DB = 20.0

#: Below this many levels, the median channel is next to nothing: a few channels own the range.
MIN_CHANNEL_LEVELS = 4.0


class Statistics(Protocol):
    """What calibration knows, as far as static quantization asks."""

    def range(self, name: str) -> tuple[float, float]:
        """Lowest and highest value to be represented."""

    def sqnr_db(self, name: str, low: float, high: float, levels: int = 256) -> float | None:
        """Signal to quantization noise of a tensor on a grid over a range."""

    def channel_levels(self, name: str, low: float, high: float) -> float | None:
        """How many of 256 levels over a range the median channel spans."""

    def channel_mean(self, name: str) -> np.ndarray | None:
        """Mean of each channel."""


class Hessians(Protocol):
    """What calibration knows of the inputs of layers, as far as gptq asks."""

    def of(self, node: NodePlan) -> Hessian:
        """The Hessian of a layer, read when it is asked for."""

    def problem(self, node: NodePlan) -> str | None:
        """Why a layer's inputs tell nothing, or None."""


def needed_opset(plan: GraphPlan) -> int:
    """The operator set that a plan's nodes are written in."""
    integer = plan.of_mode("static", "dynamic") or any(node.role == "conv" for node in plan.of_mode("weights"))
    bf16 = any(node.scheme and node.scheme.weights.dtype == "bf16" for node in plan.of_mode("cast"))
    if any(node.scheme and node.scheme.weights.bits == 4 for node in plan.of_mode("static", "dynamic")):
        return NARROW_OPSET
    return QDQ_OPSET if integer or bf16 else 0


def without_outliers(plan: GraphPlan, statistics: Statistics) -> GraphPlan:
    """The plan with nodes whose values static quantization would ruin made dynamic, or left float."""
    return replace(plan, nodes=tuple(_judged(node, statistics) for node in plan.nodes))


def _judged(node: NodePlan, statistics: Statistics) -> NodePlan:
    if node.mode != "static":
        return node
    values = {"input": node.node.inputs[0]}
    if needs_quantized_output(node.node):
        values["output"] = tail(node.node)
    for which, value in values.items():
        assert value is not None and value.name is not None
        low, high = statistics.range(value.name)
        sqnr_db = statistics.sqnr_db(value.name, low, high)
        if sqnr_db is not None and sqnr_db < MIN_ACTIVATION_SQNR_DB:
            why = f"outliers: fixed ranges would leave its {which} {sqnr_db:.0f} dB"
            if node.node.op_type == "Conv":
                return node.left(why)
            return replace(node, mode="dynamic", label="int8-dynamic", note=why)
        levels = statistics.channel_levels(value.name, low, high)
        if levels is not None and levels < MIN_CHANNEL_LEVELS:
            # The few are most of the signal, and so they are of every sample: ranges found at inference are the same.
            return node.left(f"outliers: a few channels leave the others {levels:.1f} of 256 levels of its {which}")
    return node


def without_inputs(plan: GraphPlan, hessians: Hessians) -> GraphPlan:
    """The plan with layers whose inputs tell gptq nothing rounded as if there were no data."""

    def judged(node: NodePlan) -> NodePlan:
        problem = hessians.problem(node) if node.input else None
        return node.rounded_plainly(problem) if problem else node

    nodes = tuple(judged(node) for node in plan.nodes)
    new = counted(after.note for node, after in zip(plan.nodes, nodes, strict=True) if after is not node)
    return replace(plan, nodes=nodes, warnings=(*plan.warnings, *new))
