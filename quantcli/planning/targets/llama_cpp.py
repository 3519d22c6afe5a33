"""What llama.cpp loads: GGUF. What an architecture or a type lacks is refused where the file is planned."""

from __future__ import annotations

from quantcli.planning.plan import Plan
from quantcli.planning.targets.base import Refusal, Target

CHECKED = {"llama.cpp": "llama.cpp b11549"}
LOADS_ONNX = False


def other_format(plan: Plan, target: Target) -> Refusal | None:
    """GGUF is all that llama.cpp takes."""
    if plan.format == "gguf":
        return None
    return Refusal(f"llama.cpp loads GGUF, not {plan.format}", "Use --format gguf.")


RULES = (other_format,)
