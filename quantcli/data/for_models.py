"""Samples for several models at once, and what these take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantcli.core.ports import Port, without_cache
from quantcli.data.request import DataRequest
from quantcli.data.samples import open_source
from quantcli.data.sources import is_text
from quantcli.data.sources.base import SampleSource
from quantcli.errors import InputError
from quantcli.models import hugging_face
from quantcli.models.inputs import hugging_face_ports
from quantcli.models.source import ModelSource

#: What a folder with a tokenizer is known by.
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def source_for(models: Sequence[ModelSource], request: DataRequest, ports: Sequence[Port]) -> SampleSource:
    """A source of samples for several models at once: tokenizer and preprocessing are the first ones they have.

    Raises:
        UsageError: a wish that does not go with this data.
        InputError: the data is missing or does not fit the models' inputs.
    """
    tokenizer = request.tokenizer or _folder_with(models, *_TOKENIZER_FILES)
    if is_text(request.data):
        _require_tokens(models[0].path, request.data, ports, tokenizer)
    folder = _folder_with(models, "preprocessor_config.json", "config.json")
    return open_source(request, ports, folder=folder, tokenizer=tokenizer)


def _require_tokens(model: str, data: str, ports: Sequence[Port], tokenizer: Path | None) -> None:
    """Raise InputError where a model reads no tokens, or text cannot be turned into any."""
    if not any(port.name == "input_ids" for port in ports):
        raise InputError(
            f"{data} is text, and {model} takes no input_ids, but {'; '.join(map(str, ports))}.",
            "Give arrays or images.",
        )
    if tokenizer is None or not any((tokenizer / name).is_file() for name in (*_TOKENIZER_FILES, "config.json")):
        raise InputError(
            f"{data} is text, and there is no tokenizer in {tokenizer or 'any folder of the models'}.",
            "Name one with --tokenizer FOLDER.",
        )


def input_ports(models: Sequence[ModelSource], *, text: bool) -> tuple[Port, ...]:
    """What the models take, the reference's inputs first.

    Token inputs that only a candidate takes join in; what the signature of a function's module does not tell,
    the inputs of an ONNX candidate do.
    """
    first, *others = models
    known = {port.name: port for other in others if other.onnx for port in without_cache(other.onnx.inputs)}
    if first.onnx:
        ports = without_cache(first.onnx.inputs)
    elif first.checkpoint:
        ports = hugging_face_ports(hugging_face.require_folder(first.folder or Path(first.path)), text=text)
    else:
        found = first.runner().inputs
        ports = tuple(known.get(port.name, port) for port in found) if first.kind == "function" else found
    taken = {port.name for port in ports}
    return (*ports, *(port for port in known.values() if text and port.name not in taken))


def _folder_with(models: Sequence[ModelSource], *names: str) -> Path | None:
    """The first model's folder that holds one of the files, else the first folder."""
    folders = [model.folder for model in models if model.folder]
    having = (folder for name in names for folder in folders if (folder / name).is_file())
    return next(having, folders[0] if folders else None)
