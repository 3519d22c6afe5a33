"""Constants behind a Cast: halves that are cast to float32 are seen as what they become, and stored as they were.

So a weight that is stored in 16 bits is a weight like any other, however large it is, and takes no more room where it
is left as it is.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantcli.onnx.graph.values import add_initializer, constant, drop_unused, free_name, integer, is_standard, prepend

if TYPE_CHECKING:
    import onnx_ir as ir

#: Key of a constant's `meta` under which is kept what it was cast from, and what it became then.
_CAST = "quantcli.cast"

#: A constant of integers below this many values may be a shape or a position; above, it is codes.
_SMALLEST_CODES = 256


def keeps_codes(node: ir.Node) -> bool | None:
    """False for a node that would turn constant codes into floats, None for one that nothing speaks against folding."""
    value = node.inputs[0] if is_standard(node, "Cast") else None
    tensor = constant(value)
    if tensor is None or tensor.size < _SMALLEST_CODES:
        return None
    return False if tensor.dtype.name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2") else None


def look_through_casts(model: ir.Model) -> None:
    """Replace each Cast of a constant half to float32 by the constant that it makes, computed when it is read."""
    import onnx_ir as ir

    for graph in model.graphs():
        for node in list(graph):
            value = node.inputs[0] if is_standard(node, "Cast") else None
            tensor, output = constant(value), node.outputs[0]
            if value is None or tensor is None or tensor.dtype.name not in ("FLOAT16", "BFLOAT16"):
                continue
            owner = value.graph
            if owner is None or integer(node, "to", 0) != ir.DataType.FLOAT or output.is_graph_output():
                continue
            shape = ir.Shape(tensor.shape.numpy())
            name = free_name(owner, output.name or f"{value.name}_float")
            lazy = ir.LazyTensor(partial(_as_float, tensor, name), dtype=ir.DataType.FLOAT, shape=shape, name=name)
            seen = add_initializer(owner, name, lazy)
            seen.meta[_CAST] = tensor, lazy
            output.replace_all_uses_with(seen)
            graph.remove(node, safe=True)
            drop_unused(owner, value)


def stored_bytes(value: ir.Value) -> int | None:
    """What a constant takes in the model's file, where one behind a Cast is a half; None for what is no constant."""
    tensor, seen = value.meta.get(_CAST, (None, None))
    tensor = tensor if seen is not None and value.const_value is seen else constant(value)
    return None if tensor is None else int(tensor.nbytes)


def bytes_of_constants(model: ir.Model) -> int:
    """What all constants take in the model's file, those of bodies included."""
    return sum(stored_bytes(value) or 0 for graph in model.graphs() for value in graph.initializers.values())


def restore_casts(model: ir.Model) -> None:
    """Store what is still as it was seen as it was stored, with its Cast."""
    import onnx_ir as ir

    for graph in list(model.graphs()):
        halves = []
        for name, value in list(graph.initializers.items()):
            tensor, seen = value.meta.get(_CAST, (None, None))
            if tensor is None or value.const_value is not seen or not value.uses() or value.is_graph_output():
                continue
            del graph.initializers[name]
            stored = add_initializer(graph, free_name(graph, tensor.name or f"{name}_half"), tensor)
            cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}_cast")
            output = cast.outputs[0]
            output.name, output.type, output.shape = name, value.type, value.shape
            value.replace_all_uses_with(output)
            halves.append(cast)
        if halves:
            prepend(graph, *halves)


def _as_float(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir as ir

    return ir.tensor(tensor.numpy().astype(np.float32), name=name)
