"""torch state dicts (``.pt``, ``.pth``, ``.bin``) read without torch and without running a pickle.

A torch file is a zip archive: ``data.pkl`` describes tensors, ``data/N`` holds raw storages. The pickle
is walked by an unpickler that knows only what a state dict is made of; any other name in it is
refused before anything is called. Files of torch before 1.6 go through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoints.positional import PositionalFile
from quantcli.errors import InputError
from quantcli.scheme import DTYPE_BYTES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 64 << 20

_STORAGE_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip

#: Where training scripts put the state dict among other things.
_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class _TensorRecord:
    """A tensor as the pickle describes it: a strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> _TensorRecord:
    return _TensorRecord(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_parameter(data: _TensorRecord, *_: Any) -> _TensorRecord:
    return data


_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): tuple,
}


class _StateDictUnpickler(pickle.Unpickler):
    """Understands tensors, containers and plain values; everything else is refused by name."""

    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise InputError(
            f"{self._path} is a pickle that needs {module}.{name}; quantcli reads tensors only and never runs "
            "code from a file.",
            hint="If you trust it, load it yourself and save only its state_dict(), best as safetensors.",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count = pid
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        return _Storage(dtype, key, int(count))


class TorchReader:
    """Tensors of one torch file, listed from its pickle and read from its storages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(path)
        names = [name for name in self._archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(names) != 1:
            kind = "a TorchScript archive" if any("/code/" in name for name in self._archive.namelist()) else "a zip file"
            raise InputError(f"{path} is {kind}, not a torch state dict.", "Save the model's state_dict() instead.")
        self._prefix = names[0].removesuffix("data.pkl")
        self._records = _named_tensors(self._unpickle(names[0]), path)
        self._starts: dict[str, int] = {}
        self._file = PositionalFile(path)
        self.infos = self._describe()

    def _unpickle(self, member: str) -> Any:
        if self._archive.getinfo(member).file_size > MAX_PICKLE_BYTES:
            raise InputError(f"{self.path} has a pickle of over {MAX_PICKLE_BYTES >> 20} MiB, too much for a state dict.")
        try:
            with self._archive.open(member) as stream:
                return _StateDictUnpickler(stream, self.path).load()
        except InputError:
            raise
        except Exception as error:  # a hostile pickle can raise anything
            raise InputError(f"{self.path} is not a readable torch state dict: {error!r}.") from error

    def _describe(self) -> tuple[TensorInfo, ...]:
        owners: dict[_TensorRecord, str] = {}
        infos = []
        for name, record in self._records.items():
            self._locate(name, record)
            nbytes = prod(record.shape) * DTYPE_BYTES[record.storage.dtype]
            shares = owners.setdefault(record, name) if nbytes else name
            infos.append(
                TensorInfo(
                    name, record.shape, record.storage.dtype, nbytes, self.path, None if shares == name else shares
                )
            )
        return tuple(infos)

    def _locate(self, name: str, record: _TensorRecord) -> None:
        """Check that the view lies inside its storage, and note where the storage starts in the file."""
        storage = record.storage
        extent = record.offset + 1 + sum((n - 1) * s for n, s in zip(record.shape, record.stride, strict=True))
        bad = record.offset < 0 or min((*record.shape, *record.stride, 0)) < 0
        if bad or (prod(record.shape) and extent > storage.count):
            raise InputError(f"{self.path}: tensor {name!r} lies outside its storage; the file is corrupt.")
        if storage.key in self._starts:
            return
        try:
            member = self._archive.getinfo(f"{self._prefix}data/{storage.key}")
        except KeyError:
            raise InputError(f"{self.path}: the data of tensor {name!r} is missing; the file is corrupt.") from None
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored or member.file_size != storage.count * DTYPE_BYTES[storage.dtype]:
            raise InputError(f"{self.path}: the data of tensor {name!r} has the wrong size; the file is corrupt.")
        self._starts[storage.key] = self._data_start(member)

    def _data_start(self, member: zipfile.ZipInfo) -> int:
        """Where a stored member's bytes start: behind its local header (APPNOTE.TXT 4.3.7)."""
        local = self._file.read(member.header_offset, 30)
        return member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype, shape ``[stop - start, ...]``."""
        from quantcli.numerics import TORCH_DTYPES

        record = self._records[info.name]
        shape = (stop - start, *record.shape[1:]) if record.shape else ()
        dtype = TORCH_DTYPES[record.storage.dtype]
        if not prod(shape):
            import torch

            return torch.empty(shape, dtype=dtype)
        first = record.offset + (start * record.stride[0] if record.shape else 0)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, record.stride, strict=True))
        width = DTYPE_BYTES[record.storage.dtype]
        data = self._file.read_tensor(self._starts[record.storage.key] + first * width, span * width)
        return data.view(dtype).as_strided(shape, record.stride).contiguous()

    def close(self) -> None:
        """Release the file."""
        self._file.close()
        self._archive.close()


class LegacyTorchReader:
    """A file of torch before 1.6: one stream, which only torch itself can read, and only as a whole."""

    def __init__(self, path: Path) -> None:
        import torch

        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            raise InputError(
                f"{path} is not a torch state dict that can be read without running its code: {reason}",
                hint="If you trust it, load it yourself and save only its state_dict(), best as safetensors.",
            ) from error
        self._tensors = _named_tensors(loaded, path, torch.Tensor)
        from quantcli.numerics import TORCH_DTYPES

        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        owners: dict[tuple[Any, ...], str] = {}
        infos = []
        for name, tensor in self._tensors.items():
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            shares = owners.setdefault(key, name) if tensor.numel() else name
            dtype = names.get(tensor.dtype, str(tensor.dtype))
            nbytes = tensor.numel() * tensor.element_size()
            infos.append(TensorInfo(name, tuple(tensor.shape), dtype, nbytes, path, None if shares == name else shares))
        self.infos = tuple(infos)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype, shape ``[stop - start, ...]``."""
        tensor: Tensor = self._tensors[info.name]
        return tensor.detach()[start:stop].contiguous() if info.shape else tensor.detach()

    def close(self) -> None:
        """Release the tensors."""
        self._tensors = {}


def open_torch_file(path: Path) -> TorchReader | LegacyTorchReader:
    """Open a torch file of either kind. Raises InputError for anything that is not a state dict."""
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"PK\x03\x04":
        try:
            return TorchReader(path)
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} is a truncated or corrupt torch file: {error}.", "Copy it again.") from error
    if magic[:1] != b"\x80":
        raise InputError(f"{path} is not a torch file.", "A MODEL is a folder, .safetensors, .pt, .pth or .bin.")
    return LegacyTorchReader(path)


def _named_tensors(loaded: Any, path: Path, kind: type = _TensorRecord) -> dict[str, Any]:
    """The state dict inside what a file holds: the top level itself, or one well-known entry of it."""
    if isinstance(loaded, Mapping):
        tensors = {name: value for name, value in loaded.items() if isinstance(value, kind)}
        if tensors:
            return tensors
        nested = [key for key in _NESTED_KEYS if isinstance(loaded.get(key), Mapping)]
        if len(nested) > 1:
            listed = ", ".join(nested)
            raise InputError(f"{path} holds several state dicts ({listed}).", "Save the one you mean to a file of its own.")
        if nested:
            return _named_tensors(loaded[nested[0]], path, kind)
    raise InputError(f"{path} holds no state dict (a mapping of names to tensors).", "Save model.state_dict() instead.")
