"""Operator sets: which one a graph needs, and the way from an older one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.errors import InputError
from quantcli.onnx.graph.external import SMALL_BYTES, elsewhere
from quantcli.onnx.graph.model import from_message, keep_types
from quantcli.onnx.graph.values import array, input_of, integer, is_standard, rank
from quantcli.system.text import first_line

if TYPE_CHECKING:
    import onnx_ir as ir

#: The operator set from which on a Cast takes four-bit integers.
NARROW_OPSET = 21

#: The operator set that quantization with one scale per channel needs.
QDQ_OPSET = 13

#: The newest operator set whose QuantizeLinear and DequantizeLinear onnxruntime has kernels for.
NEWEST_QDQ_OPSET = 27

#: The domain of onnxruntime's own operators.
_MICROSOFT = "com.microsoft"

#: Below operator set 13 these flatten what follows their axis, which is 1 where none is given.
_FLATTENING = ("Softmax", "LogSoftmax", "Hardmax")

#: The operator set from which on a Resize says how it maps coordinates. Before, it takes the place in the output by the
#: scale; the converter leaves the newer default, which takes centres of pixels.
_COORDINATES_OPSET = 11

#: Where nodes stand that the converter must not touch, since they are in the newer set's words already.
_NEWER = "quantcli.newer"


def default_opset(model: ir.Model) -> int:
    """Version of the default operator set; 0 where the graph has only operators of other domains."""
    return model.opset_imports.get("", 0)


def upgrade(model: ir.Model, opset: int) -> ir.Model:
    """The model in a newer operator set, if its own is older. Whether it computes the same is for the caller to see.

    Raises:
        InputError: an operator has no equivalent there.
    """
    old = default_opset(model)
    if old >= opset:
        return model
    import onnx_ir as ir
    from onnx import version_converter
    from onnx_ir.passes import common

    working = model.clone()
    if old == 0:
        working.opset_imports[""] = max(opset, QDQ_OPSET)
        return working
    if old < QDQ_OPSET <= opset:
        _spell_out_flattening(working)
    if old < _COORDINATES_OPSET <= opset:
        _spell_out_resizing(working)
    working.ir_version = max(working.ir_version or 0, needed_ir_version(old))
    weights = _set_aside(working)
    try:
        converted = from_message(version_converter.convert_version(ir.to_proto(working), opset))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The model's operator set {old} cannot be upgraded to {opset}: {_why(error)}.",
            "Export the model with a newer operator set.",
        ) from error
    for name, tensor in weights.items():
        converted.graph.initializers[name].const_value = tensor
        converted.graph.initializers[name].meta.update(working.graph.initializers[name].meta)
    keep_types(working, converted)
    converted.opset_imports.pop(_NEWER, None)
    for node in converted.graph.all_nodes():
        if node.domain == _NEWER:
            node.domain = ""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(converted)
    return converted


def _why(error: Exception) -> str:
    """What the converter says, without the place in its own source that some of its messages begin with."""
    return first_line(error).rpartition("` failed: ")[2]


def restamp(model: ir.Model, opset: int) -> ir.Model | None:
    """The model as it is, said to be of a newer operator set; None where an operator is said otherwise there.

    A way for operators that the converter has no words for. Whether it computes the same is for the caller to see.
    """
    old = default_opset(model)
    if not all(_said_alike(node, old, opset) for node in model.graph.all_nodes()):
        return None
    stamped = model.clone()
    stamped.opset_imports[""] = opset
    return stamped


def _said_alike(node: ir.Node, old: int, new: int) -> bool:
    """Whether a node has the same inputs, outputs and attributes in both operator sets."""
    from onnx import defs

    if node.domain != "":
        return True
    if node.op_type in _FLATTENING and old < QDQ_OPSET <= new:
        return False
    try:
        one, other = (defs.get_schema(node.op_type, version, "") for version in (old, new))
    except defs.SchemaError:
        return False
    if one.since_version == other.since_version:
        return True
    names = [[value.name for value in (*schema.inputs, *schema.outputs)] for schema in (one, other)]
    return not other.deprecated and names[0] == names[1] and one.attributes.keys() == other.attributes.keys()


def spell_for_runtime(model: ir.Model) -> None:
    """Write QuantizeLinear and DequantizeLinear as onnxruntime's own where it has none of the model's operator set.

    They are the same but for their domain, and the runtime makes integer kernels of both kinds. A model of so new a
    set runs all the same where the runtime has its other operators.
    """
    if default_opset(model) <= NEWEST_QDQ_OPSET:
        return
    for node in model.graph.all_nodes():
        if is_standard(node, "QuantizeLinear", "DequantizeLinear"):
            node.domain = _MICROSOFT
            model.opset_imports.setdefault(_MICROSOFT, 1)


def _spell_out_flattening(model: ir.Model) -> None:
    """Write operators that flatten as the newer ones between a Flatten and a Reshape, where the converter cannot."""
    import onnx_ir as ir

    for node in list(model.graph.all_nodes()):
        data = input_of(node, 0)
        if not is_standard(node, *_FLATTENING) or data is None or node.graph is None:
            continue
        dims, axis = rank(data), integer(node, "axis", 1)
        last = dims is not None and axis % max(dims, 1) == dims - 1
        if node.op_type != "Hardmax" and dims is not None:
            continue
        graph, output = node.graph, node.outputs[0]
        newer = ir.node(node.op_type, [data], {"axis": -1}, domain=_NEWER, name=node.name)
        nodes = [newer]
        if not last:
            base = output.name or node.name or node.op_type
            shape = ir.node("Shape", [data], name=f"{base}_shape")
            flat = ir.node("Flatten", [data], {"axis": axis}, name=f"{base}_flat")
            newer.replace_input_with(0, flat.outputs[0])
            back = ir.node("Reshape", [newer.outputs[0], shape.outputs[0]], name=f"{base}_unflat")
            nodes = [shape, flat, newer, back]
            for each, part in zip(nodes, ("shape", "flat", "rows", "unflat"), strict=True):
                each.outputs[0].name = f"{base}_{part}"
        result, name = nodes[-1].outputs[0], output.name
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [result])
        result.name = name
        model.opset_imports[_NEWER] = 1


def _spell_out_resizing(model: ir.Model) -> None:
    """Write Upsample, and Resize of set 10, as the newer Resize that maps coordinates as they do."""
    import onnx_ir as ir

    for node in list(model.graph.all_nodes()):
        data, graph, output = input_of(node, 0), node.graph, node.outputs[0]
        if not is_standard(node, "Upsample", "Resize") or data is None or graph is None:
            continue
        scales, nodes = input_of(node, 1), []
        if scales is None:
            lengths = list(node.attributes["scales"].as_floats())
            made = ir.node("Constant", [], {"value_floats": lengths}, domain=_NEWER, name=f"{node.name}_scales")
            made.outputs[0].name = f"{output.name}_scales"
            scales, nodes = made.outputs[0], [made]
        attribute, known = node.attributes.get("mode"), array(scales)
        mode = "nearest" if attribute is None else attribute.as_string()
        wanted = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
        if mode == "nearest":
            # What makes an image smaller takes the next pixel, as onnxruntime's kernel of set 10 does.
            wanted["nearest_mode"] = "ceil" if known is not None and (known < 1).any() else "floor"
        newer = ir.node("Resize", [data, None, scales], wanted, domain=_NEWER, name=node.name)
        name, result = output.name, newer.outputs[0]
        result.type, result.shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], [*nodes, newer], [output], [result])
        result.name = name
        model.opset_imports[_NEWER] = 1


def _set_aside(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Take the weights out of a graph, leaving their shapes: converting needs no more, and stops at 2 GB."""
    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > SMALL_BYTES:
            weights[name] = tensor
            value.const_value = elsewhere(tensor)
    return weights


#: The smallest IR version that knows an operator set (onnx/docs/Versioning.md). `onnx.helper.find_min_ir_version_for`
#: gives the release's own version instead, which is newer for the sets 9, 10, 12, 19 and 28, and which an onnxruntime
#: that runs the set may refuse; sets that the installed onnx does not know yet are an error there.
_IR_VERSIONS = ((25, 13), (24, 12), (23, 11), (21, 10), (20, 9), (15, 8), (13, 7), (11, 6))


def needed_ir_version(opset: int) -> int:
    """The smallest IR version that an operator set may stand in, with initializers that are no inputs (from 4 on)."""
    return next((version for smallest, version in _IR_VERSIONS if opset >= smallest), 4)
