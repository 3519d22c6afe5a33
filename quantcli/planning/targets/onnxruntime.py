"""What onnxruntime loads. What its versions run is decided node by node: see `quantcli.onnx.plan.runtime_version`."""

from __future__ import annotations

from quantcli.planning.plan import Plan
from quantcli.planning.targets.base import Refusal, Target

CHECKED = {"onnxruntime": "onnxruntime 1.32"}
LOADS_ONNX = True


def no_checkpoint(plan: Plan, target: Target) -> Refusal | None:
    """ONNX is all that onnxruntime takes."""
    return Refusal(f"onnxruntime loads ONNX, not {plan.format}", "Use --format onnx.")


RULES = (no_checkpoint,)
