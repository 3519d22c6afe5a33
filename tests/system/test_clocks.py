"""Clocks that jump, and folders that may only be read: neither is any business of a conversion."""

from __future__ import annotations

import ast
import errno
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.faults import watching
from support.stages import STAGES

import quantcli
from quantcli.search.clock import Clock

PACKAGE = Path(quantcli.__file__).parent
#: What tells the time of day, which people and networks set.
_WALL_CLOCKS = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
pytestmark = pytest.mark.usefixtures("no_runtime_check")


def held(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def jumping() -> Iterator[float]:
    """Years forwards, and back behind the epoch."""
    yield from itertools.cycle([4e9, 0.0, 1e9, -1e9])


def test_nothing_asks_for_the_time_of_day() -> None:
    """Budgets, waits and measurements go by clocks that nobody sets."""
    asked = [
        f"{file.relative_to(PACKAGE)}:{call.lineno}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in _WALL_CLOCKS
        and ast.unparse(call.func.value) in ("time", "datetime", "datetime.datetime", "date", "datetime.date")
    ]
    assert not asked


def test_the_time_that_a_search_may_take_does_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    times = jumping()
    monkeypatch.setattr(time, "time", lambda: next(times))
    clock = Clock(60.0)
    assert all(0 <= clock.seconds < 60 and not clock.is_over() for _ in range(4))


@contextmanager
def only_read(folder: Path) -> Iterator[None]:
    """Meanwhile nothing may change in a folder, as on a disk that is mounted to be read."""

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event != "open" or bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        for place in arguments[: 2 if event == "os.rename" else 1]:
            if writes and isinstance(place, str | os.PathLike) and Path(place).absolute().is_relative_to(folder):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))

    def state() -> dict[Path, int]:
        # The time of a folder tells of what was made in it and removed, also by libraries that Python does not see.
        return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}

    before = state()
    with watching(see):
        yield
    assert state() == before


@pytest.mark.parametrize("name", ["checkpoint", "decoder", "static graph", "statistics"])
def test_inputs_of_the_future_that_may_only_be_read(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tmp_path / "usual", tmp_path / "jumping"
    for place in places:
        place.mkdir()
    STAGES[name].run(inputs, places[0])
    copied = shutil.copytree(inputs, tmp_path / "inputs")
    for path in copied.rglob("*"):
        os.utime(path, (4e9, 4e9))
    times = jumping()
    monkeypatch.setattr(time, "time", lambda: next(times))
    with only_read(copied):
        STAGES[name].run(copied, places[1])
    assert held(places[1]) == held(places[0])
    assert {path.name for path in places[1].iterdir()} == {path.name for path in places[0].iterdir()}
