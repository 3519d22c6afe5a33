"""The time that a search may take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Clock:
    """Runs from when it is made. ``limit`` are seconds, or None where a search may take as long as it takes."""

    limit: float | None = None
    _started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """What was taken so far."""
        return time.monotonic() - self._started

    def is_over(self) -> bool:
        """Whether the limit is reached, so that a search ends with what it has."""
        return self.limit is not None and self.seconds > self.limit

    def has_room_for(self, seconds: float) -> bool:
        """Whether what takes so long would end within the limit."""
        return self.limit is None or self.seconds + seconds <= self.limit
