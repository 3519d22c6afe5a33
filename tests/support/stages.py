"""A command of every kind that writes something, on small models: what faults are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import quantcli
from quantcli.planning.recipe import validate
from quantcli.training import resume
from support.decoders import tiny_decoder
from support.golden import build
from support.onnx_models import save_products
from support.tiny_decoders import save_decoder


@dataclass(frozen=True)
class Stage:
    """One command. ``model`` and ``data`` are among what `inputs` writes; ``output`` is the name of what it writes."""

    output: str
    model: str
    data: str | None = None
    wishes: Any = None
    command: Callable[..., object] = quantcli.convert

    def run(self, files: Path, place: Path) -> object:
        """Carry it out: ``files`` are the inputs, ``place`` is where the output goes."""
        data = {} if self.data is None else {"data": str(files / self.data)}
        given = data | {"output": place / self.output, "force": True} | dict(self.wishes or {})
        return self.command(str(files / self.model), **given)

    def inputs(self, files: Path) -> list[Path]:
        """The files that it reads: of its model, then its data."""
        model = files / self.model
        found = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
        return found + ([] if self.data is None else [files / self.data])


INT4: dict[str, Any] = {"scheme": "int4", "group_size": 32, "threads": 1}
FEW = {"samples": 4}
TUNE = {"tune": {"epochs": 1, "batch_size": 2}}
QAT = {"qat": {"steps": 3, "batch_size": 2, "held_out": 0.25, "evaluate_every": 2}}
GROUPS = {"group_size": 32}


def steps(scheme: str, *chain: dict[str, Any] | str) -> dict[str, Any]:
    return {"recipe": validate({"scheme": scheme, "steps": list(chain)}, "recipe"), "threads": 1}


STAGES = {
    "checkpoint": Stage("out", "llama-untyped", None, INT4),
    "gptq": Stage("out", "llama", "tokens.npz", INT4 | FEW | {"algorithm": "gptq"}),
    "awq": Stage("out", "llama", "tokens.npz", INT4 | FEW | {"algorithm": "awq"}),
    "tune": Stage("out", "llama", "tokens.npz", steps("int4", "gptq", TUNE) | GROUPS | FEW),
    "qat": Stage("out", "llama", "tokens.npz", steps("int4", "gptq", QAT) | GROUPS | FEW),
    "gguf": Stage("out.gguf", "spoken", None, {"scheme": "int4", "format": "gguf", "threads": 1}),
    "decoder": Stage("out", "decoder", None, {"scheme": "int4", "format": "onnx", "threads": 1}),
    "graph": Stage("out.onnx", "products.onnx", None, {"scheme": "int4", "threads": 1}),
    "graph in a folder": Stage("out", "products.onnx", None, {"scheme": "int4", "threads": 1}),
    "static graph": Stage("out.onnx", "cnn.onnx", "pictures.npz", {"scheme": "int8-static", "threads": 1}),
    "gptq of a graph": Stage(
        "out.onnx", "cnn.onnx", "pictures.npz", {"scheme": "int8-static", "algorithm": "gptq", "threads": 1}
    ),
    "qat of a graph": Stage("out.onnx", "cnn.onnx", "pictures.npz", steps("int8", QAT)),
    "statistics": Stage("stats.safetensors", "cnn.onnx", "pictures.npz", None, quantcli.calibrate),
}  # fmt: skip


def write_inputs(folder: Path) -> Path:
    """Write the models and the data of all stages."""
    build(folder)
    tiny_decoder("llama", folder / "decoder")
    save_decoder("llama", folder / "spoken")
    save_products(folder / "products.onnx", layers=3, width=64)
    return folder


def saving_often(patch: pytest.MonkeyPatch) -> None:
    """Have training save a checkpoint in every step."""
    patch.setattr(resume, "CHECKPOINT_SECONDS", -1.0)
    patch.setattr(resume, "_WRITING_TIMES", 0)
