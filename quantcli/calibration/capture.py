"""Running a graph for the sake of the values inside: they are declared as outputs of a copy of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantcli.errors import InputError
from quantcli.models.session import Session
from quantcli.onnx.graph.model import constants, load_graph
from quantcli.onnx.graph.save import SINGLE_FILE_LIMIT_BYTES
from quantcli.onnx.graph.simplify import remove_unused

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


def capture_activations(graph: ir.Model, scratch: Path) -> ActivationCapture:
    """Make ready to run a graph, which is left as it is; weights go into the folder ``scratch`` where they are many."""
    import onnx_ir as ir

    copy, weights = graph.clone(), list(constants(graph))
    large = sum(tensor.nbytes for tensor in weights) > SINGLE_FILE_LIMIT_BYTES
    if not large and not any(isinstance(tensor, ir.ExternalTensor) for tensor in weights):
        return ActivationCapture(copy, None)
    # Written once; every session's graph refers to the same weights.
    ir.save(copy, scratch / "all.onnx", external_data="weights", max_workers=1)
    return ActivationCapture(load_graph(scratch / "all.onnx"), scratch)


class ActivationCapture:
    """Sessions of one graph with different outputs. Use `capture_activations`.

    Args:
        graph: a graph of its own.
        folder: where its weights are, and its sessions' graphs go; None: all is in memory.
    """

    def __init__(self, graph: ir.Model, folder: Path | None) -> None:
        self._graph, self._folder = graph, folder
        self._optimize = True

    def session(self, names: Sequence[str], *, shared: bool = False) -> Session | None:
        """A session with these values as outputs, and no other nodes than they need; None where all are inputs.

        ``shared``: see `Session`.
        """
        model = self._graph.clone()
        values = _values(model)
        outputs = [values[name] for name in names if not values[name].is_graph_input()]
        if not outputs:
            return None
        model.graph.outputs.clear()
        model.graph.outputs.extend(outputs)
        remove_unused(model)
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
        try:
            shapes = self._load(model).run(feeds)
        except InputError:
            # In a layout of the runtime's own, a value that is asked for may have the wrong size.
            self._optimize = False
            shapes = self._load(model).run(feeds)
        sizes = {kinds[key]: 4 * int(np.prod(shape)) for key, shape in shapes.items()}
        return {name: sizes[name] for name in values if name in sizes}

    def _load(self, model: ir.Model, *, shared: bool = False) -> Session:
        import onnx_ir as ir

        if self._folder is None:
            return Session(ir.to_proto(model).SerializeToString(), shared=shared, optimize=self._optimize)
        path = self._folder / "part.onnx"
        ir.save(model, path)
        return Session(path, shared=shared, optimize=self._optimize, name="The model")


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """Inputs and values of the graph itself, in order."""
    values = {value.name: value for value in model.graph.inputs}
    values |= {value.name: value for node in model.graph for value in node.outputs}
    return {name: value for name, value in values.items() if name}
