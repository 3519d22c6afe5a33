"""What onnx-ir takes at a file's word, held against ONNX's definitions. Imported where a graph is at hand."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

#: Fields of a tensor that hold its values as numbers or texts.
_NUMBERS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def require_sound(model: ir.Model) -> None:
    """Raise ValueError where a constant has no type or too few bytes, or an attribute another type."""
    for tensor in _constants(model):
        if tensor.dtype == ir.DataType.UNDEFINED:
            raise ValueError(f"the constant {tensor.name!r} has no type")
        if any(not isinstance(side, int) or side < 0 for side in tensor.shape.numpy()):
            raise ValueError(f"the constant {tensor.name!r} has the shape {list(tensor.shape)}")
        held = _stored_bytes(tensor)
        if held is not None and held != tensor.nbytes:
            raise ValueError(f"the constant {tensor.name!r} has {held} bytes in place of {tensor.nbytes}")
    for node in model.graph.all_nodes():
        _require_attributes(node, model.opset_imports.get(node.domain, 0))


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _stored_bytes(tensor: ir.TensorProtocol) -> int | None:
    """Bytes that a file holds of a tensor as they are; None where it lies elsewhere, or in lists of numbers."""
    proto = getattr(tensor, "raw", None)
    if not isinstance(proto, onnx.TensorProto) or any(len(getattr(proto, numbers)) for numbers in _NUMBERS):
        return None
    return len(proto.raw_data)


def _require_attributes(node: ir.Node, opset: int) -> None:
    """Raise ValueError where an attribute has another type than its operator defines."""
    if not node.attributes or not onnx.defs.has(node.op_type, node.domain):
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return  # of a later operator set than this onnx knows
    for name, attribute in node.attributes.items():
        defined = schema.attributes.get(name)
        meant = defined.type.name if defined is not None else None  # type: ignore[attr-defined]
        if meant is not None and attribute.type.name != meant:
            raise ValueError(f"{name} of {node.op_type} {node.name or ''} is {attribute.type.name}, and means {meant}")
