"""Systems other than this one, as far as they can be simulated: what they lack is gone, what they refuse fails."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from filelock import SoftFileLock

from quantcli.checkpoint import positional
from quantcli.conversion import staging
from quantcli.data import array_files
from quantcli.system import hardware
from support import faults

#: What Windows does not have; macOS has most of it.
_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
_OF_OS = ("preadv", "pwritev", "pread", "pwrite", "fork", "sched_getaffinity", "sysconf", "uname", "getuid", "fchmod",
          "posix_fadvise", "posix_fallocate", "copy_file_range", "O_DIRECTORY", "O_CLOEXEC")  # fmt: skip


class _WithoutAdvice:
    """The module mmap, whose mappings cannot be told that they are not needed."""

    ACCESS_READ = mmap.ACCESS_READ

    @staticmethod
    def mmap(*arguments: Any, **options: Any) -> memoryview:
        """What can be read as a mapping, and no more."""
        return memoryview(_mmap(*arguments, **options))


_mmap = mmap.mmap


@contextmanager
def lacking_what_linux_has() -> Iterator[None]:
    """Meanwhile modules, functions and files that other systems lack are gone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _MODULES:
            patch.setitem(sys.modules, name, None)
        for name in _OF_OS:
            patch.delattr(os, name, raising=False)
        patch.delattr(signal, "SIGKILL")
        patch.setattr(positional, "_HAS_POSITIONAL_IO", False)
        patch.setattr(staging, "FileLock", SoftFileLock)
        patch.setattr(array_files, "mmap", _WithoutAdvice())
        for name in ("_CPU_INFO", "_STATUS"):
            patch.setattr(hardware, name, Path("/no such file"))
        patch.setattr(hardware, "sys", SimpleNamespace(platform="win32"))
        used = SimpleNamespace(rss=3 << 20, peak_wset=5 << 20)
        patch.setattr(psutil.Process, "memory_info", lambda _: used)
        yield


@contextmanager
def open_files_are_kept() -> Iterator[list[Path]]:
    """Meanwhile no file can be renamed, replaced or removed that this process has open or mapped, as on Windows.

    Yields the files that were refused, those too whose refusal was borne.
    """
    refused: list[Path] = []

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("os.rename", "os.remove"):
            return
        places = arguments[:2] if event == "os.rename" else arguments[:1]
        held = _held()
        for place in (Path.cwd() / os.fspath(each) for each in places):
            for file in held:
                if file == place or place in file.parents:
                    refused.append(file)
                    raise PermissionError(13, "it is used by this process", str(place))

    with pytest.MonkeyPatch.context() as patch, faults.watching(see):
        patch.setattr(shutil, "_use_fd_functions", False)  # so that whole paths are told
        yield refused


def _held() -> set[Path]:
    """Files that this process has open or mapped."""
    found = set[Path]()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them is closed by now
            if descriptor.is_file():
                found.add(descriptor.readlink())
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return found | {Path(line.split(maxsplit=5)[5]) for line in maps if "/" in line}


def unlucky(_: dict[str, Any]) -> dict[str, Any]:
    """An error of a child, in words that not every encoding has."""
    raise ValueError("größer")
