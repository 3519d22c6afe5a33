"""Short names for the nodes that quantize and restore values, and for their scales, and no shapes noted of them.

In a graph of many small layers, the names and noted shapes of these nodes were a third of the file. The runtime
infers shapes itself; weights, their codes and scales, and all that the model itself named keep their names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import count
from typing import TYPE_CHECKING

from quantcli.onnx.graph.casts import keeps_codes
from quantcli.onnx.graph.values import constant, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

_NODES = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def shorten_names(model: ir.Model, own: Collection[str]) -> None:
    """Rename what was added to a graph, in place; ``own`` are the names of the model's own values."""
    taken = own_names(model) | set(own)
    free = (name for name in (f"q{number}" for number in count()) if name not in taken)
    renamed = set[int]()
    decoded: set[ir.Value | None] = set()
    for node in list(model.graph.all_nodes()):
        decodes = keeps_codes(node) is False or _goes_on(node, decoded)
        if decodes:
            decoded.update(node.outputs)
        if not (decodes or is_standard(node, *_NODES)) or any(value.name in own for value in node.outputs):
            continue
        node.name = ""
        if decodes:
            _rename_outputs(node, free)
            continue
        for value in node.inputs[1:] if constant(node.inputs[0]) is None else ():
            # Both nodes of a pair read it, and perhaps those of other values.
            if value is None or constant(value) is None or value.name in own or id(value) in renamed:
                continue
            _rename_constant(value, next(free))
            renamed.add(id(value))
        _rename_outputs(node, free)


def own_names(model: ir.Model) -> set[str]:
    """Names of all values of a model, constants included."""
    return {value.name for value in _values(model) if value.name}


def _rename_outputs(node: ir.Node, free: Iterator[str]) -> None:
    for value in node.outputs:
        if not value.is_graph_output():
            value.name, value.shape, value.type = next(free), None, None


def _goes_on(node: ir.Node, decoded: Collection[ir.Value | None]) -> bool:
    """Whether a node works on codes that are being decoded, and on constants: one more step to a weight."""
    first, *others = node.inputs or (None,)
    return first in decoded and all(constant(value) is not None for value in others)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _rename_constant(value: ir.Value, name: str) -> None:
    graph = value.graph
    assert graph is not None and value.name is not None
    del graph.initializers[value.name]
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.register_initializer(value)
