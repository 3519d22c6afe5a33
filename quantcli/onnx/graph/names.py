"""Names and bytes of an exported graph: layers are called what the torch module calls them, and nothing else stays.

torch's exporter numbers nodes (node_MatMul_86) and notes the module of each in its metadata, along with stack
traces that hold the paths of the machine it ran on.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from quantcli.onnx.graph.values import constant, free_name

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"

#: What the exporter calls the module of nodes that belong to none.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


def name_by_modules(model: ir.Model, prefix: str = "") -> None:
    """Rename nodes and weights after the torch modules they come from, without ``prefix`` in front.

    A node becomes ``module/node``; a matrix that the exporter folded, and so renamed, ``module.weight`` again.
    """
    graph = model.graph
    scopes = {node: f"{_scope(node)}.".removeprefix(prefix).rstrip(".") for node in graph}
    for value in list(graph.initializers.values()):
        name = value.name or ""
        readers = {scopes[use.node] for use in value.uses() if use.node in scopes}
        tensor = constant(value)
        if "." in name:
            _rename(graph, value, name.removeprefix(prefix))
        elif tensor is not None and len(tensor.shape) == 2 and len(readers) == 1 and (scope := readers.pop()):
            _rename(graph, value, f"{scope}.weight")
    for node, noted in scopes.items():
        if scope := _weights_module(node) or noted:
            node.name = f"{scope}/{(node.name or node.op_type).removeprefix('node_')}"


def strip_metadata(model: ir.Model) -> None:
    """Remove documentation and metadata everywhere: they tell paths and are no part of the function."""
    model.doc_string = None
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            _strip(value)
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                _strip(value)


def _strip(value: ir.Value) -> None:
    import onnx_ir as ir

    value.doc_string = None
    value.metadata_props.clear()
    tensor = value.const_value
    if tensor is not None and tensor.doc_string:
        # Not every kind of tensor lets its text be changed.
        tensor = value.const_value = ir.tensor(tensor.numpy(), tensor.dtype, value.name)
    if tensor is not None:
        tensor.metadata_props.clear()


def _scope(node: ir.Node) -> str:
    """Dotted name of the innermost module, empty where none is noted."""
    text = node.metadata_props.get(_SCOPES)
    modules = ast.literal_eval(text)[:-1] if text else []
    return str(modules[-1]) if modules and modules[-1] != _NO_MODULE else ""


def _weights_module(node: ir.Node) -> str | None:
    """The module whose own weight a node reads: a norm that was folded into it has left only its name."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and len(value.uses()) == 1:
            module, _, kind = (value.name or "").rpartition(".")
            if kind == "weight" and module:
                return module
    return None


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if not name or name == value.name:
        return
    assert value.name is not None
    graph.initializers.pop(value.name)
    value.name = free_name(graph, name)
    if value.const_value is not None:
        value.const_value.name = value.name
    graph.register_initializer(value)
