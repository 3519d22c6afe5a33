"""What tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quantcli.training import loop, resume
from support.small_nets import SHAPES

W4A8 = {
    "weights": {"dtype": "int4", "granularity": "channel"},
    "inputs": {"dtype": "int8", "symmetric": False},
}
PER_TENSOR = {"weights": {"dtype": "int8"}, "inputs": {"dtype": "int8", "symmetric": False}}
DYNAMIC4 = {
    "weights": {"dtype": "int4", "granularity": "channel"},
    "inputs": {"dtype": "int8", "symmetric": False, "dynamic": True},
}
SCHEMES: dict[str, Any] = {
    "static": "int8-static", "W4A8": W4A8, "per tensor": PER_TENSOR, "dynamic": "int8-dynamic",
    "dynamic int4": DYNAMIC4, "int4": "int4", "int8": "int8",
    "int4 asymmetric": {"weights": {"dtype": "int4", "granularity": "group", "group_size": 32, "symmetric": False}},
}  # fmt: skip


def inputs_of(name: str, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SHAPES[name])).astype(np.float32)


def decibels(wanted: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(wanted.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / max(noise, 1e-300)))


def checkpoints_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(resume, "_WRITING_TIMES", 0)


def interrupting(stop: int) -> Callable[..., None]:
    """Logs a step as it is done, but for one in which the user presses a key."""
    original = loop.Training._log

    def log(self: loop.Training, step: int, *rest: Any) -> None:
        if step == stop:
            raise KeyboardInterrupt
        original(self, step, *rest)

    return log
