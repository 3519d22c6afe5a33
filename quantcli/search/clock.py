"""The time that a search may take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
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

    def is_half_over(self) -> bool:
        """Whether half of the time is taken, so that what comes first leaves the rest to what comes next."""
        return self.limit is not None and self.seconds > self.limit / 2

    def has_room_for(self, seconds: float) -> bool:
        """Whether what takes so long would end within the limit."""
        return self.limit is None or self.seconds + seconds <= self.limit


@dataclass
class Pace:
    """How long trials take, and so whether there is time for another one."""

    clock: Clock
    _longest: float = 0.0

    def has_time(self) -> bool:
        """Whether another trial would end in time; what is found is converted once more when it is published."""
        return not self.clock.is_over() and self.clock.has_room_for(2 * self._longest)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """What is done within is a trial."""
        started = self.clock.seconds
        yield
        self._longest = max(self._longest, self.clock.seconds - started)
