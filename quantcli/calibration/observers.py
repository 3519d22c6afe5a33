"""Observers of activations: streaming, and what they tell of a tensor.

A histogram's bins are the float32 values cut off to bfloat16: 65536 bins that are the same for all data,
128 to each power of two. So one pass suffices, counts are integers, and any split of the same values into
batches gives the same result, bit for bit. Memory does not grow with the values seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from quantcli.calibration.ranges import METHODS, Distribution, sqnr_db

if TYPE_CHECKING:
    import numpy as np

_BINS = 1 << 16
#: Values taken at a time: their temporary arrays stay in the cache.
_CHUNK = 1 << 18
#: Below this many values, counting them one by one beats adding two whole histograms.
_FEW = 1 << 15
#: Tensors with more channels have no ranges per channel: a vocabulary is no channel dimension.
MAX_CHANNELS = 1 << 14
#: Rows of fewer values than this are not reduced across, but column by column.
_NARROW = 16
#: Means are added up in multiples of this, as integers: then their order does not matter.
_MEAN_STEP = 2.0**-32
#: Larger means are taken for this, so that a sum of many still fits 64 bits.
_MEAN_LIMIT = 2.0**20
#: Added to a result, this makes 0 of -0, either of which may have come first.
_ZERO = 0.0


@dataclass(frozen=True, eq=False)
class TensorStats:
    """One tensor's statistics.

    - ``bins``: uint16, ascending, those that hold values: the upper half of a float32. ``counts``: int64.
    - ``minimum``, ``maximum``: of the finite values, exact; None where there are none.
    - ``nans``, ``infinities``: values that are not finite, which nothing else here includes.
    - ``channel_minimum``, ``channel_maximum``: float32 ``[channels]`` (axis 1 of images and volumes, otherwise the
      last one), or None where their number is not the same for all samples, or too large. NaN: nothing finite seen.
    - ``channel_mean``: float32 like these, the mean over entries of axis 0 of each one's mean.
    """

    bins: np.ndarray
    counts: np.ndarray
    minimum: float | None
    maximum: float | None
    nans: int = 0
    infinities: int = 0
    channel_minimum: np.ndarray | None = None
    channel_maximum: np.ndarray | None = None
    channel_mean: np.ndarray | None = None

    @cached_property
    def elements(self) -> int:
        """Values seen, those that are not finite included."""
        return int(self.counts.sum()) + self.nans + self.infinities

    @cached_property
    def distribution(self) -> Distribution:
        """The histogram in real values, its ends drawn in to the exact minimum and maximum."""
        import numpy as np

        magnitude = self.bins & np.uint16(0x7FFF)
        inner = (magnitude.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        with np.errstate(over="ignore"):
            outer = ((magnitude.astype(np.uint32) + 1) << 16).view(np.float32).astype(np.float64)
        outer[magnitude == 0] = 0.0  # zero, and what is too small to be told from it
        negative = self.bins >= 0x8000
        left, right = np.where(negative, -outer, inner), np.where(negative, -inner, outer)
        order = np.argsort(left, kind="stable")
        lowest, highest = self.minimum or 0.0, self.maximum or 0.0
        left, right = (np.clip(each[order], lowest, highest) for each in (left, right))
        return Distribution(left, right, self.counts[order].astype(np.float64))

    def range(self, method: str) -> tuple[float, float]:
        """Low and high by a method of `quantcli.calibration.ranges`; zero lies between them, or they are both zero."""
        if not self.minimum and not self.maximum:
            return 0.0, 0.0
        return METHODS[method](self.distribution)

    def sqnr_db(self, low: float, high: float, levels: int = 256) -> float | None:
        """Expected signal-to-noise ratio on an asymmetric grid; None without signal or without noise."""
        return sqnr_db(self.distribution, low, high, levels)

    def channel_levels(self, low: float, high: float, levels: int = 256) -> float | None:
        """How many of the ``levels`` of a grid over ``low..high`` the median channel's own range spans.

        A few channels that own the range leave few to the others; their signal hides that in `sqnr_db`. Channels
        that never change do not count. None where channels are not known.
        """
        import numpy as np

        if self.channel_minimum is None or self.channel_maximum is None or high <= low:
            return None
        width = np.clip(self.channel_maximum, low, high) - np.clip(self.channel_minimum, low, high)
        alive = width[np.isfinite(width) & (width > 0)]
        return float(np.median(alive)) * (levels - 1) / (high - low) if len(alive) else None

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, each as the end of a sentence that starts with the tensor's name."""
        of_all = f"of its {self.elements:,} values"
        if self.nans:
            yield f"is not a number (NaN) in {self.nans:,} {of_all}, which were left out"
        if self.infinities:
            yield f"is infinite in {self.infinities:,} {of_all}, which were left out"
        if not self.elements:
            yield "was empty in every sample"
        elif self.minimum is not None and self.minimum == self.maximum:
            yield f"was {self.minimum:g} everywhere, so its range says little"


