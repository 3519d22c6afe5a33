"""A model's weights as one list of tensors, whichever files hold them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Protocol

from quantcli.checkpoint.config_file import read_config
from quantcli.checkpoint.hugging_face import DIFFUSERS_STEM, PIPELINE_INDEX, WEIGHT_INDEX, load_json
from quantcli.checkpoint.safetensors import SafetensorsReader, read_header
from quantcli.core.manifest import MANIFEST, MANIFEST_KEY, Manifest
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError
from quantcli.system.files import Unchanged, reading
from quantcli.system.text import listed

if TYPE_CHECKING:
    from torch import Tensor

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
MAX_OPEN_FILES = 64

#: What a folder's weights are looked for as, in the order in which transformers does.
_FOLDER_ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    f"{DIFFUSERS_STEM}.safetensors",
    f"{DIFFUSERS_STEM}.safetensors.index.json",
    f"{DIFFUSERS_STEM}.bin",
    f"{DIFFUSERS_STEM}.bin.index.json",
)

_OTHER_FORMATS = {
    ".h5": "a Keras or TensorFlow file",
    ".msgpack": "a Flax file",
    ".tflite": "a TFLite file",
    ".jit": "a TorchScript archive",
    ".ort": "a file in onnxruntime's own format",
}

_KINDS = "A MODEL is a folder, .safetensors, .pt, .pth, .bin, .ckpt, .gguf, .onnx, .pt2 or package.module:function."
_LFS_POINTER = b"version https://git-lfs"


class Reader(Protocol):
    """What a single file offers."""

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows of one tensor."""

    def close(self) -> None:
        """Release the file."""


