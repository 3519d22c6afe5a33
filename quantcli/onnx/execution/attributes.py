"""What torch forms of ONNX's operators are made with: attributes, and errors that name a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from quantcli.errors import InputError
from quantcli.onnx.graph.values import integers

if TYPE_CHECKING:
    import onnx_ir as ir

Outputs = Tensor | Sequence[Tensor]


def opset(node: ir.Node) -> int:
    """Version of the operator set that a node is of."""
    return 1 if node.graph is None else node.graph.opset_imports.get("", 1)


def text(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def axes_of(node: ir.Node, axes: Tensor | None) -> list[int] | None:
    """Axes from the input that newer operator sets have, or the attribute of older ones."""
    return integers(node, "axes") if axes is None else axes.reshape(-1).tolist()


def no_torch_form(node: ir.Node, used_with: str = "") -> InputError:
    """What to raise for an operator, or one that is used with something, that torch does not compute."""
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    used = f" with {used_with}" if used_with else ""
    return InputError(f"There is no torch form of {name}{used} (node {node.name or node.outputs[0].name}).")
