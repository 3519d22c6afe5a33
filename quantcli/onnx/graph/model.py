"""An ONNX file, opened lazily: weights in external data are mapped when they are used, never all at once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.core.manifest import MANIFEST_KEY, Manifest
from quantcli.core.ports import Port
from quantcli.errors import InputError
from quantcli.onnx.graph.external import LARGE_BYTES, external_files, find_external
from quantcli.onnx.graph.sparse import write_out_sparse
from quantcli.onnx.graph.wire import read_lean
from quantcli.system.files import Unchanged, reading
from quantcli.system.text import first_line

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

#: The oldest operator set whose models are read: the oldest that onnxruntime promises to run.
OLDEST_OPSET = 7

#: What a folder of weights holds.
_CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")

#: Bytes hashed at a time.
_HASH_CHUNK = 1 << 22

#: Where an input or output keeps its type, a serialized message, where it holds a map, for which onnx-ir has none.
_TYPE_OF_MAP = "quantcli.type_of_map"


def is_onnx(path: Path) -> bool:
    """Whether a path names an ONNX file, or a folder that holds one and no weights beside it.

    In a folder it is ``model.onnx``, or the only one in ``onnx``, as transformers.js has it.
    """
    if not path.is_dir():
        return path.suffix == ".onnx"
    # Folders with both are exports lying beside their checkpoint, which is what is meant. Older folders of
    # sentence-transformers keep that in a folder of its own, the first of a numbered row.
    places = (path, *path.glob("0_*"))
    weights = any(next(place.glob(kind), None) for place in places for kind in _CHECKPOINT_FILES)
    return onnx_file(path).is_file() and not weights


def onnx_file(path: Path) -> Path:
    """The ONNX file of a path for which `is_onnx` holds."""
    if not path.is_dir():
        return path
    named, inner = path / "model.onnx", sorted(path.glob("onnx/*.onnx"))
    return inner[0] if len(inner) == 1 and not named.is_file() else named


class OnnxModel:
    """A model's graph with lazy weights. Use `open_onnx`.

    ``shown`` is what messages call it: its path, or the user's model where the graph was exported from that.
    ``defaults`` are constants that were inputs as well, which a caller might feed; in ``ir`` they are none.
    """

    def __init__(self, path: Path, model: ir.Model, defaults: Collection[str] = ()) -> None:
        self.path, self.ir = path, model
        self.shown = path
        self.defaults = frozenset(defaults)
        self._watched = Unchanged(())

    def watch(self) -> None:
        """Remember what its files are now."""
        self._watched = Unchanged(self.files)

    def require_unchanged(self) -> None:
        """Raise InputError where one of its files was written or replaced since it was opened."""
        self._watched.require()

    @property
    def opset(self) -> int:
        """Version of the default operator set; 0 where the graph has only operators of other domains."""
        return self.ir.opset_imports.get("", 0)

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """What the model must be fed (initializers that are inputs too have a default and are left out)."""
        return tuple(port(value) for value in self.ir.graph.inputs if value.name not in self.ir.graph.initializers)

    @cached_property
    def outputs(self) -> tuple[Port, ...]:
        """What it returns."""
        return tuple(port(value) for value in self.ir.graph.outputs)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The file itself, then its external data."""
        itself = self.path.resolve()
        return (self.path, *(file for file in external_files(self.ir) if file != itself))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def manifest(self) -> Manifest:
        """What quantcli wrote into the model; empty where that is nothing, or is not quantcli's."""
        try:
            return Manifest.parse(self.ir.metadata_props.get(MANIFEST_KEY), self.path)
        except InputError:
            return Manifest()  # whoever wrote it, the graph is whole without it

    def sha256(self) -> str:
        """Hash of all files, names aside: that of the file itself where there is only one. Read once."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            with reading(file), file.open("rb") as stream:
                while chunk := stream.read(_HASH_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()


def open_onnx(path: Path, *, mapped: bool = False) -> OnnxModel:
    """Open an ONNX file without reading external weights; ``mapped``: nor those of the file itself, where large.

    Raises:
        InputError: the file is missing, is not ONNX, is truncated, is too old, or external data is missing,
            short, or lies outside the model's folder.
    """
    from onnx_ir.passes import common

    from quantcli.onnx.graph.checked import require_sound

    path = onnx_file(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
    try:
        model = load_graph(path, mapped=mapped)
        require_sound(model)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        # protobuf, and onnx-ir above it, raise whatever a damaged message makes them stumble over.
        raise InputError(
            f"{path} is not a readable ONNX model: {first_line(_cause(error))}.",
            "It may be truncated, or of another kind.",
        ) from error
    if not len(model.graph) and not model.graph.outputs:
        raise InputError(f"{path} is not an ONNX model: it holds no graph.")
    if "ai.onnx" in model.opset_imports:
        # Its other name.
        model.opset_imports.setdefault("", model.opset_imports.pop("ai.onnx"))
    # Before IR version 4 every initializer was an input as well; nobody feeds those.
    later = model.ir_version is None or model.ir_version > 3
    opened = OnnxModel(
        path, model, [str(value.name) for value in model.graph.inputs if later and value.is_initializer()]
    )
    if 0 < opened.opset < OLDEST_OPSET:
        raise InputError(
            f"{path} uses operator set {opened.opset}; the oldest that onnxruntime runs is {OLDEST_OPSET}.",
            "Export it anew, or upgrade it with onnx.version_converter.",
        )
    find_external(model, path)
    opened.watch()
    common.RemoveInitializersFromInputsPass()(model)
    return opened


def _cause(error: BaseException) -> BaseException:
    """What an error began with; onnx-ir's own say only in which part of the file it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def load_graph(path: Path, *, mapped: bool = False) -> ir.Model:
    """Read a file as it is, but for what onnx-ir has not.

    Types of maps are left out, which onnxruntime infers by itself; sparse constants are written out; nodes are put into
    order. With ``mapped`` its large weights are tensors of an external file, which is the file itself.

    Raises:
        ValueError: a constant is there twice.
    """
    import onnx
    from onnx_ir import external_data

    from quantcli.onnx.graph.checked import require_one_of_each

    proto = read_lean(path, LARGE_BYTES) if mapped else onnx.load(path, load_external_data=False)
    write_out_sparse(proto, path.parent)
    require_one_of_each(proto.graph)
    model = from_message(proto)
    external_data.set_base_dir(model.graph, path.parent)
    if not _is_sorted(model.graph):
        # The standard wants nodes behind what they read. onnxruntime sorts them, and its own converter to float16
        # writes some in another order.
        model.graph.sort()
    return model


