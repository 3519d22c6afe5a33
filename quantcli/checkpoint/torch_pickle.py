"""torch state dicts (``.pt``, ``.pth``, ``.bin``) read without torch and without running a pickle.

A torch file is a zip archive: ``data.pkl`` describes tensors, ``data/N`` holds raw storages. Before torch
1.6 it was a stream: pickles, then the storages. Either way the pickle is walked by an unpickler that knows
only what a state dict is made of; any other name in it is refused before anything is called.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Callable, Mapping
from math import prod
from operator import index
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from quantcli.checkpoint.positional import PositionalFile
from quantcli.core.dtypes import DTYPE_BYTES, DTYPE_OF_TORCH_NAME
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError
from quantcli.system.files import stored_member_offset

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 64 << 20
#: First pickle of the stream that torch wrote before 1.6.
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 1 << 62

#: Attributes of torch that a pickle names dtypes by, as storages or (for newer dtypes) as themselves.
_DTYPES = DTYPE_OF_TORCH_NAME | {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip

#: Where training scripts put the state dict among other things.
_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")


class _Storage(NamedTuple):
    """Bytes that tensors are views of. A tuple, like `_TensorRecord`: a pickle cannot change it once made."""

    key: str
    dtype: str
    nbytes: int


class _TensorRecord(NamedTuple):
    """A tensor as the pickle describes it: a strided view of a storage, in elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _TensorRecord:
    """``rest``: the gradient's flag, hooks, the dtype where the storage has none, marks such as negation."""
    dtype, *marks = rest[2:] if len(rest) > 2 and isinstance(rest[2], str) else (storage.dtype, *rest[2:])
    if not isinstance(storage, _Storage) or dtype not in DTYPE_BYTES:
        raise pickle.UnpicklingError(f"a tensor of {dtype!r} in {storage!r}")
    if any(marks):
        raise pickle.UnpicklingError("a tensor that is only marked as negated or conjugated")
    return _TensorRecord(storage, dtype, index(offset), tuple(map(index, shape)), tuple(map(index, stride)))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): tuple,
}


class _Record(dict[Any, Any]):
    """What stands for a harmless object that is no tensor, such as a training script's options: its entries, if any.

    Whatever else a pickle says of the object is taken and forgotten.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


#: What training scripts keep beside the weights, and its kind; none of it is made.
_RECORDS = {
    "collections": ("Counter", "defaultdict"),
    "argparse": ("Namespace",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePosixPath"),
    "builtins": ("set", "frozenset", "complex", "bytearray", "slice", "range", "dict", "list"),
    "__builtin__": ("set", "frozenset", "complex", "bytearray", "slice", "xrange", "dict", "list"),
    "_codecs": ("encode",),
    "datetime": ("datetime", "timedelta", "date"),
    "numpy": ("dtype",),
    "numpy.core.multiarray": ("scalar",),
    "numpy._core.multiarray": ("scalar",),
    "torch": ("device",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
}


class _StateDictUnpickler(pickle._Unpickler):
    """Understands tensors, containers and plain values, and passes over a few records; all else is refused by name.

    Python's own implementation: the faster one in C allocates as many memo slots as a corrupt file asks for.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__(stream, encoding="utf-8")  # pickles of Python 2 hold its strings
        self._path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if name in _RECORDS.get(module, ()):
            return _Record
        raise InputError(
            f"{self._path} is a pickle that needs {module}.{name}; quantcli reads tensors only and never runs "
            "code from a file.",
            hint="If you trust it, load it yourself and save only its state_dict(), best as safetensors.",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count, *view = pid
        if kind != "storage" or dtype not in DTYPE_BYTES or not isinstance(key, str) or any(view):
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        self.storages[key] = _Storage(key, dtype, index(count) * DTYPE_BYTES[dtype])
        return self.storages[key]


#: Start and size of every storage in the file, by key.
_Places = dict[str, tuple[int, int]]


def _read_archive(stream: IO[bytes], path: Path) -> tuple[Any, _Places]:
    """What a zip archive's pickle holds, and where its storages are."""
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        prefix = pickles[0].removesuffix("data.pkl") if pickles else ""
        if len(pickles) != 1 or f"{prefix}constants.pkl" in names:
            kind = "a TorchScript archive" if any("/code/" in name for name in names) else "a zip file"
            raise InputError(f"{path} is {kind}, not a torch state dict.", "Save the model's state_dict() instead.")
        if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
            raise InputError(f"{path} has a pickle of over {MAX_PICKLE_BYTES >> 20} MiB, too much for a state dict.")
        if f"{prefix}byteorder" in names:
            with archive.open(f"{prefix}byteorder") as member:
                _refuse_big_endian(member.read(6) == b"little", path)
        with archive.open(pickles[0]) as member:
            loaded = _StateDictUnpickler(member, path).load()
        places: _Places = {}
        for info in archive.infolist():
            folder, _, key = info.filename.rpartition("/")
            if f"{folder}/" == f"{prefix}data/" and info.compress_type == zipfile.ZIP_STORED:
                places[key] = (stored_member_offset(stream, info), info.file_size)
        return loaded, places


def _read_stream(stream: IO[bytes], path: Path) -> tuple[Any, _Places]:
    """The same of a file from before torch 1.6."""

    def load() -> Any:
        return _StateDictUnpickler(stream, path).load()

    if load() != _STREAM_MAGIC:
        raise InputError(f"{path} is a pickle, but not one that torch.save wrote.", "Save the model's state_dict().")
    load()  # the protocol's version never changed
    _refuse_big_endian(load()["little_endian"], path)
    unpickler = _StateDictUnpickler(stream, path)
    loaded = unpickler.load()
    places: _Places = {}
    for key in load():
        count = int.from_bytes(stream.read(8), "little")
        nbytes = count * DTYPE_BYTES[unpickler.storages[key].dtype]
        places[key] = (stream.tell(), nbytes)
        stream.seek(nbytes, 1)
    return loaded, places


def _refuse_big_endian(little: bool, path: Path) -> None:
    if not little:
        raise InputError(f"{path} was written on a big-endian machine, which quantcli does not read.")


def _read(path: Path) -> tuple[Any, _Places]:
    readers = {b"PK\x03\x04": _read_archive, b"\x80": _read_stream}
    with path.open("rb") as stream:
        magic = stream.read(4)
        stream.seek(0)
        read = readers.get(magic) or readers.get(magic[:1])
        if not magic:
            raise InputError(f"{path} is empty: it has 0 bytes.", "Download or copy it again.")
        if read is None:
            raise InputError(
                f"{path} is not a torch file.", "A MODEL is a folder, .safetensors, .pt, .pth, .bin or .onnx."
            )
        try:
            loaded, places = read(stream, path)
        except (InputError, OSError):
            raise
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} is a truncated or corrupt torch file: {error}.", "Copy it again.") from error
        except Exception as error:  # a hostile file can raise anything
            raise InputError(f"{path} is not a readable torch state dict: {error!r}.") from error
        size = stream.seek(0, 2)
    if any(start + nbytes > size for start, nbytes in places.values()):
        raise InputError(f"{path} is truncated: it ends before the data of its tensors.", "Copy it again.")
    return loaded, places


