"""From a tensor's histogram to the range it is quantized in: minmax, percentile, entropy, mse.

The grid that all of this is about is the usual asymmetric one: ``levels`` values ``k * scale`` with
``scale = (high - low) / (levels - 1)``, of which zero is one, so that a range always holds zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Percent of all values that ``percentile`` keeps; half of the rest may be cut off at each end. Higher ones hardly
#: differ from ``minmax`` in a histogram of some million values, 99.9 already cuts into classifiers' outputs.
PERCENTILE = 99.99

#: Linear bins from zero to the largest magnitude in the search of ``entropy``.
ENTROPY_BINS = 4096
#: Each threshold that ``entropy`` tries is about so much larger than the one before.
_ENTROPY_STEP = 1.02
#: Probability given to a cell that nothing falls into, so that the divergence stays finite.
_ENTROPY_FLOOR = 1e-9

#: The search of ``mse``: how far below the largest magnitude it looks, in octaves; candidates per end and round.
_MSE_OCTAVES, _MSE_CANDIDATES, _MSE_ROUNDS = 8, 13, 7
#: Numbers in one temporary array of that search.
_MSE_CHUNK = 1 << 18

LEVELS = 256

#: What is taken where nobody says otherwise. On EfficientNet-Lite0 ``mse`` and ``minmax`` leave the same 24 dB of
#: the outputs, ``percentile`` a little less, ``entropy`` 6 dB less; a single outlier ruins ``minmax`` alone.
DEFAULT_METHOD = "mse"


@dataclass(frozen=True, eq=False)
class Distribution:
    """A histogram of finite values: ``counts[i]`` of them, evenly spread over ``left[i]`` to ``right[i]``.

    float64 arrays ``[bins]``, ascending, without overlap. Exact zeros are a bin of no width.
    """

    left: np.ndarray
    right: np.ndarray
    counts: np.ndarray

    @property
    def low(self) -> float:
        """The smallest value, or zero if that is smaller."""
        return min(float(self.left[0]), 0.0) if len(self.left) else 0.0

    @property
    def high(self) -> float:
        """The largest value, or zero if that is larger."""
        return max(float(self.right[-1]), 0.0) if len(self.right) else 0.0

    @cached_property
    def total(self) -> float:
        """Number of values."""
        return float(self.counts.sum())

    @cached_property
    def power(self) -> float:
        """Mean square of the values."""
        squares = (self.left**2 + self.left * self.right + self.right**2) / 3
        return float((self.counts * squares).sum() / self.total) if self.total else 0.0

    @cached_property
    def _cumulative(self) -> tuple[np.ndarray, np.ndarray]:
        """Values, and how many lie at or below each."""
        import numpy as np

        below = np.concatenate([[0.0], np.cumsum(self.counts)])
        values = np.stack([self.left, self.right], 1).ravel()
        return values, np.stack([below[:-1], below[1:]], 1).ravel()

    def quantile(self, share: float) -> float:
        """The value below which this share of all lies."""
        import numpy as np

        values, below = self._cumulative
        return float(np.interp(share * self.total, below, values))

    def draw(self, generator: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """Independent values of this distribution, float32 of a shape; zeros where it holds none."""
        import numpy as np

        values, below = self._cumulative
        shares = generator.random(tuple(shape))
        return (np.interp(shares * self.total, below, values) if self.total else 0 * shares).astype(np.float32)

    def rebinned(self, edges: np.ndarray) -> np.ndarray:
        """Counts between other edges, float64 ``[len(edges) - 1]``."""
        import numpy as np

        values, below = self._cumulative
        return np.diff(np.interp(edges, values, below))


def minmax(distribution: Distribution) -> tuple[float, float]:
    """From the smallest to the largest value: nothing is clipped."""
    return distribution.low, distribution.high


def percentile(distribution: Distribution, percent: float = PERCENTILE) -> tuple[float, float]:
    """The range that cuts off the same small share of values at each end."""
    tail = (100.0 - percent) / 200.0
    return min(distribution.quantile(tail), 0.0), max(distribution.quantile(1.0 - tail), 0.0)


def entropy(distribution: Distribution, levels: int = LEVELS) -> tuple[float, float]:
    """The clipping threshold whose quantized distribution diverges least from the true one (Kullback-Leibler).

    Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017, as MXNet and onnxruntime implement it, with
    three differences. The window is ``[-t, t]`` within the tensor's own range, and all ``levels`` are spread over
    it, because the grid is asymmetric. There are 4096 bins, so that a threshold of a sixteenth of the largest
    value can be found. Exact zeros are left out: any grid represents them, and half of a ReLU's output would
    decide alone.
    """
    import numpy as np

    width = max(-distribution.low, distribution.high) / ENTROPY_BINS
    below, above = (int(np.ceil(end / width - 1e-9)) for end in (-distribution.low, distribution.high))
    keep = (distribution.left != 0) | (distribution.right != 0)
    nonzero = Distribution(distribution.left[keep], distribution.right[keep], distribution.counts[keep])
    counts = nonzero.rebinned(np.arange(-below, above + 1) * width)
    thresholds = entropy_thresholds(below, above, levels)
    if not len(thresholds) or not counts.sum():
        return minmax(distribution)
    divergences = [_divergence(counts, max(below - t, 0), min(below + t, len(counts)), levels) for t in thresholds]
    best = thresholds[int(np.argmin(divergences))]
    return max(distribution.low, -best * width), min(distribution.high, best * width)


def entropy_thresholds(below: int, above: int, levels: int) -> list[int]:
    """Thresholds to try, in bins: all whose window holds a bin for each level, about two percent apart."""
    widest = max(below, above)
    # A window of t bins on the long side has min(t, short) on the other.
    short = min(below, above)
    threshold = levels / 2 if short >= levels / 2 else levels - short
    thresholds: list[int] = []
    while threshold < widest:
        if not thresholds or round(threshold) > thresholds[-1]:
            thresholds.append(round(threshold))
        threshold *= _ENTROPY_STEP
    return [*thresholds, widest] if widest >= threshold / _ENTROPY_STEP else thresholds


def _divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """Nats between a window with what was clipped piled up at its ends, and the same in ``levels`` cells."""
    import numpy as np

    inside = counts[start:stop]
    true = inside.copy()
    true[0] += counts[:start].sum()
    true[-1] += counts[stop:].sum()
    filled = true > 0
    cells = np.arange(len(inside)) * levels // len(inside)
    starts = np.searchsorted(cells, np.arange(levels))
    # Each cell's values, spread over those of its bins that hold any.
    heights = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(filled.astype(np.int64), starts), 1)
    quantized = heights[cells][filled]
    true = true[filled] / true.sum()
    quantized = np.maximum(quantized / max(quantized.sum(), 1e-300), _ENTROPY_FLOOR)
    return float((true * np.log(true / quantized)).sum())


def mse(distribution: Distribution, levels: int = LEVELS) -> tuple[float, float]:
    """The range whose expected squared error, of rounding and of clipping together, is least.

    First the best threshold for both ends at once, as `entropy` has it; from there each end in turns, over a
    row of candidates around the best so far, which is drawn in to half its reach from round to round.
    """
    import numpy as np

    low, high = minmax(distribution)
    thresholds = max(-low, high) * 2.0 ** -np.linspace(0, _MSE_OCTAVES, 3 * _MSE_OCTAVES + 1)
    starts = np.stack([np.maximum(-thresholds, low), np.minimum(thresholds, high)], 1)
    errors = expected_squared_error(distribution, starts[:, 0], starts[:, 1], levels)
    best, least = starts[int(np.argmin(errors))], float(errors.min())
    for reach in _MSE_OCTAVES * 0.5 ** np.arange(1, _MSE_ROUNDS + 1):
        factors = 2.0 ** np.linspace(-reach, reach, _MSE_CANDIDATES)
        for side, limit in enumerate((low, high)):
            candidates = np.tile(best, (_MSE_CANDIDATES, 1))
            candidates[:, side] = np.sign(limit) * np.minimum(np.abs(best[side]) * factors, abs(limit))
            errors = expected_squared_error(distribution, candidates[:, 0], candidates[:, 1], levels)
            if errors.min() < least:
                best, least = candidates[int(np.argmin(errors))], float(errors.min())
    return float(best[0]), float(best[1])


def sqnr_db(distribution: Distribution, low: float, high: float, levels: int = LEVELS) -> float | None:
    """Expected signal-to-noise ratio in decibels; None without signal or without noise."""
    import numpy as np

    if high <= low or not distribution.power:
        return None
    error = float(expected_squared_error(distribution, np.array([low]), np.array([high]), levels)[0])
    return 10 * log10(distribution.power / error) if error else None


def expected_squared_error(
    distribution: Distribution, low: np.ndarray, high: np.ndarray, levels: int = LEVELS
) -> np.ndarray:
    """Mean squared error of rounding to the grid of each range and clipping to it, float64 like ``low``.

    Exact for values spread evenly within their bins: with ``u`` in steps of the grid, the integral of
    ``(t - round(t))**2`` from 0 to ``u`` is ``k / 12 + (u - k)**3 / 3``, ``k`` being the grid point next to ``u``.
    """
    import numpy as np

    rows = max(1, _MSE_CHUNK // max(1, len(distribution.left)))
    errors = np.empty(len(low))
    for first in range(0, len(low), rows):
        part = slice(first, first + rows)
        scale = (high[part] - low[part])[:, None] / (levels - 1)
        smallest = -np.rint(-low[part][:, None] / scale)
        left, right = distribution.left / scale, distribution.right / scale
        left_point, right_point = (np.clip(np.rint(u), smallest, smallest + levels - 1) for u in (left, right))
        width = right - left
        integral = (right_point - left_point) / 12 + ((right - right_point) ** 3 - (left - left_point) ** 3) / 3
        # In a bin that is narrow beside its distance from zero the difference would drown in rounding.
        narrow = width <= 1e-6 * (np.abs(left) + 1e-30)
        mean = np.where(narrow, (left - left_point) ** 2, integral / np.where(narrow, 1.0, width))
        errors[part] = (mean @ distribution.counts) / distribution.total * scale[:, 0] ** 2
    return errors


#: Name of a method -> function from a distribution to its range.
METHODS: dict[str, Callable[[Distribution], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
