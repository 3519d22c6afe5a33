"""Work in an interpreter of its own, whose memory, imports and crashes are not ours."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from quantcli.system.files import temporary_folder

#: The child imports what this process would, and nothing from the current folder.
_CODE = "import sys; sys.path[:] = {path!r}; from quantcli.system.child import main; main(*sys.argv[1:])"
#: SIGKILL, which not every system names.
_KILL = 9
#: Windows has no signals: from here on, the status of a process is the exception that it died of (NTSTATUS).
_WINDOWS_CRASH = 0xC0000000
_QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "PYTHONIOENCODING": "utf-8",
}  # fmt: skip


class ChildFailedError(Exception):
    """A child ended without a result. ``status`` is None where it took too long."""

    def __init__(self, status: int | None, last_line: str) -> None:
        super().__init__(f"status {status}: {last_line}")
        self.status, self.last_line = status, last_line

    @property
    def of_memory(self) -> bool:
        """Whether it took more memory than there is: by its own words, or killed, as systems do then."""
        return self.status == -_KILL or (self.status is not None and is_out_of_memory(self.last_line))

    @property
    def end(self) -> str:
        """How it ended, in words."""
        if self.status == -_KILL:
            return "it was killed, as systems do where memory is short"
        return f"it crashed ({_crash(self.status)})" if self.crashed and self.status is not None else self.last_line

    @property
    def crashed(self) -> bool:
        """Whether the system ended it, and not the interpreter."""
        return self.status is not None and (self.status < 0 or self.status >= _WINDOWS_CRASH)


def _crash(status: int) -> str:
    """What the system calls a crash: the name of a signal, or on Windows a number that is written in hexadecimal."""
    if status > 0:
        return f"0x{status:X}"
    known = {each.value: each.name for each in signal.Signals}
    return known.get(-status, f"signal {-status}")  # signals of real time have no names


def is_out_of_memory(message: str) -> bool:
    """Whether an error of Python, torch or safetensors says that memory was not to be had."""
    known = r"MemoryError|[Cc]an(no|')t allocate memory|not enough memory|bad_alloc|CUDA out of memory"
    return bool(re.search(known, message))


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise MemoryError in place of an error that means it, which libraries raise as many others."""
    if isinstance(error, MemoryError) or is_out_of_memory(str(error)):
        raise MemoryError(str(error).partition("\n")[0]) from error


class Child:
    """One call of a function in a process of its own. To be closed with `stop`."""

    def __init__(self, function: str, request: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        """Begin, in the background.

        Args:
            function: ``module:name``; takes a dict and returns another, both of what JSON can hold.
            request: the dict it takes.
            environment: variables beside those of this process.
        """
        self._place = temporary_folder()
        folder = Path(self._place.name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        with (folder / "stderr.txt").open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE.format(path=sys.path), function, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=os.environ | _QUIET | dict(environment or {}),
            )

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for what the function returns. Raises ChildFailedError."""
        folder = Path(self._place.name)
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ChildFailedError(None, f"no answer within {timeout:g} s") from None
        if status:
            lines = (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ChildFailedError(status, lines[-1] if lines else "it said nothing")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result

    def stop(self) -> None:
        """End what is still running, and release what it holds."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._place.cleanup()


class Service:
    """A process of its own that answers one call after the other, so that what it imports is imported once."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Begin; ``environment``: variables beside those of this process."""
        self._place = temporary_folder()
        self._calls = 0
        with (Path(self._place.name) / "stderr.txt").open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE.format(path=sys.path), "", self._place.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=os.environ | _QUIET | dict(environment or {}),
            )

    def start(self, function: str, request: Mapping[str, Any]) -> None:
        """Ask ``module:name`` for an answer to a request, both of what JSON can hold."""
        self._calls += 1
        folder = Path(self._place.name)
        (folder / f"request{self._calls}.json").write_text(json.dumps(request), encoding="utf-8")
        assert self._process.stdin is not None
        # One that has ended says so where its answer is waited for.
        with contextlib.suppress(OSError):  # BrokenPipeError, on Windows one of an invalid argument
            self._process.stdin.write(f"{function} {self._calls}\n".encode())
            self._process.stdin.flush()

    def result(self, timeout: float) -> dict[str, Any]:
        """Wait for the answer to the call before. Raises ChildFailedError."""
        folder, end = Path(self._place.name), time.monotonic() + timeout
        answer = folder / f"result{self._calls}.json"
        while not answer.exists():
            status = self._process.poll()
            if status is not None and not answer.exists():
                lines = (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise ChildFailedError(status, lines[-1] if lines else "it said nothing")
            if time.monotonic() > end:
                raise ChildFailedError(None, f"no answer within {timeout:g} s")
            time.sleep(0.01)
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result

    def stop(self) -> None:
        """End it, and release what it holds."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._place.cleanup()


def main(function: str, folder: str) -> None:
    """What the child does: answer the one call, or with no function named, those that come on stdin."""
    if not function:
        for line in sys.stdin:
            name, _, number = line.strip().partition(" ")
            _answer(name, Path(folder), number)
        return
    _answer(function, Path(folder), "")


def _answer(function: str, place: Path, number: str) -> None:
    module, _, name = function.partition(":")
    request = json.loads((place / f"request{number}.json").read_text(encoding="utf-8"))
    result = getattr(import_module(module), name)(request)
    draft = place / "answer.json"
    draft.write_text(json.dumps(result), encoding="utf-8")
    draft.replace(place / f"result{number}.json")