class TorchReader:
    """Tensors of one torch file, listed from its pickle and read from its storages.

    Raises:
        InputError: the file is not a state dict, needs code to be read, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded, self._places = _read(path)
        self._records = _named_tensors(loaded, path)
        self._file = PositionalFile(path)
        self.infos = self._describe()

    def _describe(self) -> tuple[TensorInfo, ...]:
        owners: dict[_TensorRecord, str] = {}
        infos = []
        for name, record in self._records.items():
            self._check(name, record)
            nbytes = prod(record.shape) * DTYPE_BYTES[record.dtype]
            owner = owners.setdefault(record, name)
            shares = owner if nbytes and owner != name else None
            infos.append(TensorInfo(name, record.shape, record.dtype, nbytes, self.path, shares))
        return tuple(infos)

    def _check(self, name: str, record: _TensorRecord) -> None:
        """Check that the tensor is a view inside its storage, and the storage inside the file."""
        problem = None
        storage, shape, stride = record.storage, record.shape, record.stride
        if storage.key not in self._places:
            problem = "has no data"
        elif self._places[storage.key][1] != storage.nbytes:
            problem = "has data of the wrong size"
        elif len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS or min((*shape, *stride, record.offset)) < 0:
            problem = f"has the impossible shape {shape} and strides {stride}"
        elif prod(max(1, n) for n in shape) > _MAX_ELEMENTS:
            problem = f"has the impossible shape {shape}"
        elif 0 not in shape and (record.offset + _span(shape, stride)) * DTYPE_BYTES[record.dtype] > storage.nbytes:
            problem = "lies outside its storage"
        if problem:
            raise InputError(f"{self.path}: tensor {name!r} {problem}; the file is corrupt.", "Copy it again.")

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype, shape ``[stop - start, ...]``."""
        from quantcli.core.dtypes import torch_dtype

        record = self._records[info.name]
        shape = (stop - start, *record.shape[1:]) if record.shape else ()
        width = DTYPE_BYTES[record.dtype]
        first = record.offset + (start * record.stride[0] if record.shape else 0)
        span = 0 if 0 in shape else _span(shape, record.stride)
        data = self._file.read_tensor(self._places[record.storage.key][0] + first * width, span * width)
        values = data.view(torch_dtype(record.dtype))
        return values.as_strided(shape, record.stride).contiguous() if span else values.reshape(shape)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided view, both included."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _named_tensors(loaded: Any, path: Path) -> dict[str, _TensorRecord]:
    """The state dict inside what a file holds: an entry of it, or the top level itself."""
    top = loaded if isinstance(loaded, Mapping) else {}
    # Entries first: beside a state dict there may be tensors of the training run, such as its random state.
    candidates = {key: tensors for key in _NESTED_KEYS if (tensors := _tensors_of(top.get(key)))}
    if not candidates:
        candidates = {str(key): _tensors_of(value) for key, value in top.items() if _is_state_dict(value)}
        if tensors := _tensors_of(top):
            candidates["its top level"] = tensors
    if len(candidates) > 1:
        raise InputError(
            f"{path} holds several state dicts ({', '.join(candidates)}).",
            hint="Save the one you mean to a file of its own.",
        )
    if not candidates:
        held = f" It holds {', '.join(map(repr, list(top)[:8]))}." if top else ""
        raise InputError(
            f"{path} holds no state dict (a mapping of names to tensors).{held}",
            hint="Save model.state_dict() instead.",
        )
    (tensors,) = candidates.values()
    try:
        "".join(tensors).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(f"{path} has tensors whose names are not text.") from error
    return tensors


def _is_state_dict(value: Any) -> bool:
    """Whether an entry of a name that is not well known maps names to tensors and holds nothing else."""
    return (
        isinstance(value, Mapping) and bool(value) and all(isinstance(entry, _TensorRecord) for entry in value.values())
    )


def _tensors_of(mapping: Any) -> dict[str, _TensorRecord]:
    if not isinstance(mapping, Mapping):
        return {}
    return {name: value for name, value in mapping.items() if isinstance(value, _TensorRecord)}
