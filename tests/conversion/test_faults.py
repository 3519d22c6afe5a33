"""Kills at every step, disks that fail, and models that change: nothing is lost, and nothing half-made stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.faults import Kills

from quantcli import convert

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
