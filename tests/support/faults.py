"""Faults of a machine, made on purpose: what a kill at any moment leaves, and disks that fail or fill up."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quantcli.checkpoint.positional import PositionalFile

#: Events of the interpreter before something changes on disk.
_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watchers and event in _CHANGES:
        _watchers[-1](event, arguments)


class Kills:
    """What a folder held before every step that changed something in it: what a kill at that moment leaves.

    Args:
        folder: what is watched. Files that are mapped or written past Python are seen at the next step.
        store: where copies are kept.
    """

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self._store = folder, store
        self.moments: list[Path] = []
        self._last: dict[str, bytes] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile every step is kept."""
        if not getattr(sys, "_quantcli_watched", False):
            sys.addaudithook(_hook)
            sys._quantcli_watched = True  # type: ignore[attr-defined]
        write = PositionalFile.write

        def writing(file: PositionalFile, offset: int, data: bytes | memoryview) -> None:
            self._keep()
            write(file, offset, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PositionalFile, "write", writing)
            _watchers.append(self._see)
            try:
                yield
            finally:
                _watchers.pop()

    def restore(self, moment: Path) -> None:
        """Have the folder as it was at a moment."""
        shutil.rmtree(self.folder)
        shutil.copytree(moment, self.folder)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            place, _, flags = arguments
            if not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(place, str | Path):
                return
            if not Path(place).is_relative_to(self.folder):
                return
        self._keep()

    def _keep(self) -> None:
        _watchers.append(lambda *_: None)  # copying is no step of its own
        try:
            held = {
                str(path.relative_to(self.folder)): b"" if path.is_dir() else path.read_bytes()
                for path in sorted(self.folder.rglob("*"))
            }
            if held != self._last:
                self._last = held
                moment = self._store / str(len(self.moments))
                shutil.copytree(self.folder, moment)
                self.moments.append(moment)
        finally:
            _watchers.pop()
