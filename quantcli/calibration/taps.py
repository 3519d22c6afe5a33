"""Running a graph for the sake of the values inside: they are declared as outputs of a copy of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantcli.errors import InputError
from quantcli.models.session import Session
from quantcli.onnx.graph.model import constants
from quantcli.onnx.graph.save import SINGLE_FILE_LIMIT_BYTES

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

K = TypeVar("K", bound=Hashable)


def in_chunks(sizes: Mapping[K, int], limit: int) -> Iterator[list[K]]:
    """Keys in order, as many together as fit in ``limit`` bytes, and at least one."""
    chunk: list[K] = []
    taken = 0
    for key, nbytes in sizes.items():
        if chunk and taken + nbytes > limit:
            yield chunk
            chunk, taken = [], 0
        chunk.append(key)
        taken += nbytes
    if chunk:
        yield chunk


class TappedRuns:
    """Sessions of one graph with different outputs.

    Args:
        graph: the graph; it is left as it is.
        scratch: a folder for weights, where they are many.
    """

    def __init__(self, graph: ir.Model, scratch: Path) -> None:
        import onnx_ir as ir

        self._scratch = scratch
        self._graph = graph.clone()
        weights = list(constants(graph))
        large = sum(tensor.nbytes for tensor in weights) > SINGLE_FILE_LIMIT_BYTES
        self._in_memory = not large and not any(isinstance(tensor, ir.ExternalTensor) for tensor in weights)
        if not self._in_memory:
            # Written once; every session's graph refers to the same weights.
            ir.save(self._graph, scratch / "all.onnx", external_data="weights", max_workers=1)
            self._graph = ir.load(scratch / "all.onnx")

    def session(self, names: Sequence[str], *, shared: bool = False) -> Session | None:
        """A session with these values as outputs, and no other nodes than they need; None where all are inputs.

        ``shared``: see `Session`.
        """
        from onnx_ir.passes import common

        model = self._graph.clone()
        values = _values(model)
        outputs = [values[name] for name in names if not values[name].is_graph_input()]
        if not outputs:
            return None
        model.graph.outputs.clear()
        model.graph.outputs.extend(outputs)
        common.RemoveUnusedNodesPass()(model)
        return self._load(model, shared=shared)

    def sizes(self, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Bytes of each floating-point value in one run, in graph order. The values themselves are not kept."""
        import numpy as np
        import onnx_ir as ir

        model = self._graph.clone()
        values = _values(model)
        unknown = [name for name in names if name not in values]
        if unknown:
            raise InputError(f"The graph has no value {unknown[0]}.")
        model.graph.outputs.clear()
        kinds = {}
        for number, name in enumerate(names):
            value = values[name]
            if value.dtype is not None and not value.dtype.is_floating_point():
                continue
            shape = ir.node("Shape", [value], name=f"quantcli_shape_{number}")
            shape.outputs[0].name = f"quantcli_shape_{number}"
            shape.outputs[0].dtype = ir.DataType.INT64
            model.graph.append(shape)
            model.graph.outputs.append(shape.outputs[0])
            kinds[shape.outputs[0].name] = name
        if not kinds:
            return {}
        shapes = self._load(model).run(feeds)
        sizes = {kinds[key]: 4 * int(np.prod(shape)) for key, shape in shapes.items()}
        return {name: sizes[name] for name in values if name in sizes}

    def _load(self, model: ir.Model, *, shared: bool = False) -> Session:
        import onnx_ir as ir

        if self._in_memory:
            return Session(ir.to_proto(model).SerializeToString(), shared=shared)
        path = self._scratch / "part.onnx"
        ir.save(model, path)
        return Session(path, shared=shared)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """Inputs and values of the graph itself, in order."""
    found = {value.name: value for value in model.graph.inputs}
    found |= {value.name: value for node in model.graph for value in node.outputs}
    return {name: value for name, value in found.items() if name}
