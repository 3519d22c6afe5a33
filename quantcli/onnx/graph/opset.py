"""Operator sets: which one a graph needs, and the way from an older one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.errors import InputError
from quantcli.system.text import first_line

if TYPE_CHECKING:
    import onnx_ir as ir

#: The operator set from which on a Cast takes four-bit integers.
NARROW_OPSET = 21

#: Constants up to this size may be shapes or axes, which converting an operator set looks at.
_SMALL_CONSTANT_BYTES = 4096

#: The operator set that quantization with one scale per channel needs.
QDQ_OPSET = 13


def upgrade(model: ir.Model, opset: int) -> ir.Model:
    """The model in a newer operator set, if its own is older.

    Raises:
        InputError: an operator has no equivalent there.
    """
    if model.opset_imports.get("", 1) >= opset:
        return model
    import onnx_ir as ir
    from onnx import version_converter
    from onnx_ir.passes import common

    weights = _set_aside(model)
    try:
        converted = ir.from_proto(version_converter.convert_version(ir.to_proto(model), opset))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The model's operator set {model.opset_imports.get('', 1)} cannot be upgraded to {opset}: "
            f"{first_line(error)}.",
            "Export the model with a newer operator set.",
        ) from error
    finally:
        for name, tensor in weights.items():
            model.graph.initializers[name].const_value = tensor
    for name, tensor in weights.items():
        converted.graph.initializers[name].const_value = tensor
        converted.graph.initializers[name].meta.update(model.graph.initializers[name].meta)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(converted)
    return converted


def _set_aside(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Take the weights out of a graph, leaving their shapes: converting needs no more, and stops at 2 GB."""
    import onnx_ir as ir

    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SMALL_CONSTANT_BYTES:
            weights[name] = tensor
            value.const_value = ir.ExternalTensor(
                "elsewhere", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
    return weights


#: The smallest IR version that knows an operator set (onnx/docs/Versioning.md). `onnx.helper.find_min_ir_version_for`
#: gives the release's own version instead, which is newer for the sets 9, 10, 12, 19 and 28, and which an onnxruntime
#: that runs the set may refuse; sets that the installed onnx does not know yet are an error there.
_IR_VERSIONS = ((25, 13), (24, 12), (23, 11), (21, 10), (20, 9), (15, 8), (13, 7), (11, 6))


def needed_ir_version(opset: int) -> int:
    """The smallest IR version that an operator set may stand in."""
    return next((version for smallest, version in _IR_VERSIONS if opset >= smallest), 3)
