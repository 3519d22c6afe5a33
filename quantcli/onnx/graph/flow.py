"""What is computed of a value, into the bodies of If, Loop and Scan, from one turn of them to the next, and out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from quantcli.onnx.graph.values import integer, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

#: Inputs of a Loop, and of its body, before the values that go from turn to turn: how many turns, and if one comes.
_BEFORE_STATES = 2


class Flow:
    """Values of a graph and what they reach.

    Args:
        model: the graph; functions are not looked into.
    """

    def __init__(self, model: ir.Model) -> None:
        import onnx_ir as ir

        self._owners: dict[ir.Graph, ir.Node] = {}
        self._bodies: dict[ir.Node, list[ir.Graph]] = {}
        for node in model.graph.all_nodes():
            kinds = (each for each in node.attributes.values() if each.type == ir.AttributeType.GRAPH)
            self._bodies[node] = [each.as_graph() for each in kinds]
            self._owners |= dict.fromkeys(self._bodies[node], node)

    def meets(self, values: Iterable[ir.Value], wanted: Callable[[ir.Node], bool]) -> bool:
        """Whether a wanted node follows one of some values, or one of them says which body runs, or how often."""
        waiting = list(values)
        seen = set(waiting)
        while waiting:
            value = waiting.pop()
            if self._decides(value) or any(wanted(use.node) for use in value.uses()):
                return True
            new = [reached for reached in self._next(value) if reached not in seen]
            seen.update(new)
            waiting += new
        return False

    def _owner(self, value: ir.Value) -> tuple[ir.Graph, ir.Node] | None:
        """The body that a value is an output of, and the node that it belongs to."""
        import onnx_ir as ir

        graph = value.graph if value.is_graph_output() else None
        return (graph, self._owners[graph]) if isinstance(graph, ir.Graph) and graph in self._owners else None

    def _decides(self, value: ir.Value) -> bool:
        for use in value.uses():
            if is_standard(use.node, "If") or (is_standard(use.node, "Loop") and use.idx < _BEFORE_STATES):
                return True
        owner = self._owner(value)
        return owner is not None and is_standard(owner[1], "Loop") and owner[0].outputs[0] is value

    def _next(self, value: ir.Value) -> Iterator[ir.Value]:
        for use in value.uses():
            bodies = self._bodies.get(use.node, [])
            # What Loop, Scan and SequenceMap are given, their bodies are given in the same order.
            handed_on = [each for body in bodies for each in body.inputs[use.idx : use.idx + 1]]
            yield from handed_on or use.node.outputs
        owner = self._owner(value)
        if owner is None:
            return
        body, node = owner
        for index in (index for index, output in enumerate(body.outputs) if output is value):
            if is_standard(node, "Loop"):
                # The body's first output says whether there is another turn; the node returns the others.
                yield from node.outputs[max(index - 1, 0) : index]
                yield from body.inputs[index + 1 : index + 2]
                continue
            yield from node.outputs[index : index + 1]
            if is_standard(node, "Scan"):
                states = len(body.inputs) - integer(node, "num_scan_inputs", 0)
                yield from body.inputs[:states][index : index + 1]
