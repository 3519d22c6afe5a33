"""Sums that a normalization reads, kept apart from it: onnxruntime would make one operator of both, a slow one.

SkipLayerNormalization took three to four times as long on a CPU as Add and LayerNormalization on their own, a quarter
of the time of all-MiniLM-L6-v2 in `int8-dynamic` (onnxruntime 1.32). The same sum as a Sum is not taken for its part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.onnx.graph.values import constant, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

#: The operator set from which on Sum spreads its inputs over each other's dimensions, as Add does.
_SPREADING_OPSET = 8


def part_sums_from_norms(model: ir.Model) -> None:
    """Write each sum of two computed values that is normalized as a Sum, in place."""
    if model.opset_imports.get("", 1) < _SPREADING_OPSET:
        return
    for node in model.graph.all_nodes():
        computed = all(value is not None and constant(value) is None for value in node.inputs)
        if is_standard(node, "Add") and computed and _is_normalized(node.outputs[0]):
            node.op_type = "Sum"


def _is_normalized(value: ir.Value) -> bool:
    """Whether a norm reads a value: as one operator, or as the mean and the difference that it begins with."""
    readers = list(value.consumers())
    if any(is_standard(node, "LayerNormalization") and node.inputs[0] is value for node in readers):
        return True
    return all(any(is_standard(node, operator) for node in readers) for operator in ("ReduceMean", "Sub"))
