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
    """

    expected_noise: float | None = None
    _low: int = 0
    _high: int = LEVELS - 1
    _outcomes: set[bool] = field(default_factory=set)
    _known: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._first = LEVELS // 2 if self.expected_noise is None else level_of(self.expected_noise)
        self._step = _FAR if self.expected_noise is None else _NEAR
        self._last: int | None = None

    @property
    def next(self) -> int | None:
        """The level to try, one of which nothing is known; None once the one is found, or there is none.

        The one that is expected comes first. While only one side is known the next is further away each time; between
        two sides it is in the middle.
        """
        level = self._aim() if self._low <= self._high else None
        return None if level in self._known else level

    @property
    def lowest(self) -> int:
        """The level of most noise that could be the one."""
        return self._low

    def _aim(self) -> int:
        if self._last is None and self._low <= self._first <= self._high:
            return self._first
        if len(self._outcomes) != 1:
            return (self._low + self._high) // 2
        if True in self._outcomes:
            return max(self._low, self._high + 1 - self._step)
        return min(self._high, self._low - 1 + self._step)

    def know(self, level: int, *, is_kept: bool) -> None:
        """Take into account what came of a level at another time."""
        self._outcomes.add(is_kept)
        self._known.add(level)
        if is_kept:
            self._high = min(self._high, level - 1)
        else:
            self._low = max(self._low, level + 1)

    def tell(self, level: int, *, is_kept: bool) -> None:
        """Say what came of the level that was tried."""
        if self._last is not None:
            self._step *= 2
        self._last = level
        self.know(level, is_kept=is_kept)

    def settle(self) -> None:
        """What was found is good enough."""
        self._low = self._high + 1
