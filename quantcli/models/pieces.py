"""Models that are run piece by piece where their weights are more than may be in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from quantcli.core.ports import Port
from quantcli.models.session import Session, session_of, session_of_lean
from quantcli.onnx.graph.model import constants, open_onnx
from quantcli.onnx.graph.pieces import Piece, cut, piece_of
from quantcli.onnx.graph.save import Lean, lean
from quantcli.system.memory import piece_bytes, require_memory

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir


class Pieces:
    """A model that is run as a `Session` runs it, of which one piece at a time is loaded.

    Args:
        model: the graph; its weights are best left in files.
        name: what errors call the model.
        optimize, prepack: as of `Session`; the runtime rewrites each piece by itself.

    Raises:
        InputError: onnxruntime cannot load the model.
        UsageError: a piece does not fit into the memory that the user allows.
    """

    def __init__(
        self, model: ir.Model, *, name: str | None = None, optimize: bool = True, prepack: bool = True
    ) -> None:
        self.name = name or "The model"
        self._lean, self._options = lean(model), {"name": self.name, "optimize": optimize, "prepack": prepack}
        whole = session_of_lean(_with_all_outputs(self._lean), name=self.name, optimize=False, prepack=False)
        ports = {port.name: port for port in whole.outputs}
        self.inputs = tuple(port for port in whole.inputs if port.name not in self._lean.weights)
        self.outputs = tuple(ports[port.name] for port in self._lean.proto.graph.output)
        self._types = {name: _typed(port) for name, port in ports.items() if _is_handed_on(port)}
        self._pieces = cut(self._lean.proto.graph, piece_bytes(), ports.keys() - self._types.keys())
        for piece in self._pieces:
            require_memory(self._described(piece), piece.nbytes)

    def __len__(self) -> int:
        return len(self._pieces)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One forward pass: outputs by name. Raises InputError where the runtime refuses the inputs."""
        return next(self.runs([feeds]))[0]

    def runs(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> Iterator[tuple[dict[str, np.ndarray], None]]:
        """Forward passes, for all of which each piece is loaded once: outputs, and no times.

        Raises:
            InputError: the runtime refuses the inputs.
        """
        given = list(feeds)
        values: list[dict[str, Any]] = [dict(each) for each in given]
        names = [port.name for port in self.outputs]
        for number, piece in enumerate(self._pieces):
            session = self._session(piece)
            needed = {name for later in self._pieces[number + 1 :] for name in later.inputs} | {*names}
            for held in values:
                held.update(session.run({name: held[name] for name in piece.inputs if name in held}, piece.outputs))
                for name in held.keys() - needed:
                    del held[name]
            del session
        while values:
            held = values.pop(0)
            yield {name: held[name] for name in names}, None

    def dumps(self, folder: Path) -> Iterator[Path]:
        """The graphs that the runtime makes of the pieces for itself, each a file that is gone with the next."""
        for piece in self._pieces:
            dump = folder / "optimized.onnx"
            self._session(piece, dump)
            yield dump
            for file in folder.iterdir():
                file.unlink()

    def _session(self, piece: Piece, dump: Path | None = None) -> Session:
        weights = {name: tensor for name, tensor in self._lean.weights.items() if name in piece.constants}
        part = Lean(piece_of(self._lean.proto, piece, self._types), weights, self._lean.folder)
        return session_of_lean(part, dump=dump, **self._options)

    def _described(self, piece: Piece) -> str:
        nodes = self._lean.proto.graph.node
        return next((nodes[index].name for index in piece.nodes if nodes[index].name), self.name)


#: What runs a model: whole, or in pieces.
Runnable: TypeAlias = "Session | Pieces"


def pieces_of(path: Path, *, name: str | None = None, **options: Any) -> Pieces | None:
    """A user's file in pieces; None where its weights may be in memory at a time. See `runnable`."""
    model = open_onnx(path, mapped=True)
    return Pieces(model.ir, name=name or str(path), **options) if model.size_bytes > piece_bytes() else None


def runnable(model: Path | ir.Model, *, name: str | None = None, **options: Any) -> Runnable:
    """A user's file, or a graph whose weights are best left in files, as a session, or in pieces.

    Args:
        model: the file, or the graph.
        name: what errors call it; by default the file's path.
        options: those of `Pieces`.

    Raises:
        InputError: onnxruntime cannot load the model.
        UsageError: a piece does not fit into the memory that the user allows.
    """
    if isinstance(model, Path):
        pieces = pieces_of(model, name=name, **options)
        return session_of(model, name=name, **options) if pieces is None else pieces
    if sum(tensor.nbytes for tensor in constants(model)) > piece_bytes():
        return Pieces(model, name=name, **options)
    return session_of_lean(lean(model), name=name, **options)


def _with_all_outputs(model: Lean) -> Lean:
    """A model that returns every value, so that the runtime tells their types; of its weights, none are looked at.

    Those that lie in no file are inputs.
    """
    import onnx

    proto, apart = onnx.ModelProto(), model.weights
    proto.CopyFrom(model.proto)
    graph = proto.graph
    kept = [tensor for tensor in graph.initializer if tensor.name not in apart]
    for tensor in graph.initializer:
        if tensor.name in apart:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    known = {port.name for port in graph.output}
    names: Sequence[str] = [name for node in graph.node for name in node.output if name and name not in known]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return Lean(proto, {}, model.folder)


def _is_handed_on(port: Port) -> bool:
    """Whether numpy can hold a value."""
    return not port.kind and port.dtype.kind in "fiubO"


def _typed(port: Port) -> onnx.ValueInfoProto:
    """A value's name, type and shape; the runtime tells a scalar no otherwise than any number of dimensions."""
    import onnx

    kind = onnx.TensorProto.STRING if port.dtype.kind == "O" else onnx.helper.np_dtype_to_tensor_dtype(port.dtype)
    return onnx.helper.make_tensor_value_info(port.name, kind, port.shape or None)
