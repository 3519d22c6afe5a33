"""The checkpoint that an interrupted run of training is continued from."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantcli.system.files import whole_file

#: Seconds between two checkpoints.
CHECKPOINT_SECONDS = 30.0
#: Where writing one takes long, so many times as long is waited until the next.
_WRITING_TIMES = 20


class CheckpointFile:
    """A file that is written now and then, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written, self._interval = time.monotonic(), CHECKPOINT_SECONDS

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, or None where there is none."""
        return torch.load(self._path, weights_only=True) if self._path.exists() else None

    def save_if_due(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state, if the last checkpoint is old enough."""
        started = time.monotonic()
        if started - self._written <= self._interval:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self._path) as unfinished:
            try:
                torch.save(state(), unfinished)
            except RuntimeError as error:
                if "inline_container" not in str(error) and "iostream" not in str(error):
                    raise
                # torch's writer does not say why a write ended early; a disk without room is what does that.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path)) from error
        self._written = time.monotonic()
        self._interval = max(CHECKPOINT_SECONDS, _WRITING_TIMES * (self._written - started))
