"""Weights that an exporter cut up and put together otherwise, as torch's does with the gates of LSTM and GRU.

Folding node by node does not get there: each piece is a copy as long as another node reads its source.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from quantcli.onnx.graph.simplify import GROWTH_ELEMENTS, lift_constants
from quantcli.onnx.graph.values import constant, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

#: Operators that move values and compute none.
_MOVERS = ("Concat", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def regroup_constants(model: ir.Model) -> None:
    """Compute what is cut out of constants and put together again, where the pieces take no more than these did."""
    from onnxscript import optimizer

    movers = [node for node in model.graph if is_standard(node, *_MOVERS)]
    moved: set[ir.Node] = set()
    for node in movers:
        if all(v is None or constant(v) is not None or v.producer() in moved for v in node.inputs):
            moved.add(node)
    chosen = {node for group in _groups(moved) if _takes_no_more(group) for node in group}
    if not chosen:
        return
    largest = max(_elements(value) for node in chosen for value in node.inputs)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=largest + 1,
        output_size_limit=len(chosen) * (largest + 1),
        should_fold=lambda node: node in chosen,
    )
    lift_constants(model)


def _groups(nodes: set[ir.Node]) -> list[set[ir.Node]]:
    """Nodes that share a large source, or read each other, together."""
    groups: list[set[ir.Node]] = []
    waiting = set(nodes)
    while waiting:
        group: set[ir.Node] = set()
        border = [waiting.pop()]
        while border:
            node = border.pop()
            group.add(node)
            for value in (*node.inputs, *node.outputs):
                tensor = constant(value)
                if value is None or (tensor is not None and tensor.size <= GROWTH_ELEMENTS):
                    continue
                readers = {use.node for use in value.uses()}
                near = {node for node in waiting if node in readers or node is value.producer()}
                border += near
                waiting -= near
        groups.append(group)
    return groups


def _takes_no_more(group: set[ir.Node]) -> bool:
    """Whether what leaves a group of nodes is no larger than the constants that nobody else reads."""
    freed = sum(
        _elements(value)
        for value in {value for node in group for value in node.inputs}
        if value is not None and not value.is_graph_output() and all(use.node in group for use in value.uses())
    )
    made = 0
    for value in (value for node in group for value in node.outputs):
        if value.is_graph_output():
            return False
        if all(use.node in group for use in value.uses()):
            continue
        if value.shape is None or not value.shape.is_static():
            return False
        made += prod(int(dim) for dim in value.shape.numpy())
    return freed > GROWTH_ELEMENTS and made <= freed + GROWTH_ELEMENTS


def _elements(value: ir.Value | None) -> int:
    """Of a constant; of anything else 0."""
    tensor = constant(value)
    return 0 if tensor is None else tensor.size
