"""What a version of onnxruntime can run: refused by name before any work, not found out at the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.errors import InputError
from quantcli.graph.plan import GraphPlan, NodePlan

if TYPE_CHECKING:
    import onnx_ir as ir

#: Highest operator set each version knows, of those that were tried.
_OPSETS = (((1, 32), 28), ((1, 24), 25), ((1, 23), 23), ((1, 22), 22), ((1, 20), 21), ((1, 18), 21))

#: First version, of those tried, that runs an operator as we write it.
_FIRST = {
    "MatMulNBits (4 bit)": (1, 18),
    "MatMulNBits (8 bit)": (1, 22),
    "MatMulBnb4": (1, 18),
    "GatherBlockQuantized": (1, 23),
    "ConvInteger": (1, 24),
}


def require_version(plan: GraphPlan, model: ir.Model, opset: int, version: str) -> None:
    """Raise InputError where a version of onnxruntime cannot run what a plan would write.

    ``opset`` is the operator set that the plan needs, if the model's own is older.
    """
    wanted = tuple(int(part) for part in version.split(".")[:2])
    needed = max(opset, model.opset_imports.get("", 1))
    highest = next((most for first, most in _OPSETS if wanted >= first), 0)
    if needed > highest:
        known = f"knows operator sets up to {highest}" if highest else "is older than any that was tried"
        raise InputError(f"The model needs operator set {needed}; onnxruntime {version} {known}.")
    for node in plan.nodes:
        operator = _operator(node)
        if operator and wanted < _FIRST[operator]:
            first = ".".join(map(str, _FIRST[operator]))
            raise InputError(
                f"{node.name} would become {operator}, which onnxruntime {version} cannot run; {first} is the first.",
                "Choose another scheme, --skip these layers, or leave the version out of --target.",
            )


def _operator(node: NodePlan) -> str | None:
    """The operator a node becomes, as the table of versions names it."""
    if node.mode == "dynamic":
        return "ConvInteger" if node.node.op_type == "Conv" else None
    if node.mode != "weights" or node.scheme is None or node.role == "conv":
        return None
    if node.role == "embedding":
        return "GatherBlockQuantized"
    if node.scheme.weights.dtype == "nf4":
        return "MatMulBnb4"
    return f"MatMulNBits ({node.scheme.weights.bits} bit)"
