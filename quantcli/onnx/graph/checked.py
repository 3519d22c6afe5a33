"""What onnx-ir takes at a file's word, held against ONNX's definitions. Imported where a graph is at hand."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

#: Fields of a tensor that hold its values as numbers or texts, and the types whose values they hold (onnx.proto).
_NUMBERS = {
    "float_data": ("FLOAT", "COMPLEX64"),
    "double_data": ("DOUBLE", "COMPLEX128"),
    "int64_data": ("INT64",),
    "uint64_data": ("UINT32", "UINT64"),
    "string_data": ("STRING",),
    "int32_data": (),
}
#: Types that int32_data holds: all that have no other field.
_HELD_ELSEWHERE = {dtype for dtypes in _NUMBERS.values() for dtype in dtypes}


def require_sound(model: ir.Model) -> None:
    """Raise ValueError where a constant has no type or too few values, or an attribute another type."""
    for tensor in _constants(model):
        if tensor.dtype == ir.DataType.UNDEFINED:
            raise ValueError(f"the constant {tensor.name!r} has no type")
        if any(not isinstance(side, int) or side < 0 for side in tensor.shape.numpy()):
            raise ValueError(f"the constant {tensor.name!r} has the shape {list(tensor.shape)}")
        held = _stored_bytes(tensor)
        if held is not None and held != tensor.nbytes:
            raise ValueError(f"the constant {tensor.name!r} has {held} bytes in place of {tensor.nbytes}")
        _require_numbers(tensor)
    for node in model.graph.all_nodes():
        _require_attributes(node, model.opset_imports.get(node.domain, 0))


def require_one_of_each(graph: onnx.GraphProto) -> None:
    """Raise ValueError where a graph, or a body in it, has two constants of one name, and they are not the same.

    onnx-ir would keep the last one; onnxruntime says that it does, and takes the first.
    """
    first: dict[str, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        known = first.setdefault(tensor.name, tensor)
        if known is not tensor and known.SerializeToString() != tensor.SerializeToString():
            raise ValueError(f"the constant {tensor.name!r} is there twice")
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                require_one_of_each(body)


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield attribute.as_tensor()


def _stored_bytes(tensor: ir.TensorProtocol) -> int | None:
    """Bytes that a file holds of a tensor as they are; None where it lies elsewhere, or in lists of numbers."""
    proto = getattr(tensor, "raw", None)
    if not isinstance(proto, onnx.TensorProto) or any(len(getattr(proto, numbers)) for numbers in _NUMBERS):
        return None
    return len(proto.raw_data)


def _require_numbers(tensor: ir.TensorProtocol) -> None:
    """Raise ValueError where a list of numbers is not the one of a tensor's type, or has another length."""
    proto = getattr(tensor, "raw", None)
    if not isinstance(proto, onnx.TensorProto):
        return
    dtype = tensor.dtype
    count = tensor.size * (2 if dtype.name.startswith("COMPLEX") else 1)
    if dtype.bitwidth in (2, 4):
        count = -(-count * dtype.bitwidth // 8)  # several in each number
    for field, dtypes in _NUMBERS.items():
        numbers = len(getattr(proto, field))
        if not numbers:
            continue
        if dtype.name not in dtypes and (dtypes or dtype.name in _HELD_ELSEWHERE):
            raise ValueError(f"the constant {tensor.name!r} is {dtype.name}, and keeps its values in {field}")
        if numbers != count:
            raise ValueError(f"the constant {tensor.name!r} has {numbers} numbers in place of {count}")


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
