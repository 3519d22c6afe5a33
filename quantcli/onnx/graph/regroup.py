"""Weights that an exporter cut up and put together otherwise, as torch's does with the gates of LSTM and GRU.

Folding node by node does not get there: each piece is a copy as long as another node reads its source. Nor do bodies
of control flow see each other: what both branches of an If make of one weight is made once, where that weight is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from quantcli.onnx.graph.simplify import GROWTH_ELEMENTS, lift_constants
from quantcli.onnx.graph.values import add_initializer, array, constant, is_standard, prepend

if TYPE_CHECKING:
    import onnx_ir as ir

#: Operators that move values and compute none.
_MOVERS = ("Concat", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")

#: What nodes compute, by node; equal for nodes that compute the same.
_Keys: TypeAlias = "dict[ir.Node, Hashable]"


def regroup_constants(model: ir.Model) -> None:
    """Compute what is cut out of constants and put together again, where the pieces take no more than these did."""
    import onnx_ir as ir
    from onnxscript import optimizer

    moved: dict[ir.Node, None] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not is_standard(node, *_MOVERS) or not node.inputs:
            continue
        if all(value is None or constant(value) is not None or value.producer() in moved for value in node.inputs):
            moved[node] = None
    keys = _keys(moved)
    taken = {node for group in _groups(moved) if _takes_no_more(group, keys) for node in group}
    if not taken:
        return
    chosen = _once([node for node in moved if node in taken], keys, model)
    largest = max(_elements(value) for node in chosen for value in node.inputs)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=largest + 1,
        output_size_limit=len(chosen) * (largest + 1),
        should_fold=lambda node: node in chosen,
    )
    lift_constants(model)


def _keys(nodes: Iterable[ir.Node]) -> _Keys:
    """What each of some nodes computes; small constants are told apart by what they hold."""
    keys: _Keys = {}

    def key_of(value: ir.Value | None) -> Hashable:
        if value is None:
            return None
        producer = value.producer()
        if producer in keys:
            return keys[producer], value.index()
        values = array(value) if 0 < _elements(value) <= GROWTH_ELEMENTS else None
        return value if values is None else (str(values.dtype), values.shape, values.tobytes())

    for node in nodes:
        attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
        keys[node] = node.op_type, attributes, tuple(map(key_of, node.inputs)), len(node.outputs)
    return keys


def _groups(nodes: Iterable[ir.Node]) -> list[set[ir.Node]]:
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


def _takes_no_more(group: set[ir.Node], keys: _Keys) -> bool:
    """Whether what leaves a group of nodes is no larger than the constants that nobody else reads."""
    freed = sum(
        _elements(value)
        for value in {value for node in group for value in node.inputs}
        if value is not None and not value.is_graph_output() and all(use.node in group for use in value.uses())
    )
    made: dict[Hashable, int] = {}
    for value in (value for node in group for value in node.outputs):
        if value.is_graph_output():
            return False
        if all(use.node in group for use in value.uses()):
            continue
        if value.shape is None or not value.shape.is_static():
            return False
        made[keys[_producer(value)], value.index()] = prod(int(dim) for dim in value.shape.numpy())
    return freed > GROWTH_ELEMENTS and sum(made.values()) <= freed + GROWTH_ELEMENTS


def _once(nodes: Sequence[ir.Node], keys: _Keys, model: ir.Model) -> set[ir.Node]:
    """Of nodes, each after those that it reads, one of each kind, in the graph of the constants that it is made of.

    There all can see it that read one of its kind: they see those constants, too.
    """
    depths = {graph: depth for depth, graph in enumerate(model.graphs())}
    taken = {value.name for node in model.graph.all_nodes() for value in node.outputs}
    taken |= {value.name for graph in depths for value in (*graph.inputs, *graph.initializers.values())}
    first: dict[Hashable, ir.Node] = {}
    for node in nodes:
        known = first.setdefault(keys[node], node)
        if known is not node:
            for ours, theirs in zip(node.outputs, known.outputs, strict=True):
                ours.replace_all_uses_with(theirs)
            _graph(node).remove(node, safe=True)
            continue
        large = [value for value in node.inputs if value is not None and not _is_small(value)]
        home = max((_home(value) for value in large), key=lambda graph: depths[graph], default=model.graph)
        if home is not node.graph:
            _move(node, home, taken)
    return set(first.values())


def _move(node: ir.Node, home: ir.Graph, taken: set[str | None]) -> None:
    """Put a node of a body into a graph around it, after what it reads there, under names that are free."""
    _graph(node).remove(node)
    for index, value in enumerate(node.inputs):
        if value is not None and _is_small(value) and value.graph is not home:
            values = array(value)
            assert values is not None
            node.replace_input_with(index, add_initializer(home, _free(f"{value.name}_outer", taken), values))
    for value in node.outputs:
        value.name = _free(f"{value.name}_outer", taken)
    read = {value.producer() for value in node.inputs if value is not None}
    last = next((other for other in reversed(home) if other in read), None)
    if last is None:
        prepend(home, node)
    else:
        home.insert_after(last, node)


def _graph(node: ir.Node) -> ir.Graph:
    import onnx_ir as ir

    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _home(value: ir.Value) -> ir.Graph:
    import onnx_ir as ir

    assert isinstance(value.graph, ir.Graph)
    return value.graph


def _producer(value: ir.Value) -> ir.Node:
    producer = value.producer()
    assert producer is not None
    return producer


def _free(wish: str, taken: set[str | None]) -> str:
    """A name that no value of any graph has, and that is taken from now on."""
    name, number = wish, 1
    while name in taken:
        number += 1
        name = f"{wish}_{number}"
    taken.add(name)
    return name


def _is_small(value: ir.Value) -> bool:
    """Whether a value is a constant that is as well copied."""
    tensor = constant(value)
    return tensor is not None and tensor.size <= GROWTH_ELEMENTS


def _elements(value: ir.Value | None) -> int:
    """Of a constant; of anything else 0."""
    tensor = constant(value)
    return 0 if tensor is None else tensor.size
