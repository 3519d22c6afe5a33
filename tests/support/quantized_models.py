"""Quantized artifacts of every kind that quantcli reads, and copies of them with something changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from quantcli import convert
from quantcli.conversion.checkpoint.proof import Skipped
from quantcli.planning.recipe import validate
from support.artifacts import config_of, tensors_of


def groups(dtype: str, size: int, *, symmetric: bool = True) -> dict[str, Any]:
    """A recipe's scheme: integers in groups."""
    return {"weights": {"dtype": dtype, "granularity": "group", "group_size": size, "symmetric": symmetric}}


#: Recipes by name.
KINDS: dict[str, dict[str, Any]] = {
    "int4": {"scheme": groups("int4", 32)},
    "int4 asymmetric": {"scheme": groups("int4", 32, symmetric=False)},
    "int8": {"scheme": "int8"},
    "int8 asymmetric": {"scheme": groups("int8", 64, symmetric=False)},
    "int8 per tensor": {"scheme": {"weights": {"dtype": "int8"}}},
    "int8-dynamic": {"scheme": "int8-dynamic"},
    "gptq": {"scheme": groups("int4", 32), "format": "gptq"},
    "gptq asymmetric": {"scheme": groups("int4", 32, symmetric=False), "format": "gptq"},
    "gptq int8": {"scheme": "int8", "format": "gptq"},
    "awq": {"scheme": groups("int4", 32), "format": "awq"},
    "awq asymmetric": {"scheme": groups("int4", 32, symmetric=False), "format": "awq"},
    "nf4": {"scheme": "nf4"},
    "nf4-double": {"scheme": "nf4-double"},
}


class Artifacts:
    """Makes each artifact when it is first asked for. They are to be left as they are."""

    def __init__(self, models: Path, place: Path) -> None:
        self._models, self._place = models, place
        self._made: dict[str, Path] = {}

    def __call__(self, kind: str, model: str = "llama", **more: Any) -> Path:
        """The artifact of a kind, its recipe extended by ``more``."""
        key = f"{kind} {model} {more}"
        if key not in self._made:
            place = self._place / str(len(self._made))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    "quantcli.conversion.checkpoint.transformers_check._reason_to_skip",
                    lambda *_: Skipped("left out by a test"),
                )
                convert(self._models / model, place, recipe=validate(KINDS[kind] | more, "recipe"))
            self._made[key] = place
        return self._made[key]


def changed(
    source: Path,
    place: Path,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """A copy of an artifact, its tensors or its ``quantization_config`` changed in place by a function."""
    held, described = tensors_of(source), config_of(source)
    if tensors:
        tensors(held)
    if config:
        config(described["quantization_config"])
    place.mkdir()
    save_file({name: part.contiguous() for name, part in held.items()}, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(described))
    return place
