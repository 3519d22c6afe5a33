"""Plain safetensors with every floating-point tensor cast to 16 bits; loads wherever the original does."""

from __future__ import annotations

from quantcli.core.scheme import Scheme

NAME = "safetensors"


def supports(scheme: Scheme) -> str | None:
    """Why the scheme cannot be written, or None when it can."""
    if scheme.weights.dtype not in ("fp16", "bf16"):
        return f"{NAME} carries fp16 and bf16, not {scheme.weights.dtype}"
    if scheme.inputs is not None:
        return f"{NAME} keeps inputs as they are"
    return None


def carries(role: str) -> str | None:
    """None: every tensor can be cast."""
    return None
