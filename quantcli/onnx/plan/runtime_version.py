"""What a version of onnxruntime can run: refused by name before any work, not found out at the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.errors import InputError
from quantcli.onnx.plan import nbits
from quantcli.onnx.plan.plan import GraphPlan

if TYPE_CHECKING:
    import onnx_ir as ir

#: Highest operator set each version knows, of those that were tried.
_OPSETS = (((1, 32), 28), ((1, 24), 25), ((1, 23), 23), ((1, 22), 22), ((1, 20), 21), ((1, 18), 21))


def require_version(plan: GraphPlan, model: ir.Model, opset: int, version: str) -> None:
    """Raise InputError where a version of onnxruntime cannot run what a plan would write.

    ``opset`` is the operator set that the plan needs, if the model's own is older.
    """
    parts = tuple(int(part) for part in version.split(".")[:2])
    needed = max(opset, model.opset_imports.get("", 1))
    highest = next((most for first, most in _OPSETS if parts >= first), 0)
    if needed > highest:
        reason = f"knows operator sets up to {highest}" if highest else "is older than any that was tried"
        raise InputError(f"The model needs operator set {needed}; onnxruntime {version} {reason}.")
    for node in plan.nodes:
        if node.form != "nbits" or node.scheme is None:
            continue
        first = nbits.oldest_runtime(node.node, node.scheme)
        if parts < tuple(int(part) for part in first.split(".")):
            raise InputError(
                f"{node.name} as {node.label} is run by onnxruntime {first} and newer, not by {version}.",
                "Choose another scheme, --skip these layers, or leave the version out of --target.",
            )