class Checkpoint:
    """Tensors of a model: listed from headers, read by rows.

    ``path`` is what the user gave; ``folder`` the Hugging Face folder around the weights, or None for
    a bare file; ``config`` its config.json, or None.
    """

    def __init__(
        self,
        path: Path,
        infos: tuple[TensorInfo, ...],
        *,
        folder: Path | None = None,
        metadata: Mapping[str, str] | None = None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.folder = folder
        self.metadata = dict(metadata or {})
        self.config = read_config(folder / "config.json") if folder and (folder / "config.json").is_file() else None
        self.warnings = warnings
        self._infos = infos
        self._opened = Unchanged({info.file for info in infos})
        self._lock = threading.Lock()
        self._readers: OrderedDict[Path, Reader] = OrderedDict()

    def infos(self) -> tuple[TensorInfo, ...]:
        """Every tensor, in file order."""
        return self._infos

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights, sorted."""
        return tuple(sorted({info.file for info in self._infos}))

    @property
    def size_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def manifest(self) -> Manifest:
        """What quantcli recorded of how it made this artifact. Raises InputError where that is damaged."""
        if self.folder and (self.folder / MANIFEST).is_file():
            return Manifest.of(load_json(self.folder / MANIFEST), self.path)
        return Manifest.parse(self.metadata.get(MANIFEST_KEY), self.path)

    def load(self, name: str) -> Tensor:
        """One whole tensor in its own dtype. Raises KeyError for an unknown name."""
        info = next((info for info in self._infos if info.name == name), None)
        if info is None:
            raise KeyError(name)
        return self.read_rows(info, 0, info.rows)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype; safe from several threads."""
        with self._lock:
            reader = self._readers.pop(info.file, None) or _open_reader(info.file)
            self._readers[info.file] = reader
            # The one used longest ago is dropped; it closes its file once no thread uses it any more.
            if len(self._readers) > MAX_OPEN_FILES:
                self._readers.popitem(last=False)
        return reader.read_rows(info, start, stop)

    def require_unchanged(self) -> None:
        """Raise InputError where a file of weights was written or replaced since its header was read."""
        self._opened.require()

    def sha256(self) -> str:
        """Hash of the weight files: of the one file, or of ``sha256sum``'s lines over several."""
        digests = {}
        for file in self.files:
            inside = self.folder is not None and file.is_relative_to(self.folder)
            name = file.relative_to(self.folder).as_posix() if inside and self.folder else file.name
            with reading(file), file.open("rb", buffering=0) as stream:
                digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        if len(digests) == 1:
            return next(iter(digests.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


class CheckpointView(Checkpoint):
    """A checkpoint seen with other tensors; ``original`` is what holds the files."""

    def __init__(self, original: Checkpoint, infos: Iterable[TensorInfo]) -> None:
        """Have these tensors in place of the original's, and all else as it has it."""
        self.original = original
        super().__init__(
            original.path, tuple(infos), folder=original.folder, metadata=original.metadata, warnings=original.warnings
        )
        self.config = original.config

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights, sorted."""
        return self.original.files

    def require_unchanged(self) -> None:
        """Raise InputError where a file of weights was written or replaced since its header was read."""
        self.original.require_unchanged()


def _open_reader(file: Path) -> Reader:
    if file.suffix.lower() not in TORCH_SUFFIXES:
        return SafetensorsReader(file)
    from quantcli.checkpoint.torch_pickle import TorchReader

    return TorchReader(file)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open any MODEL that is a checkpoint; reads headers only.

    Raises:
        InputError: the path is missing, is not a model, or its files are corrupt or incomplete.
    """
    try:
        return _open(path)
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        raise InputError(f"{path} does not exist.", _KINDS)
    if path.is_dir():
        return _open_folder(path)
    if WEIGHT_INDEX.search(path.name):
        return _open_index(path)
    return _open_file(path, None)


def _open_folder(folder: Path) -> Checkpoint:
    from quantcli.checkpoint.gguf.checkpoint import open_gguf, standing_for

    if (made_for := standing_for(folder)) is not None:
        return made_for
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is an adapter (it has an adapter_config.json): a change to another model, and no model.",
            "Merge it into its base model first: peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
            ".merge_and_unload().save_pretrained(MERGED), then convert MERGED.",
        )
    for name in _FOLDER_ENTRIES:
        entry = folder / name
        if entry.is_file():
            return _open_index(entry) if name.endswith(".json") else _open_file(entry, folder)
    indices = sorted(path for path in folder.glob("*.json") if WEIGHT_INDEX.search(path.name))
    if len(indices) == 1:
        return _open_index(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return _open_file(files[0], folder)
    if len(files) > 1:
        raise InputError(
            f"{folder} holds {len(files)} safetensors files and no index that joins them.",
            hint="Add model.safetensors.index.json, or name one file.",
        )
    if len(files := sorted(folder.glob("*.gguf"))) == 1:
        return open_gguf(files[0])
    if files:
        raise InputError(f"{folder} holds {len(files)} GGUF files.", f"Name one of them, such as {files[0]}.")
    if (folder / PIPELINE_INDEX).is_file():
        raise InputError(
            f"{folder} is a diffusers pipeline, whose models lie in folders of their own.",
            f"Name one of them, such as {folder / 'transformer'} or {folder / 'unet'}; convert takes the whole, too.",
        )
    if (folder / "config.json").is_file():
        graphs = sorted([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])
        raise InputError(
            f"{folder} has a config.json but no weights (model.safetensors or pytorch_model.bin).",
            f"Of the ONNX graphs in it, name one: {', '.join(map(str, graphs[:4]))}." if graphs else None,
        )
    inner = sorted(config.parent for config in folder.glob("*/config.json") if _holds_weights(config.parent))
    raise InputError(
        f"{folder} is not a model: it holds no safetensors or pytorch_model.bin file.",
        f"Models lie in folders inside it: name one, such as {inner[0]}." if inner else None,
    )


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FOLDER_ENTRIES)


def _open_file(path: Path, folder: Path | None) -> Checkpoint:
    if not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder.")
    with path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(f"{path} is a Git LFS pointer, not the file itself.", "Fetch it with: git lfs pull")
    suffix = path.suffix.lower()
    shown = path if folder is None else folder
    if suffix == ".safetensors":
        header = read_header(path)
        _refuse_empty(header.infos, path)
        return Checkpoint(shown, header.infos, folder=folder, metadata=header.metadata)
    if suffix in TORCH_SUFFIXES:
        from quantcli.checkpoint.torch_pickle import TorchReader

        return Checkpoint(shown, TorchReader(path).infos, folder=folder)
    if suffix == ".gguf":
        from quantcli.checkpoint.gguf.checkpoint import open_gguf

        return open_gguf(path)
    what = _OTHER_FORMATS.get(suffix, "not a kind of model that quantcli knows")
    raise InputError(f"{path} is {what}.", _KINDS)


def _open_index(index: Path) -> Checkpoint:
    """A sharded model: the index says which file holds which tensor; both sides are checked.

    Tensors that the index says nothing of are taken from its shards, as transformers takes them.
    """
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensor names to file names.")
    folder = index.parent
    infos: list[TensorInfo] = []
    metadata: dict[str, str] = {}
    unlisted: dict[str, TensorInfo] = {}
    elsewhere: list[str] = []
    for shard in sorted(set(weight_map.values())):
        path = _inside(folder, shard, index)
        if not path.is_file():
            raise InputError(f"{index} names the shard {shard}, which is not there.", "Download or copy it again.")
        part = _open_file(path, None)
        metadata |= part.metadata
        own = {name for name, file in weight_map.items() if file == shard}
        missing = sorted(own - {info.name for info in part.infos()})
        if missing:
            raise InputError(f"{index} says that {missing[0]!r} is in {shard}, which does not hold it.")
        for info in part.infos():
            if info.name in own:
                infos.append(info if info.shares in own else replace(info, shares=None))
            elif info.name in weight_map:
                elsewhere.append(f"{info.name} ({shard})")
            else:
                unlisted[info.name] = replace(info, shares=None)
    infos += unlisted.values()
    _refuse_empty(tuple(infos), index)
    taken = [f"{info.name} ({info.file.name})" for info in unlisted.values()]
    said = {
        "Shards hold tensors that the index does not list; taken all the same": taken,
        "Shards hold tensors that the index lists for others; ignored": elsewhere,
    }
    warnings = tuple(f"{what}: {listed(names)}." for what, names in said.items() if names)
    return Checkpoint(folder, tuple(infos), folder=folder, metadata=metadata, warnings=warnings)


def _refuse_empty(infos: tuple[TensorInfo, ...], path: Path) -> None:
    if not infos:
        raise InputError(f"{path} holds no tensor.")


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A shard's path; a name that leads out of the folder is refused."""
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        if flavour.anchor or ".." in flavour.parts:
            raise InputError(f"{index} names the shard {name!r}, which lies outside its folder.")
    return folder / name
