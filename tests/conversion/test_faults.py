"""Kills at every step, disks that fail, and models that change: nothing is lost, and nothing half-made stands."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.faults import Counted, Kills, before_changes, failing_reads, files_of_at_most, full_disk, power_cuts
from support.onnx_models import save_products
from support.stages import STAGES, saving_often, write_inputs

from quantcli import convert
from quantcli.calibration.statistics import CalibrationStats
from quantcli.conversion.checkpoint.calibrated import CalibratedWork
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


# Every kind of command. All moments and steps of all of them were tried once; here are some of each.

#: Moments and steps that are tried of each stage.
SOME = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data of all stages."""
    return write_inputs(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training saves a checkpoint in every step."""
    saving_often(monkeypatch)


#: Those that take longer go into the slow tests.
QUICK = ("checkpoint", "graph in a folder", "gguf", "qat of a graph")
ALL = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STAGES]


#: Those that choose codes from data block by block, or train.
TAKE_LONG = ("gptq", "awq", "tune", "qat", "qat of a graph")


def clear(place: Path) -> None:
    for left in place.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def spread(count: int) -> list[int]:
    """Some of so many steps: the first, the last, and between."""
    return sorted({count * number // SOME for number in range(SOME)} | {count - 1})


@pytest.mark.usefixtures("frequent_checkpoints")
@pytest.mark.parametrize("name", ALL)
def test_a_kill_in_any_stage_loses_nothing(files: Path, tmp_path: Path, place: Path, name: str) -> None:
    assert survives_kills(place, tmp_path, lambda: STAGES[name].run(files, place), most=SOME) >= SOME


@pytest.mark.usefixtures("frequent_checkpoints")
@pytest.mark.parametrize("name", ALL)
def test_a_disk_that_is_full_leaves_nothing_but_what_took_long(files: Path, place: Path, name: str) -> None:
    stage, kept = STAGES[name], 0

    def fails(fault: AbstractContextManager[object], where: str) -> None:
        nonlocal kept
        with fault, pytest.raises(InputError, match="The disk is full") as caught:
            stage.run(files, place)
        left = held(place)
        assert bool(left) == ("the same command continues" in str(caught.value)), where
        if left:
            kept += 1
            assert not visible(left), where
            stage.run(files, place)
            assert held(place) == wanted, where
            clear(place)

    with full_disk(place) as counted:
        stage.run(files, place)
    wanted = held(place)
    (place / stage.output).rename(place.parent / "wanted")
    for step in spread(counted.steps):
        fails(full_disk(place, step), f"step {step} of {counted.steps}")
    # In the middle of a write, also of libraries that do not write by Python.
    for size in (0, 100, max(map(len, wanted.values())) // 2):
        fails(files_of_at_most(size), f"{size} bytes")
    assert bool(kept) == (name in TAKE_LONG)


@pytest.mark.slow
def test_another_try_on_a_disk_that_is_still_full_loses_nothing(
    files: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = STAGES["gptq"]
    with full_disk(place) as counted:
        stage.run(files, place)
    wanted = held(place)
    clear(place)
    with full_disk(place, counted.steps - 1), pytest.raises(InputError, match="the same command continues"):
        stage.run(files, place)
    written = {name: content for name, content in held(place).items() if "/out/" in name}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=-1))
        with pytest.raises(InputError, match=r"are free\. .*the same command continues"):
            stage.run(files, place)
    assert written and written.items() <= held(place).items()
    stage.run(files, place)
    assert held(place) == wanted


@pytest.mark.usefixtures("frequent_checkpoints")
@pytest.mark.parametrize("name", QUICK)
def test_an_interruption_in_any_stage_is_continued(files: Path, place: Path, name: str) -> None:
    stage, counted = STAGES[name], Counted()
    with before_changes(place, counted):
        stage.run(files, place)
    wanted = held(place)
    for step in spread(counted.steps):
        clear(place)
        with before_changes(place, Counted(step)), pytest.raises(KeyboardInterrupt):
            stage.run(files, place)
        assert visible(held(place)) in ({}, visible(wanted))
        stage.run(files, place)
        assert held(place) == wanted, f"step {step} of {counted.steps}"


@pytest.mark.parametrize("name", ["checkpoint", "static graph", "gguf", "statistics"])
def test_a_disk_that_cannot_be_read_is_told_of_by_the_file_on_it(files: Path, place: Path, name: str) -> None:
    stage = STAGES[name]
    for file in stage.inputs(files):
        with failing_reads(file) as counted:
            stage.run(files, place)
        (place / stage.output).rename(place.parent / f"wanted {file.name}")
        for step in spread(counted.steps):
            with failing_reads(file, step), pytest.raises(InputError, match="cannot be read: Input/output") as caught:
                stage.run(files, place)
            assert caught.value.message.startswith(f"{file} "), f"step {step} of {counted.steps}"
            assert not held(place)


def test_what_cannot_be_continued_leaves_nothing_after_an_interruption(files: Path, place: Path) -> None:
    with before_changes(place, Counted(6)), pytest.raises(KeyboardInterrupt):
        STAGES["static graph"].run(files, place)
    assert not list(place.iterdir())


CHANGES: dict[str, tuple[str, Any, str]] = {
    "graph, read to be calibrated": ("statistics", (CalibrationStats, "find_ranges"), "cnn.onnx"),
    "data, read to be calibrated": ("statistics", (CalibrationStats, "find_ranges"), "pictures.npz"),
    "data of a graph": ("static graph", (onnx_pipeline, "read_back"), "pictures.npz"),
    "data of a checkpoint": ("gptq", (CalibratedWork, "_run_blocks"), "tokens.npz"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_inputs_of_any_kind_that_change_while_they_are_read(
    files: Path, place: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, stage, changed = CHANGES[case]
    original = getattr(*stage)

    def touched(*arguments: Any) -> Any:
        os.utime(files / changed)
        return original(*arguments)

    monkeypatch.setattr(*stage, touched)
    with pytest.raises(InputError, match=f"{changed} was changed while it was read"):
        STAGES[name].run(files, place)
    assert not list(place.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are known by /proc")
@pytest.mark.parametrize("name", ["checkpoint", "gguf", "graph", "graph in a folder", "statistics"])
def test_a_power_cut_finds_an_output_whole_or_absent(files: Path, place: Path, name: str) -> None:
    """What gets its name is on the disk by then, and the name before the command ends; also in place of another."""
    stage = STAGES[name]
    for _ in range(2):
        with power_cuts() as seen:
            stage.run(files, place)
        arrivals = [number for number, (what, path, _) in enumerate(seen) if what == "renamed" and path.parent == place]
        assert arrivals
        for number in arrivals:
            sizes = seen[number][2]
            assert sizes and -1 not in sizes.values(), seen[number]
        assert ("forced", place, None) in seen[arrivals[-1] :]


def test_a_disk_that_fails_while_the_artifact_is_read_again_is_told_of(
    files: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of a failure once: of what was told in the background nothing would be heard later."""
    failures = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def fsync(descriptor: int) -> None:
        for failure in failures:
            raise failure

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match="Input/output error"):
        STAGES["checkpoint"].run(files, place)
    assert not visible(held(place))
