"""How long work tells how far it is: a call with what is done and what there is in all."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[int, int], None]


def say(progress: Progress | None, text: str) -> None:
    """Tell how it goes, in words, where whoever follows can show them."""
    speak = getattr(progress, "say", None)
    if speak is not None:
        speak(text)


class Tracker:
    """Counts what is done, from any thread, and passes the sum on."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Some more is done."""
        with self._lock:
            self.done += count
            if self.progress:
                self.progress(self.done, self.total)


class Fractions:
    """Counts a part of a tracker's work that is known as a fraction from 0 to 1."""

    def __init__(self, tracker: Tracker, count: int) -> None:
        self._tracker, self._count, self._done = tracker, count, 0

    def __call__(self, fraction: float) -> None:
        """So much of the part is done."""
        done = round(fraction * self._count)
        if done > self._done:
            self._tracker.add(done - self._done)
            self._done = done
