"""Faults of a machine, made on purpose: what a kill at any moment leaves, and disks that fail or fill up."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quantcli.checkpoint.positional import PositionalFile

#: Events of the interpreter before something changes on disk, and which of them take room there.
_GROWTH = ("open", "os.mkdir", "os.rename")
_CHANGES = (*_GROWTH, "os.remove", "os.rmdir", "os.truncate")
_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watchers and event in _CHANGES:
        _watchers[-1](event, arguments)


def _writes(arguments: tuple[Any, ...]) -> bool:
    return bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@contextmanager
def watching(watch: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Meanwhile ``watch`` is told of every event, and may raise in its place."""
    if not getattr(sys, "_quantcli_watched", False):
        sys.addaudithook(_hook)
        sys._quantcli_watched = True  # type: ignore[attr-defined]
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.pop()


@contextmanager
def before_changes(folder: Path, react: Callable[[str], None], events: tuple[str, ...] = _CHANGES) -> Iterator[None]:
    """Meanwhile ``react`` is called before every step that changes something in a folder.

    Files that are mapped or written past Python count as one step, when they are opened.
    """

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        place = arguments[0]
        if event not in events or (event == "open" and not _writes(arguments)):
            return
        if isinstance(place, str | os.PathLike) and Path(place).is_relative_to(folder):
            react(event)

    write = PositionalFile.write

    def writing(file: PositionalFile, offset: int, data: bytes | memoryview) -> None:
        react("write")
        write(file, offset, data)

    with pytest.MonkeyPatch.context() as patch, watching(see):
        patch.setattr(PositionalFile, "write", writing)
        yield


class Counted:
    """Counts steps, and raises an error in the place of one: of it alone, or of it and all that follow."""

    def __init__(self, at: int | None = None, error: Callable[[], BaseException] = KeyboardInterrupt) -> None:
        self.steps, self._at, self._error = 0, at, error
        self.stays = False

    def __call__(self, _: str) -> None:
        number, self.steps = self.steps, self.steps + 1
        if self._at is not None and (number == self._at or (self.stays and number > self._at)):
            raise self._error()


@contextmanager
def full_disk(folder: Path, after: int | None = None) -> Iterator[Counted]:
    """Meanwhile the disk has no room after so many steps that take some."""
    full = Counted(after, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    full.stays = True
    with before_changes(folder, full, _GROWTH):
        yield full


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Meanwhile no file grows beyond so many bytes, whoever writes it: it ends in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def failing_reads(file: Path, after: int | None = None) -> Iterator[Counted]:
    """Meanwhile a file can be opened and read at an offset so many times; then its disk fails."""
    failing = Counted(after, lambda: OSError(errno.EIO, os.strerror(errno.EIO), str(file)))
    failing.stays = True

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        place = arguments[0]
        named = event == "open" and not _writes(arguments) and isinstance(place, str | os.PathLike)
        if named and Path(place) == file:
            failing(event)

    read = PositionalFile._read_into

    def reading(opened: PositionalFile, view: memoryview, offset: int) -> None:
        if opened.path == file:
            failing("read")
        read(opened, view, offset)

    with pytest.MonkeyPatch.context() as patch, watching(see):
        patch.setattr(PositionalFile, "_read_into", reading)
        yield failing


class Kills:
    """What a folder held before every step that changed something in it: what a kill at that moment leaves.

    Args:
        folder: what is watched.
        store: where copies are kept.
    """

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self._store = folder, store
        self.moments: list[Path] = []
        self._last: dict[str, bytes] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile every step is kept."""
        with before_changes(self.folder, self._keep):
            yield

    def restore(self, moment: Path) -> None:
        """Have the folder as it was at a moment."""
        shutil.rmtree(self.folder)
        shutil.copytree(moment, self.folder)

    def _keep(self, _: str) -> None:
        with watching(lambda *_: None):  # copying is no step of its own
            held = {
                str(path.relative_to(self.folder)): b"" if path.is_dir() else path.read_bytes()
                for path in sorted(self.folder.rglob("*"))
            }
            if held != self._last:
                self._last = held
                moment = self._store / str(len(self.moments))
                shutil.copytree(self.folder, moment)
                self.moments.append(moment)


@contextmanager
def power_cuts() -> Iterator[list[tuple[str, Path, dict[str, int] | None]]]:
    """Meanwhile what is forced to the disk, and what is renamed, is written down, in order.

    Yields entries ``("forced", path, None)``, and ``("renamed", new path, sizes)``: how large each file is that goes
    by the new name, by its path below it. A file that was not forced as it is counts as -1.
    """
    seen: list[tuple[str, Path, dict[str, int] | None]] = []
    forced: dict[Path, tuple[int, int]] = {}
    fsync = os.fsync

    def forcing(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        status = path.stat()
        forced[path] = status.st_size, status.st_mtime_ns
        seen.append(("forced", path, None))
        fsync(descriptor)

    def renaming(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "os.rename":
            return
        old, new = (Path(os.fspath(each)).absolute() for each in arguments[:2])
        files = [old] if old.is_file() else [path for path in sorted(old.rglob("*")) if path.is_file()]
        sizes = {}
        for file in files:
            state = file.stat().st_size, file.stat().st_mtime_ns
            sizes[file.relative_to(old).as_posix()] = state[0] if forced.get(file) == state else -1
        seen.append(("renamed", new, sizes))

    with pytest.MonkeyPatch.context() as patch, watching(renaming):
        patch.setattr(os, "fsync", forcing)
        yield seen
