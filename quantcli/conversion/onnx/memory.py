"""What a limit of memory means for a graph: which conversions keep it, and which weights fit."""

from __future__ import annotations

from pathlib import Path

from quantcli.errors import UsageError
from quantcli.onnx.graph.model import is_onnx
from quantcli.onnx.plan.plan import GraphPlan
from quantcli.system.memory import memory_limit, require_memory
from quantcli.system.user_functions import is_function


def require_bounded_model(model: str) -> None:
    """Raise UsageError where memory is limited, and a model is no graph yet: its export holds it whole."""
    if memory_limit() is None:
        return
    require_memory("onnxruntime", 0)
    if is_function(model) or not is_onnx(Path(model)):
        raise UsageError(
            f"--max-memory cannot be kept: {model} is exported to ONNX first, which holds it as a whole.",
            "Export it where there is memory for it, and convert the ONNX file.",
        )


def require_bounded_plan(plan: GraphPlan, *, data: bool, trains: bool) -> None:
    """Raise UsageError where memory is limited, and a plan runs the whole graph to learn of it, or does not fit.

    Args:
        plan: what becomes of the graph.
        data: whether samples or statistics are given.
        trains: whether what is quantized is trained.
    """
    if memory_limit() is None:
        return
    observed = data and any(node.node.op_type == "Conv" for node in plan.of_mode("weights"))
    if trains or observed or plan.needs_inputs or plan.of_mode("static"):
        what = "what is trained" if trains else "the data"
        raise UsageError(
            f"--max-memory cannot be kept: {plan.scheme} by {plan.algorithm} runs the whole graph on {what}.",
            "Leave it out, or take weights alone or int8-dynamic without --data.",
        )
    for node in plan.nodes:
        if node.form:
            require_memory(node.node.name or node.name, node.info.nbytes)
