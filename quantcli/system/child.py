"""Work in an interpreter of its own, whose memory, imports and crashes are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

#: The child imports what this process would, and nothing from the current folder.
_CODE = "import sys; sys.path[:] = {path!r}; from quantcli.system.child import main; main(*sys.argv[1:])"
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


class ChildFailedError(Exception):
    """A child ended without a result. ``status`` is None where it took too long."""

    def __init__(self, status: int | None, last_line: str) -> None:
        super().__init__(f"status {status}: {last_line}")
        self.status, self.last_line = status, last_line


class Child:
    """One call of a function in a process of its own. To be closed with `stop`."""

    def __init__(self, function: str, request: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        """Begin, in the background.

        Args:
            function: ``module:name``; takes a dict and returns another, both of what JSON can hold.
            request: the dict it takes.
            environment: variables beside those of this process.
        """
        self._place = tempfile.TemporaryDirectory(prefix="quantcli-")
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


def main(function: str, folder: str) -> None:
    """What the child does."""
    module, _, name = function.partition(":")
    place = Path(folder)
    request = json.loads((place / "request.json").read_text(encoding="utf-8"))
    result = getattr(import_module(module), name)(request)
    (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
