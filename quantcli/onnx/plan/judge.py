"""What calibration changes in a plan: layers that fixed ranges would ruin, inputs that tell nothing."""

from __future__ import annotations

from dataclasses import replace

from quantcli.onnx.plan.evidence import Hessians, Statistics
from quantcli.onnx.plan.forms import form
from quantcli.onnx.plan.placement import needs_quantized_output, tail
from quantcli.onnx.plan.plan import GraphPlan, NodePlan, counted

#: Below this, 256 levels over a tensor's range leave too little of it: a few outliers own the range.
MIN_ACTIVATION_SQNR_DB = 20.0

#: Below this many levels, the median channel is next to nothing: a few channels own the range.
MIN_CHANNEL_LEVELS = 4.0


def needed_opset(plan: GraphPlan) -> int:
    """The operator set that a plan's layers are written in."""
    return max((form(node.form).opset(node) for node in plan.nodes if node.form), default=0)


def without_outliers(plan: GraphPlan, statistics: Statistics) -> GraphPlan:
    """The plan with nodes whose values static quantization would ruin made dynamic, or left float."""
    return replace(plan, nodes=tuple(_judged(node, statistics) for node in plan.nodes))


def _judged(node: NodePlan, statistics: Statistics) -> NodePlan:
    if node.form != "static":
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
            return replace(node, form="dynamic", label="int8-dynamic", note=why)
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
