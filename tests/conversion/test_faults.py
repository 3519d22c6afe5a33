"""Kills at every step, disks that fail, and models that change: nothing is lost, and nothing half-made stands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.faults import Kills
from support.onnx_models import save_products

from quantcli import convert
from quantcli.conversion.checkpoint.pipeline import Conversion
from quantcli.conversion.onnx import pipeline as onnx_pipeline
from quantcli.conversion.staging import open_staging, partial_folder
from quantcli.errors import InputError

pytestmark = pytest.mark.usefixtures("no_runtime_check")

Run = Callable[[], object]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where outputs go; whatever lies in it after a kill and another run is an output."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def held(place: Path) -> dict[str, bytes]:
    """Every visible file, by its path."""
    files = (path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}


def visible(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if not name.startswith(".")}


def survives_kills(place: Path, tmp_path: Path, run: Run, *, most: int | None = None) -> int:
    """Run once, then again from what a kill before each step would have left; returns the number of kills.

    ``most``: so many of the steps alone, spread evenly.
    """
    before = held(place)
    kills = Kills(place, tmp_path / "kills")
    with kills.watching():
        run()
    wanted = held(place)
    assert wanted and all(not name.startswith(".") for name in wanted)
    chosen = kills.moments if most is None else kills.moments[:: max(1, len(kills.moments) // most)]
    for moment in chosen:
        left = held(moment)
        assert visible(left) in (before, {}, wanted), f"{moment.name}: half-made, {sorted(visible(left))}"
        kills.restore(moment)
        run()
        assert held(place) == wanted, f"after a kill at step {moment.name} of {len(kills.moments)}"
    return len(chosen)


def small(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(64, 128, generator=generator) for i in range(2)}
    save_file(weights | {"norm.weight": torch.ones(128)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "in place of another"])
def test_a_kill_at_every_step_of_a_conversion(tmp_path: Path, place: Path, name: str, old: bool) -> None:
    model = small(tmp_path / "model")
    source = model if name == "out" else model / "model.safetensors"
    options: dict[str, Any] = {"scheme": "int4", "threads": 1, "force": True}
    if old:
        convert(source, place / name, **options | {"scheme": "int8"})
    assert survives_kills(place, tmp_path, lambda: convert(source, place / name, **options)) > 15


def test_an_output_that_a_kill_left_aside_stands_again(place: Path) -> None:
    """Between two renames the old output has no name; whoever comes next gives it back, and then may fail."""
    target = place / "out"
    aside = partial_folder(target) / "replaced"
    aside.mkdir(parents=True)
    (aside / "old").touch()
    with pytest.raises(InputError, match="something else"), open_staging(target):
        raise InputError("something else")
    assert [path.name for path in target.iterdir()] == ["old"]


@pytest.mark.parametrize("kind", ["checkpoint", "graph"])
def test_a_model_that_changes_while_it_is_read(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "checkpoint":
        source, file = (folder := small(tmp_path / "model")), folder / "model.safetensors"
        output, stage = place / "out", (Conversion, "_stream")
    else:
        source = file = save_products(tmp_path / "m.onnx", layers=1, width=64)
        output, stage = place / "out.onnx", (onnx_pipeline, "read_back")
    original = getattr(*stage)

    def touched(*arguments: Any) -> Any:
        os.utime(file)
        return original(*arguments)

    monkeypatch.setattr(*stage, touched)
    with pytest.raises(InputError, match=f"{file.name} was changed while it was read"):
        convert(source, output, scheme="int8")
    assert not list(place.iterdir())
