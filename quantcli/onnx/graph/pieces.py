"""A graph cut into pieces that run one after the other, each with a part of the weights.

Nodes stand in an order in which each reads only what was made before it, so that any place between two of them is one
to cut at: what was made before it and is read behind it is handed on. Nodes that only constants lead to, such as those
that make floats of codes, go along with whatever reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

#: Operators that give something else each time: run in two pieces, they would hand two values on in place of one.
_DRAWN = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")
)

#: Operators that the runtime makes one integer kernel of, with those that read what they make; or with that which makes
#: what they read. Between two pieces they would stay apart.
_FUSED_WITH_READERS = frozenset(("DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"))
_FUSED_WITH_MAKER = frozenset(("QuantizeLinear",))

#: Bytes of each value that the runtime makes of codes when it loads them.
_DECODED = 4


@dataclass(frozen=True)
class Piece:
    """Some of a graph's nodes.

    Attributes:
        nodes: their indices, in order.
        inputs: names of what they read that is made elsewhere, or is an input of the model.
        outputs: names of what they make that is read elsewhere, or is an output of the model.
        constants: names of the initializers that they read.
        nbytes: what these take in memory, with what the runtime makes of them at load.
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]
    nbytes: int


def cut(graph: onnx.GraphProto, limit: int, whole: Collection[str] = ()) -> list[Piece]:
    """Cut a graph where little is handed on, so that no piece's weights take more bytes than ``limit``.

    One node's weights may take more by themselves. No value in ``whole`` is handed on.
    """
    return _Cutter(graph, whole).pieces(limit)


