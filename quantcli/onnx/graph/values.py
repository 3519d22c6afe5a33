"""Small questions about values of a graph, asked everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def prepend(graph: ir.Graph, *nodes: ir.Node) -> None:
    """Put nodes before all others."""
    first = next(iter(graph), None)
    if first is None:
        graph.extend(nodes)
    else:
        graph.insert_before(first, nodes)


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can override, or None. Nothing is read."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def array(value: ir.Value | None) -> np.ndarray | None:
    """The values of a constant, or None. Raises InputError where they do not fill its shape."""
    tensor = constant(value)
    try:
        return None if tensor is None else tensor.numpy()
    except ValueError as error:
        name = value.name if value is not None else ""
        raise InputError(f"The model's constant {name} is damaged: {error}.") from error


def holds_infinity(value: ir.Value | None) -> bool:
    """Whether a constant has infinite values, as one does that masks classes out."""
    values = array(value)
    return values is not None and bool(np.isinf(values).any())


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, where nobody else does and it is not an output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input by position; None where it is absent or left empty."""
    return node.inputs[index] if index < len(node.inputs) else None


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def integers(node: ir.Node, name: str) -> list[int] | None:
    """A list of integers, or None where the attribute is absent."""
    attribute = node.attributes.get(name)
    return None if attribute is None else list(attribute.as_ints())


def real(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def text(node: ir.Node, name: str, default: str) -> str:
    """A text attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is one of these operators of ONNX itself."""
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


def rank(value: ir.Value) -> int | None:
    """Number of dimensions where it is known."""
    return None if value.shape is None else len(value.shape)


def add_initializer(graph: ir.Graph, name: str, values: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Register a new constant; its name must be free."""
    import onnx_ir as ir

    tensor = values if isinstance(values, ir.TensorProtocol) else ir.tensor(values)
    tensor.name = name
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove a constant that no node reads any more."""
    if value.name is not None and not value.uses() and not value.is_graph_output():
        graph.initializers.pop(value.name, None)


def free_name(graph: ir.Graph, wish: str) -> str:
    """``wish``, or with a number behind it where that name is taken by a constant."""
    name, number = wish, 1
    while name in graph.initializers:
        number += 1
        name = f"{wish}_{number}"
    return name
