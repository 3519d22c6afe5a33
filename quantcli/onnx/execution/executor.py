"""A graph as a differentiable torch function, with constants and single nodes replaced: what tuning trains through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.onnx.execution.attributes import Outputs, no_torch_form
from quantcli.onnx.execution.elementwise import HOST_INPUTS, OPERATORS, to_torch
from quantcli.onnx.graph.values import array, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

CPU = torch.device("cpu")

#: Computes a node's outputs from its inputs, None where one is absent; constants are read only when asked for.
Replacement = Callable[[Sequence[Tensor | None]], Sequence[Tensor]]

_NO_VALUES: Mapping[str, Tensor] = {}
_NO_REPLACEMENTS: Mapping[str, Replacement] = {}


@dataclass(frozen=True)
class _Step:
    """A node, its torch form if there is one, and the values that no later node reads."""

    node: ir.Node
    function: Callable[..., Outputs] | None
    last_read: tuple[ir.Value, ...]


class TorchGraph:
    """Runs a graph, as `prepare` leaves it, in torch.

    Integers that shapes are made of stay in the CPU's memory, so that a GPU is not waited for.

    Args:
        model: the graph; a constant is read when a node first needs it, and kept.
        device: where it runs.
        replaceable: first outputs of the nodes that every run replaces; there need not be a torch form of these.

    Raises:
        InputError: there is no torch form of an operator.
    """

    def __init__(self, model: ir.Model, device: torch.device = CPU, *, replaceable: Collection[str] = ()) -> None:
        self.device = device
        self._inputs, self._outputs = (
            {value.name or "": value for value in side} for side in (model.graph.inputs, model.graph.outputs)
        )
        self._constants: dict[ir.Value, Tensor] = {}
        self._steps = _steps(model.graph)
        self._computed_with = {
            value for node in model.graph for i, value in enumerate(node.inputs) if i not in _read_as_numbers(node)
        }
        for step in self._steps:
            if step.function is None and step.node.outputs[0].name not in replaceable:
                raise no_torch_form(step.node)

    def run(
        self,
        feeds: Mapping[str, Tensor],
        *,
        values: Mapping[str, Tensor] = _NO_VALUES,
        replaced: Mapping[str, Replacement] = _NO_REPLACEMENTS,
    ) -> dict[str, Tensor]:
        """Outputs of the graph by name. A value is dropped after the last node that reads it.

        Args:
            feeds: inputs of the graph by name.
            values: what stands in place of constants, by name.
            replaced: what computes the outputs of nodes, by the name of a node's first output.

        Raises:
            InputError: an input is missing, or an operator is used in a way that there is no torch form of.
        """
        held = {value: feeds[name].to(self.device) for name, value in self._inputs.items() if name in feeds}

        def read(value: ir.Value) -> Tensor:
            if value in held:
                return held[value]
            replaced = values.get(value.name or "")
            return self._constant(value) if replaced is None else replaced

        for step in self._steps:
            held |= _computed(step, read, replaced)
            for value in step.last_read:
                held.pop(value, None)
        return {name: read(value) for name, value in self._outputs.items()}

    def _constant(self, value: ir.Value) -> Tensor:
        if value not in self._constants:
            values = array(value)
            if values is None:
                raise InputError(f"The model's input {value.name} is missing.")
            # The first run may be one for which torch prepares nothing that gradients need; others follow.
            with torch.inference_mode(False):
                tensor = to_torch(values)
                near = tensor.is_floating_point() and value in self._computed_with
                self._constants[value] = tensor.to(self.device) if near else tensor
        return self._constants[value]


class _Inputs(Sequence[Tensor | None]):
    """A node's inputs, each read when it is asked for."""

    def __init__(self, inputs: Sequence[ir.Value | None], read: Callable[[ir.Value], Tensor]) -> None:
        self._inputs, self._read = inputs, read

    def __len__(self) -> int:
        return len(self._inputs)

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor | None]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor | None] | None:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        value = self._inputs[index]
        return None if value is None else self._read(value)


def _steps(graph: ir.Graph) -> list[_Step]:
    last: dict[ir.Value, ir.Node] = {}
    for node in graph:
        # What nobody reads is dropped by the node that made it.
        last.update((value, node) for value in (*node.outputs, *node.inputs) if value is not None)
    dropped: dict[ir.Node, list[ir.Value]] = {}
    for value, node in last.items():
        if not value.is_graph_output():
            dropped.setdefault(node, []).append(value)
    return [
        _Step(
            node, OPERATORS.get(node.op_type) if is_standard(node, node.op_type) else None, tuple(dropped.get(node, ()))
        )
        for node in graph
    ]


def _computed(
    step: _Step, read: Callable[[ir.Value], Tensor], replaced: Mapping[str, Replacement]
) -> dict[ir.Value, Tensor]:
    """Outputs of a node. A function of its own, so that nothing else holds them."""
    node, name = step.node, step.node.outputs[0].name or ""
    inputs = _Inputs(node.inputs, read)
    if name in replaced:
        outputs: Outputs = replaced[name](inputs)
    elif step.function is None:
        raise no_torch_form(node)
    else:
        try:
            outputs = step.function(node, *_on_one_device(node, inputs))
        except NotImplementedError as error:
            raise no_torch_form(node, f"such inputs: {error}") from error
    by_value = dict(zip(node.outputs, [outputs] if isinstance(outputs, Tensor) else outputs, strict=False))
    for value in node.outputs[len(by_value) :]:
        if value.uses() or value.is_graph_output():
            raise no_torch_form(node, f"its output {value.name}")
    return by_value


def _read_as_numbers(node: ir.Node) -> tuple[int, ...]:
    return HOST_INPUTS.get(node.op_type, ()) if is_standard(node, node.op_type) else ()


def _on_one_device(node: ir.Node, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A node's inputs beside each other, but for those that its operator reads as numbers."""
    tensors = list(inputs)
    apart = _read_as_numbers(node)
    devices = (tensor.device for tensor in tensors if tensor is not None)
    device = next((device for device in devices if device != CPU), CPU)
    return [tensor if tensor is None or i in apart else tensor.to(device) for i, tensor in enumerate(tensors)]
