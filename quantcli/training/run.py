"""What every training is given beside its model and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantcli.system.progress import Fractions, Progress, Tracker, say

#: Of these are the fractions that progress is told in.
_PARTS = 10_000


@dataclass(frozen=True)
class Run:
    """One run of training.

    - ``seed``: what is held out and the order of samples are drawn by it.
    - ``device``: ``cpu`` or ``cuda``.
    - ``checkpoint``: the file that an interrupted run is continued from, and that it writes.
    - ``tick``: called with the fraction that is done; ``say``: with words of how it goes.
    """

    seed: int
    device: str
    checkpoint: Path
    tick: Callable[[float], None]
    say: Callable[[str], None]

    @classmethod
    def followed_by(cls, progress: Progress | None, seed: int, device: str, checkpoint: Path) -> Run:
        """A run of which somebody is told, as of any work."""
        return cls(seed, device, checkpoint, Fractions(Tracker(_PARTS, progress), _PARTS), partial(say, progress))
