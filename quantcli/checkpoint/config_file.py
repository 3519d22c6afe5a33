"""A model folder's config.json: what is read of it here has the type that it should have, the rest is kept as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quantcli.checkpoint.hugging_face import load_json
from quantcli.errors import InputError

#: What config.json tells of codes, now and formerly.
_SECTIONS = ("quantization_config", "compression_config")


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Arguments(_Part):
    """How numbers are stored, in the words of compressed-tensors."""

    num_bits: int | None = None
    strategy: str | None = None


class _Group(_Part):
    targets: list[str] | None = None
    weights: _Arguments | None = None
    input_activations: _Arguments | None = None


class _Quantization(_Part):
    quant_method: str | None = None
    config_groups: dict[str, _Group] | None = None
    dynamic: dict[str, Any] | None = None
    weight_block_size: list[int] | None = None
    modules_to_not_convert: list[str] | None = None


class _Config(_Part):
    architectures: list[str] | None = None
    model_type: str | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: _Quantization | None = None
    compression_config: _Quantization | None = None
    text_config: dict[str, Any] | None = None


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a config.json. Raises InputError where it is damaged, or holds what it cannot mean."""
    config = load_json(path)
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where[:200]}: {first['msg'].rstrip('.')}.", "Download or copy it again.") from error
    return config


def config_of(model: Path) -> dict[str, Any] | None:
    """The config.json of a model, None where that is no folder with one. Raises InputError where it is damaged."""
    file = model / "config.json"
    return read_config(file) if file.is_file() else None


def section_of(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The ``quantization_config`` of a config.json, or of the language model within it; empty where there is none."""
    outer = config or {}
    parts = (outer, *(part for part in outer.values() if isinstance(part, Mapping)))
    found = (part.get(key) for part in parts for key in _SECTIONS)
    return next((section for section in found if section and isinstance(section, Mapping)), {})


def without_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that tells of no codes, as one of plain weights does."""

    def plain(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key not in _SECTIONS}

    return {key: plain(value) if isinstance(value, dict) else value for key, value in plain(config).items()}
