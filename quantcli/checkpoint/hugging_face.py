"""What belongs to a Hugging Face folder beside its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quantcli.core.manifest import MANIFEST
from quantcli.errors import InputError
from quantcli.system.files import reading

MAX_JSON_BYTES = 256 << 20


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError where it is unreadable, too large or not an object."""
    try:
        with reading(path):
            if path.stat().st_size > MAX_JSON_BYTES:
                raise InputError(f"{path} is over {MAX_JSON_BYTES >> 20} MiB, too much for what it should be.")
            loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} is not a JSON object.")
    return loaded


_COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".bpe", ".vocab", ".py", ".yaml")
_COMPANION_NAMES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|README)", re.IGNORECASE)
#: What says which shard holds which tensor; that of a variant has its name inside, as in ``index.fp16.json``.
WEIGHT_INDEX = re.compile(r"\.index(\.\w+)?\.json$")


#: What a diffusers pipeline lists its components in, and what each of its own models is stored as.
PIPELINE_INDEX = "model_index.json"
DIFFUSERS_STEM = "diffusion_pytorch_model"


def is_diffusers(config: Mapping[str, Any] | None) -> bool:
    """Whether a config.json is that of a diffusers model."""
    return config is not None and "_class_name" in config and "_diffusers_version" in config


def weights_stem(config: Mapping[str, Any] | None) -> str:
    """What the library that loads a folder calls its file of weights, without the suffix."""
    return DIFFUSERS_STEM if is_diffusers(config) else "model"


def is_causal_config(config: Mapping[str, Any] | None) -> bool:
    """Whether a config.json names a causal language model."""
    names = map(str, (config or {}).get("architectures") or [])
    return any("CausalLM" in name or name.endswith("LMHeadModel") for name in names)


def companions(folder: Path) -> Iterator[Path]:
    """Files of a model folder that travel with its weights: configuration, tokenizer, licence, text.

    Relative paths, sorted. Subfolders are searched (sentence-transformers keeps its pooling in one),
    hidden ones and linked ones are not.
    """
    for path in _visible_files(folder):
        if WEIGHT_INDEX.search(path.name):
            continue
        if path.suffix.lower() in _COMPANION_SUFFIXES or _COMPANION_NAMES.match(path.name):
            yield path.relative_to(folder)


#: What weights are kept in, by any library.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".ggml", ".onnx", ".onnx_data",
    ".tflite", ".mlmodel", ".npz", ".data", ".pte",
)  # fmt: skip
#: A subfolder with at least this share of the model's own weights holds another copy of them, and so do files of a
#: kind that is used for other things as well: a model's voices, or its filters.
_COPY_SHARE = 0.25
_OTHER_USES = (".pt", ".pth", ".npz")
#: What a run of training goes on from.
_OF_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states)\w*\.(pt|pth|pkl)", re.IGNORECASE)
#: An adapter beside a model, which libraries add to it as they load it.
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Neighbours:
    """What lies beside a model's weights: what travels with them, and weights of other kinds that do not.

    ``part_of``: the sentence-transformers model around it, which does not travel either. ``adapted``: an adapter does.
    """

    copied: tuple[Path, ...]
    left: tuple[str, ...]
    part_of: Path | None = None
    adapted: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is left behind, by name, and what the folder is but a part of."""
        said = []
        if self.left:
            more = f" and {len(self.left) - 4} more" if len(self.left) > 4 else ""
            said.append(f"Left behind, as other weights of the same model: {', '.join(self.left[:4])}{more}.")
        if self.adapted:
            said.append(
                f"An adapter lies beside the model ({_ADAPTER}) and is copied as it is: what loads the result may add "
                "it to the quantized weights. Merge it first where it is to be quantized with them."
            )
        if self.part_of:
            said.append(
                f"This is one part of the sentence-transformers model in {self.part_of}: to use it, put it in its "
                "place in a copy of that folder."
            )
        return tuple(said)


def neighbours(folder: Path, weights: Collection[Path]) -> Neighbours:
    """Everything of a model folder but its ``weights``; relative paths, sorted.

    Files travel whatever they are, and so do the modules that sentence-transformers lists, with weights of their own.
    Left are other copies of the model's weights (of another library, a training run, an earlier conversion): weights
    beside the model's, and subfolders that hold as many. Hidden files and folders, and folders that are links, are
    not looked at.
    """
    paths = [PurePosixPath(str(module.get("path") or "")) for module in _listed_modules(folder)]
    modules = {path.parts[0] for path in paths if path.parts}
    own = sum(file.stat().st_size for file in weights)
    files = [path for path in _visible_files(folder) if path not in weights]
    adapted = (folder / _ADAPTER).is_file()
    copies = _kinds_of_copies([path for path in files if path.parent == folder], _COPY_SHARE * own)
    in_folder: dict[str, list[Path]] = {}
    copied, left = [], []
    for path in files:
        top = path.relative_to(folder).parts[0]
        if path.parent == folder and WEIGHT_INDEX.search(path.name):
            continue
        if path.parent != folder and top not in modules:
            in_folder.setdefault(top, []).append(path)
        elif path.parent == folder and (
            _OF_TRAINING.fullmatch(path.name)
            or (path.suffix.lower() in copies and not (adapted and path.stem == "adapter_model"))
        ):
            left.append(path.name)
        else:
            copied.append(path)
    for top, members in in_folder.items():
        held = [path for path in members if path.suffix.lower() in _WEIGHT_SUFFIXES]
        is_copy = sum(path.stat().st_size for path in held) >= max(1, _COPY_SHARE * own)
        if is_copy or (folder / top / MANIFEST).is_file():
            left.append(f"{top}/")
        else:
            copied += members
    around = sentence_model(folder)
    part_of = around if around != folder else None
    return Neighbours(tuple(sorted(path.relative_to(folder) for path in copied)), tuple(left), part_of, adapted)


def _kinds_of_copies(files: Collection[Path], size: float) -> set[str]:
    """Suffixes of copies of a model's weights; of those that have other uses, where files are together of a size."""
    sizes = {suffix: sum(p.stat().st_size for p in files if p.suffix.lower() == suffix) for suffix in _OTHER_USES}
    return {suffix for suffix in _WEIGHT_SUFFIXES if sizes.get(suffix, size) >= size}


def sentence_model(folder: Path) -> Path | None:
    """The sentence-transformers model that a folder is, or is listed in as a part; None where it is neither."""
    if _listed_modules(folder):
        return folder
    around = folder.parent if folder.name else folder.absolute().parent
    try:
        listed = _listed_modules(around)
    except InputError:
        # What lies around a model need not belong to it.
        return None
    return around if any(module.get("path") == folder.absolute().name for module in listed) else None


def pooling_file(folder: Path) -> Path | None:
    """What says how the token vectors of a folder's model are pooled, as sentence-transformers has it."""
    around = sentence_model(folder) or folder
    listed = (module for module in _listed_modules(around) if str(module.get("type")).endswith("Pooling"))
    places = [around / str(module.get("path")) for module in listed] or [around / "1_Pooling"]
    return next((place / "config.json" for place in places if (place / "config.json").is_file()), None)


def _listed_modules(folder: Path) -> list[Mapping[str, Any]]:
    """The parts of a sentence-transformers model, as its modules.json lists them."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        with reading(path):
            listed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    return [module for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []


def _visible_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        linked = any((folder / parent).is_symlink() for parent in relative.parents if parent.parts)
        if not hidden and not linked and path.is_file():
            yield path
