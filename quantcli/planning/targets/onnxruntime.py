"""What onnxruntime loads. What its versions run is decided node by node: see `quantcli.onnx.plan.runtime_version`.

Decoders with a key-value cache, which onnxruntime-genai generates with, are checked by being run.
"""

from __future__ import annotations

from quantcli.planning.plan import Plan
from quantcli.planning.targets.base import Refusal, Target

CHECKED = {"onnxruntime": "onnxruntime 1.32", "onnxruntime-genai": "onnxruntime-genai 0.18"}
LOADS_ONNX = True


def no_checkpoint(plan: Plan, target: Target) -> Refusal | None:
    """ONNX is all that onnxruntime takes."""
    if plan.format == "onnx":
        return None
    return Refusal(f"{target.name} loads ONNX, not {plan.format}", "Use --format onnx.")


RULES = (no_checkpoint,)
