"""Finds the level that allows most noise and still keeps a limit, in few trials."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantcli.search.onnx_mixes import LEVELS, level_of

#: Levels between the first trial and the second one, where it is known about how much noise is allowed, or not.
_NEAR, _FAR = 2, LEVELS // 4


@dataclass
class LevelSearch:
    """One search among levels 0 (most noise) to `LEVELS` - 1; those below the one that is looked for are not kept.

    Attributes:
        expected_noise: about what is allowed, by signal, or None.
        next: the level to try, or None once the one is found, or there is none.
    """

    expected_noise: float | None = None
    next: int | None = field(init=False)
    _low: int = 0
    _high: int = LEVELS - 1

    def __post_init__(self) -> None:
        self.next = LEVELS // 2 if self.expected_noise is None else level_of(self.expected_noise)
        self._step = _FAR if self.expected_noise is None else _NEAR
        self._outcomes: set[bool] = set()

    def tell(self, *, is_kept: bool) -> None:
        """Say what came of the level that was to be tried."""
        assert self.next is not None
        level = self.next
        self._outcomes.add(is_kept)
        if is_kept:
            self._high = level - 1
        else:
            self._low = level + 1
        if self._low > self._high:
            self.next = None
        elif len(self._outcomes) > 1:
            self.next = (self._low + self._high) // 2
        else:
            # Only one side is known: further away from it each time.
            self.next = max(self._low, level - self._step) if is_kept else min(self._high, level + self._step)
            self._step *= 2