def from_message(proto: onnx.ModelProto) -> ir.Model:
    """A graph of a message, whose types of maps are put aside: onnx-ir has none. Changes the message."""
    import onnx_ir as ir

    maps = {}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if _holds_map(value.type):
            maps[value.name] = value.type.SerializeToString()
            value.ClearField("type")
    model = ir.from_proto(proto)
    for port in (*model.graph.inputs, *model.graph.outputs):
        if port.name in maps:
            port.meta[_TYPE_OF_MAP] = maps[port.name]
    return model


def write_types(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Give inputs and outputs in a message the types that `from_message` left out: onnx asks for them."""
    ports = (*model.graph.inputs, *model.graph.outputs)
    for port, message in zip(ports, (*proto.graph.input, *proto.graph.output), strict=True):
        if _TYPE_OF_MAP in port.meta:
            message.type.ParseFromString(port.meta[_TYPE_OF_MAP])


def keep_types(source: ir.Model, target: ir.Model) -> None:
    """Hand what `write_types` writes on to the same graph that was read anew."""
    for before, after in ((source.graph.inputs, target.graph.inputs), (source.graph.outputs, target.graph.outputs)):
        for port, new in zip(before, after, strict=True):
            if _TYPE_OF_MAP in port.meta:
                new.meta[_TYPE_OF_MAP] = port.meta[_TYPE_OF_MAP]


def _is_sorted(graph: ir.Graph) -> bool:
    """Whether every node of a graph and its bodies stands behind those whose values it reads."""
    seen = set()
    for node in graph.all_nodes():
        seen.add(node)
        if any(value is not None and (made := value.producer()) and made not in seen for value in node.inputs):
            return False
    return True


def _holds_map(kind: onnx.TypeProto) -> bool:
    inner = kind.WhichOneof("value")
    if inner in ("sequence_type", "optional_type"):
        return _holds_map(getattr(kind, inner).elem_type)
    return bool(inner == "map_type")


def constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every initializer's tensor, subgraphs included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def port(value: ir.Value) -> Port:
    """Name, dtype and shape of a graph's input or output. One that is not a tensor, or does not say, has a kind."""
    import numpy as np
    import onnx_ir as ir

    kind = value.type
    tensor = kind.elem_type if isinstance(kind, ir.OptionalType) else kind
    if not isinstance(tensor, ir.TensorType) or tensor.dtype == ir.DataType.UNDEFINED:
        return Port(value.name or "", np.dtype(object), None, kind="of no stated type" if kind is None else str(kind))
    dims = None if value.shape is None else tuple(_dimension(dim) for dim in value.shape)
    # An optional tensor is given as one.
    return Port(value.name or "", np.dtype(tensor.dtype.numpy()), dims, kind="" if tensor is kind else str(kind))


def _dimension(dim: Any) -> int | str | None:
    # Some exporters write -1 for a free dimension.
    return (dim if dim >= 0 else None) if isinstance(dim, int) else getattr(dim, "value", None)
