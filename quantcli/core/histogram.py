"""Distributions of a few weights and activations, in bins for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

#: Bins of a histogram, whatever the size of what it is of.
BINS = 96
#: How many of the worst tensors of a kind a page shows.
SHOWN = 6

#: Parts of a tensor, anew each time, so that a large one is never held as a whole.
Parts = Callable[[], Iterable["np.ndarray"]]


@dataclass(frozen=True)
class TensorHistogram:
    """A tensor's finite values in `BINS` bins from ``low`` to ``high``, and the ``range`` that its codes reach.

    ``counts_after`` are the values that codes stand for; None where there are none, as of activations. ``sqnr_db``:
    signal to quantization noise.
    """

    name: str
    kind: str
    low: float
    high: float
    counts: list[int]
    range: tuple[float, float]
    counts_after: list[int] | None = None
    sqnr_db: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry of a report."""
        found = {key: value for key, value in vars(self).items() if value is not None or key == "sqnr_db"}
        return found | {"range": list(self.range)}


def of_weight(name: str, before: Parts, after: Parts, sqnr_db: float | None) -> TensorHistogram | None:
    """Values of a weight beside those that its codes stand for; None where there are no finite ones."""
    extremes, reached = _extremes(before()), _extremes(after())
    if extremes is None or reached is None:
        return None
    low, high = _span(min(extremes[0], reached[0]), max(extremes[1], reached[1]))
    counts, counts_after = (_count(parts(), low, high) for parts in (before, after))
    return TensorHistogram(name, "weight", low, high, counts, reached, counts_after, sqnr_db)


def of_activation(
    name: str, values: np.ndarray, counts: np.ndarray, clipped: tuple[float, float], sqnr_db: float | None
) -> TensorHistogram | None:
    """An activation, of which there are ``counts`` at each of some ``values``, and the range that it is clipped to."""
    import numpy as np

    if not len(values):
        return None
    low, high = _span(float(values.min()), float(values.max()))
    found, _ = np.histogram(values, BINS, (low, high), weights=counts)
    return TensorHistogram(name, "activation", low, high, [int(n) for n in found], clipped, None, sqnr_db)


def _extremes(parts: Iterable[np.ndarray]) -> tuple[float, float] | None:
    import numpy as np

    found: list[float] = []
    for part in parts:
        finite = part[np.isfinite(part)]
        found += [float(finite.min()), float(finite.max())] if finite.size else []
    return (min(found), max(found)) if found else None


def _count(parts: Iterable[np.ndarray], low: float, high: float) -> list[int]:
    import numpy as np

    total = np.zeros(BINS, np.int64)
    for part in parts:
        total += np.histogram(part[np.isfinite(part)], BINS, (low, high))[0]
    return [int(count) for count in total]


def _span(low: float, high: float) -> tuple[float, float]:
    """Bins need some width."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)