class _Cutter:
    """What is known of a graph that is to be cut."""

    def __init__(self, graph: onnx.GraphProto, whole: Collection[str]) -> None:
        self.graph = graph
        self.reads = [tuple(dict.fromkeys(_reads(node))) for node in graph.node]
        self._outputs = [port.name for port in graph.output]
        self._sizes = {tensor.name: _nbytes(tensor) for tensor in graph.initializer}
        self._elements = {tensor.name: prod(tensor.dims) for tensor in graph.initializer}
        self._constant: dict[str, int] = {}
        self._main: list[int] = []
        for index, node in enumerate(graph.node):
            if self._is_constant(index, node):
                self._constant.update((name, index) for name in node.output)
            else:
                self._main.append(index)
        self._closures = [self._closure(index) for index in self._main]
        self._handed_on = self._places({*whole, *self._within_kernels()})

    def pieces(self, limit: int) -> list[Piece]:
        """The pieces, in order."""
        bounds, start = [0], 0
        while start < len(self._main):
            start = self._next(start, limit)
            bounds.append(start)
        parts = [range(begin, end) for begin, end in pairwise(bounds)] or [range(0)]
        return [self._piece(part, last=part is parts[-1]) for part in parts]

    def _is_constant(self, index: int, node: onnx.NodeProto) -> bool:
        if node.op_type in _DRAWN or any(name in self._outputs for name in node.output):
            return False
        known = all(name in self._sizes or name in self._constant for name in self.reads[index])
        return known and (bool(self.reads[index]) or node.op_type == "Constant")

    def _closure(self, index: int) -> tuple[frozenset[int], dict[str, int]]:
        """The constant nodes that a node needs; and the initializers that it and they read, with their bytes."""
        nodes: set[int] = set()
        sizes = {name: self._sizes[name] for name in self.reads[index] if name in self._sizes}
        waiting = [self._constant[name] for name in self.reads[index] if name in self._constant]
        while waiting:
            needed = waiting.pop()
            if needed in nodes:
                continue
            nodes.add(needed)
            for name in self.reads[needed]:
                if name in self._constant:
                    waiting.append(self._constant[name])
                else:
                    sizes[name] = self._sizes[name] + _DECODED * self._elements[name]
        return frozenset(nodes), sizes

    def _within_kernels(self) -> Iterator[str]:
        """Names of values that a kernel does not give away."""
        for node in self.graph.node:
            if node.op_type in _FUSED_WITH_READERS:
                yield from node.output
            elif node.op_type in _FUSED_WITH_MAKER:
                yield node.input[0]

    def _places(self, whole: Collection[str]) -> list[tuple[bool, int]]:
        """For each place before a node that is no constant: whether it must stay whole, and how much is handed on."""
        made: dict[str, int] = {}
        last: dict[str, int] = {}
        for place, index in enumerate(self._main):
            last.update((name, place) for name in self.reads[index])
            made.update((name, place) for name in self.graph.node[index].output if name)
        count, kept = ([0] * (len(self._main) + 2) for _ in range(2))
        for name, place in made.items():
            if last.get(name, place) > place:
                for totals in (count, kept) if name in whole else (count,):
                    totals[place + 1] += 1
                    totals[last[name] + 1] -= 1
        found, handed, stuck = [], 0, 0
        for more, also in zip(count, kept, strict=True):
            handed, stuck = handed + more, stuck + also
            found.append((stuck > 0, handed))
        return found

    def _next(self, start: int, limit: int) -> int:
        """Where the piece ends that begins at a place."""
        sizes: dict[str, int] = {}
        end, best, fewest, total = start, None, 0, 0
        for end in range(start, len(self._main)):
            new = {name: size for name, size in self._closures[end][1].items() if name not in sizes}
            stuck, handed = self._handed_on[end]
            # Once half of what may be is there, the place where least is handed on; before that, the last one.
            better = best is None or total < limit // 2 or handed <= fewest
            if end > start and not stuck and better:
                best, fewest = end, handed
            if new and best is not None and total + sum(new.values()) > limit:
                return best
            sizes |= new
            total += sum(new.values())
        return len(self._main)

    def _piece(self, places: range, *, last: bool) -> Piece:
        main = [self._main[place] for place in places]
        closures = [self._closures[place] for place in places]
        nodes = sorted({*main}.union(*(needed for needed, _ in closures)))
        constants = {name: size for _, sizes in closures for name, size in sizes.items()}
        made = {name for index in nodes for name in self.graph.node[index].output}
        reads = dict.fromkeys(name for index in nodes for name in self.reads[index])
        own = set(nodes)
        elsewhere = {name for index in self._main if index not in own for name in self.reads[index]}
        outputs = [
            name for index in main for name in self.graph.node[index].output
            if name and (name in elsewhere or name in self._outputs)
        ]  # fmt: skip
        if last:
            # The model may return what it is made of.
            returned = {name: self._sizes[name] for name in self._outputs if name in self._sizes}
            constants |= returned
            outputs += returned
        inputs = [name for name in reads if name not in made and name not in constants]
        return Piece(tuple(nodes), tuple(inputs), tuple(outputs), tuple(constants), sum(constants.values()))


def piece_of(model: onnx.ModelProto, piece: Piece, types: Mapping[str, onnx.ValueInfoProto]) -> onnx.ModelProto:
    """A piece as a model of its own; ``types`` of what is handed on, by name."""
    import onnx

    graph, constants = model.graph, {*piece.constants}
    made = {name for index in piece.nodes for name in graph.node[index].output}
    own = {port.name: port for port in graph.input}
    part = onnx.GraphProto(
        name=graph.name or "piece",
        node=[graph.node[index] for index in piece.nodes],
        initializer=[tensor for tensor in graph.initializer if tensor.name in constants],
        value_info=[value for value in graph.value_info if value.name in made],
        input=[own[name] if name in own else types[name] for name in piece.inputs],
        output=[types.get(name) or onnx.ValueInfoProto(name=name) for name in piece.outputs],
    )
    return onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=part
    )


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the values that a node reads, in its bodies, too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            yield from _free(body)


def _free(body: onnx.GraphProto) -> Sequence[str]:
    """Names that a body reads of the graphs around it."""
    own = {port.name for port in body.input} | {tensor.name for tensor in body.initializer}
    own |= {name for node in body.node for name in node.output}
    names = [name for node in body.node for name in _reads(node)] + [port.name for port in body.output]
    return [name for name in names if name not in own]


def _nbytes(tensor: onnx.TensorProto) -> int:
    import numpy as np
    import onnx

    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(prod(tensor.dims) * dtype.itemsize)