class Observer:
    """Gathers one tensor's statistics from any number of arrays."""

    def __init__(self) -> None:
        import numpy as np

        self._histogram = np.zeros(_BINS, np.int64)
        self._nans = self._infinities = 0
        self._channels: tuple[np.ndarray, np.ndarray] | None = None
        self._channels_differ = False
        self._sums: np.ndarray | None = None
        self._rows = 0
        self._low, self._high = np.float32(np.inf), np.float32(-np.inf)

    def update(self, values: np.ndarray) -> None:
        """Take in an array of any shape; its dtype is a floating-point one, of which float32 is kept."""
        import numpy as np

        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(values, np.float32)
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            upper = (flat[start : start + _CHUNK].view(np.uint32) >> 16).astype(np.int64)
            if upper.size < _FEW:
                np.add.at(self._histogram, upper, 1)
            else:
                counts = np.bincount(upper)  # ends at the largest: positive values fill a quarter of the bins
                self._histogram[: counts.size] += counts
        if not flat.size:
            return
        low, high = _channel_ranges(values)
        smallest, largest = low.min(), high.max()
        if not (np.isfinite(smallest) and np.isfinite(largest)):
            nans = int(np.count_nonzero(np.isnan(flat)))
            self._nans += nans
            self._infinities += flat.size - nans - int(np.count_nonzero(np.isfinite(flat)))
            finite = np.isfinite(values)
            low, _ = _channel_ranges(np.where(finite, values, np.float32(np.inf)))
            _, high = _channel_ranges(np.where(finite, values, np.float32(-np.inf)))
            values = np.where(finite, values, np.float32(0))
        self._take_ranges(low, high)
        self._low, self._high = min(self._low, low.min()), max(self._high, high.max())
        if 1 < len(low) <= MAX_CHANNELS and not self._channels_differ:
            means = np.clip(_channel_means(values), -_MEAN_LIMIT, _MEAN_LIMIT)
            sums = np.rint(means / _MEAN_STEP).astype(np.int64).sum(axis=0)
            self._sums = sums if self._sums is None else self._sums + sums
            self._rows += len(means)

    def _take_ranges(self, low: np.ndarray, high: np.ndarray) -> None:
        import numpy as np

        if self._channels is None:
            self._channels = low, high
        elif len(self._channels[0]) == len(low):
            self._channels = np.minimum(self._channels[0], low), np.maximum(self._channels[1], high)
        else:
            self._channels_differ = True

    def merge(self, other: Observer) -> None:
        """Take in what another one has seen: as if it had been seen here, in any order."""
        self._histogram += other._histogram
        self._nans, self._infinities = self._nans + other._nans, self._infinities + other._infinities
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        if other._channels is not None:
            self._take_ranges(*other._channels)
        self._channels_differ |= other._channels_differ
        if other._sums is not None and not self._channels_differ:
            self._sums = other._sums if self._sums is None else self._sums + other._sums
            self._rows += other._rows

    def result(self) -> TensorStats:
        """The statistics so far."""
        import numpy as np

        counts = self._histogram.copy()
        # These bins hold infinities and NaN, which are counted apart.
        counts[0x7F80:0x8000] = counts[0xFF80:] = 0
        bins = np.flatnonzero(counts)
        low = high = mean = None
        if self._channels is not None and not self._channels_differ and 1 < len(self._channels[0]) <= MAX_CHANNELS:
            low, high = (np.where(np.isfinite(each), each, np.float32(np.nan)) + _ZERO for each in self._channels)
            if self._sums is not None:
                mean = (self._sums * (_MEAN_STEP / self._rows)).astype(np.float32)
        minimum, maximum = (float(self._low + _ZERO), float(self._high + _ZERO)) if len(bins) else (None, None)
        return TensorStats(
            bins.astype(np.uint16), counts[bins], minimum, maximum, self._nans, self._infinities, low, high, mean
        )


def _channel_ranges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minima and maxima, float32 ``[channels]``; of a vector, which may well be a batch, ``[1]``."""
    import numpy as np

    if values.ndim < 2 or (values.ndim < 4 and values.shape[-1] > MAX_CHANNELS):
        return values.min(keepdims=True).reshape(1), values.max(keepdims=True).reshape(1)
    if values.ndim >= 4:
        planes = values.reshape(*values.shape[:2], -1)
        return planes.min(axis=(0, 2)), planes.max(axis=(0, 2))
    rows = values.reshape(-1, values.shape[-1])
    if rows.shape[1] >= _NARROW:
        return rows.min(axis=0), rows.max(axis=0)
    # numpy reduces across short rows one value at a time.
    columns = [rows[:, column] for column in range(rows.shape[1])]
    return np.array([column.min() for column in columns]), np.array([column.max() for column in columns])


def _channel_means(values: np.ndarray) -> np.ndarray:
    """Means over all but the first axis and the channels, float64 ``[entries, channels]``.

    Each entry is reduced on its own, so that its mean does not depend on what it is batched with.
    """
    import numpy as np

    if values.ndim >= 4:
        means = values.reshape(*values.shape[:2], -1).mean(axis=2)
    else:
        means = values.mean(axis=1) if values.ndim == 3 else values
    return np.asarray(means, np.float64)
