"""Sparse constants written out: what reads a graph here, and all that rewrites it, knows dense ones alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def write_out_sparse(model: onnx.ModelProto, folder: Path) -> None:
    """Make dense constants of sparse ones, in place, in bodies and functions, too.

    Args:
        model: a model as it was read.
        folder: its folder, for values that lie in a file beside it.
    """
    _in_graph(model.graph, folder)
    for function in model.functions:
        for node in function.node:
            _in_node(node, folder)


def _in_graph(graph: onnx.GraphProto, folder: Path) -> None:
    graph.initializer.extend(_dense(tensor, folder) for tensor in graph.sparse_initializer)
    graph.ClearField("sparse_initializer")
    for node in graph.node:
        _in_node(node, folder)


def _in_node(node: onnx.NodeProto, folder: Path) -> None:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            _in_graph(attribute.g, folder)
        for graph in attribute.graphs:
            _in_graph(graph, folder)
        if attribute.HasField("sparse_tensor") and node.op_type == "Constant":
            dense = _dense(attribute.sparse_tensor, folder)
            attribute.ClearField("sparse_tensor")
            attribute.name, attribute.type = "value", attribute.TENSOR
            attribute.t.CopyFrom(dense)


def _dense(tensor: onnx.SparseTensorProto, folder: Path) -> onnx.TensorProto:
    """The same values in place, and zeros between them. Indices are places in the flat tensor, or coordinates."""
    import numpy as np
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor.values, str(folder))
    places = numpy_helper.to_array(tensor.indices, str(folder))
    dense = np.zeros(tuple(tensor.dims), values.dtype)
    if places.ndim == 1:
        dense.reshape(-1)[places] = values
    else:
        dense[tuple(places.T)] = values
    return numpy_helper.from_array(dense, tensor.values.name)
