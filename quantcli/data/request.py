"""Where a conversion's knowledge of activations comes from, as the user gives it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Calibration:
    """Statistics of an earlier `calibrate`, or data to take them from now; nothing where both are None."""

    stats: Path | None = None
    data: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    tokenizer: Path | None = None
    preprocess: Path | None = None
