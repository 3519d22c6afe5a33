"""Observers and range methods against naive float64 computations on the raw values."""

from __future__ import annotations

from collections.abc import Callable
from math import log, log10

import numpy as np
import pytest

from quantcli.calibration import ranges
from quantcli.calibration.observers import Observer, TensorStats

RNG = np.random.default_rng(7)
NORMAL = RNG.standard_normal(30_111, dtype=np.float32)
TENSORS = {
    "normal": NORMAL,
    "relu": np.maximum(NORMAL, 0),
    "relu6": np.clip(NORMAL * 4, 0, 6),
    "negative": -np.abs(NORMAL) - np.float32(0.25),
    "silu": (NORMAL * 3 / (1 + np.exp(-3 * NORMAL))).astype(np.float32),
    "outlier": np.concatenate([NORMAL, np.array([60, -20], np.float32)]),
    "tiny": NORMAL * np.float32(1e-30),
    "huge": NORMAL * np.float32(5e37),
    "few": np.array([0.5, -1.0, 3.25], np.float32),
}  # fmt: skip


def observed(*arrays: np.ndarray) -> TensorStats:
    observer = Observer()
    for array in arrays:
        observer.update(array)
    return observer.result()


def mean_squared_error(values: np.ndarray, low: float, high: float, levels: int = 256) -> float:
    """Of rounding every value to the grid, one by one."""
    scale = (high - low) / (levels - 1)
    zero_point = round(-low / scale)
    codes = np.clip(np.rint(values.astype(np.float64) / scale) + zero_point, 0, levels - 1)
    return float(np.mean(((codes - zero_point) * scale - values.astype(np.float64)) ** 2))


def same(left: TensorStats, right: TensorStats) -> bool:
    for name in ("bins", "counts", "channel_minimum", "channel_maximum"):
        ours, theirs = getattr(left, name), getattr(right, name)
        if (ours is None) != (theirs is None) or (ours is not None and ours.tobytes() != theirs.tobytes()):
            return False
    return all(
        getattr(left, name) == getattr(right, name) for name in ("minimum", "maximum", "nans", "infinities", "elements")
    )


@pytest.mark.parametrize("shape", [(24, 6, 5, 7), (24, 40, 3), (24, 7, 3), (24, 5), (24, 33), (24,), (24, 2, 3, 4, 5)])
def test_any_split_into_batches_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    values = RNG.standard_normal(shape, dtype=np.float32) * 100
    for unusual in (np.nan, np.inf, -np.inf, 0.0, -0.0):
        values.reshape(-1)[RNG.choice(values.size, 2)] = unusual
    whole = observed(values)
    for size in (1, 3, 7, 24):
        assert same(whole, observed(*(values[i : i + size] for i in range(0, 24, size))))
    assert same(whole, observed(values[:5], values[5:]))
    finite = np.isfinite(values)
    assert whole.nans == np.isnan(values).sum() and whole.infinities == np.isinf(values).sum()
    assert whole.elements == values.size
    assert (whole.minimum, whole.maximum) == (values[finite].min(), values[finite].max())
    if len(shape) == 1:
        assert whole.channel_minimum is None
    else:
        channels = np.moveaxis(values, 1 if len(shape) >= 4 else -1, 0).reshape(shape[1 if len(shape) >= 4 else -1], -1)
        assert whole.channel_minimum is not None and whole.channel_maximum is not None
        low = [row[np.isfinite(row)].min() for row in channels]
        high = [row[np.isfinite(row)].max() for row in channels]
        assert whole.channel_minimum.tolist() == low and whole.channel_maximum.tolist() == high


@pytest.mark.parametrize("size", [100, 1 << 14, (1 << 18) + 5])
def test_histogram_bins_are_the_upper_halves(size: int) -> None:
    values = RNG.standard_normal(size, dtype=np.float32)
    stats = observed(values)
    expected: dict[int, int] = {}
    for raw in (values.tobytes(),):
        for upper, count in zip(*np.unique(np.frombuffer(raw, "<u2")[1::2], return_counts=True), strict=True):
            expected[int(upper)] = int(count)
    assert dict(zip(stats.bins.tolist(), stats.counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_observed_as_float32(dtype: type) -> None:
    values = NORMAL.astype(dtype)
    assert same(observed(values), observed(values.astype(np.float32)))
    assert observed(np.array([1e300])).infinities == 1


def test_ragged_samples_keep_the_channels_they_share() -> None:
    images = observed(RNG.standard_normal((1, 4, 8, 8), dtype=np.float32), np.ones((1, 4, 5, 9), np.float32))
    assert images.channel_minimum is not None and len(images.channel_minimum) == 4
    scores = observed(np.ones((1, 3, 8), np.float32), np.ones((1, 3, 5), np.float32))
    assert scores.channel_minimum is None and scores.elements == 39


def test_unusual_values_are_reported() -> None:
    cases = {
        "is not a number (NaN) in 2 of its 3 values, which were left out": [np.nan, np.nan, 1.0],
        "is infinite in 2 of its 3 values, which were left out": [np.inf, -np.inf, 1.0],
        "was empty in every sample": [],
        "was 2.5 everywhere, so its range says little": [2.5, 2.5],
        "was 0 everywhere, so its range says little": [0.0, -0.0],
    }
    for problem, values in cases.items():
        assert problem in list(observed(np.array(values, np.float32)).problems())
    assert not list(observed(NORMAL).problems())


@pytest.mark.parametrize("method", ranges.METHODS)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (0, 0)), ([0.0, -0.0], (0, 0)), ([np.nan], (0, 0)), ([np.inf, -np.inf], (0, 0)),
        ([2.5] * 9, (0, 2.5)), ([-2.5, np.nan], (-2.5, 0)), ([1e-40], (0, 1e-40)), ([3e38, -3e38], (-3e38, 3e38)),
    ],
)  # fmt: skip
def test_degenerate_tensors_have_a_range(method: str, values: list[float], expected: tuple[float, float]) -> None:
    low, high = observed(np.array(values, np.float32)).range(method)
    assert low == pytest.approx(expected[0], rel=2e-2) and high == pytest.approx(expected[1], rel=2e-2)


@pytest.mark.parametrize("name", TENSORS)
def test_minmax_is_exact(name: str) -> None:
    values = TENSORS[name]
    assert observed(values).range("minmax") == (min(values.min(), 0), max(values.max(), 0))


@pytest.mark.parametrize("name", TENSORS)
def test_percentile_is_numpys_within_a_bin(name: str) -> None:
    values = TENSORS[name].astype(np.float64)
    low, high = observed(TENSORS[name]).range("percentile")
    wanted = np.percentile(values, [0.005, 99.995], method="inverted_cdf")
    assert low == pytest.approx(min(wanted[0], 0), rel=1 / 64)
    assert high == pytest.approx(max(wanted[1], 0), rel=1 / 64)


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "few"])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.03])
def test_predicted_error_is_that_of_quantizing_every_value(name: str, share: float) -> None:
    values, stats = TENSORS[name], observed(TENSORS[name])
    low, high = (share * end for end in stats.range("minmax"))
    error = mean_squared_error(values, low, high)
    signal = float(np.mean(values.astype(np.float64) ** 2))
    predicted = stats.sqnr_db(low, high)
    assert predicted is not None
    assert predicted == pytest.approx(10 * log10(signal / error), abs=0.1)


def test_no_signal_or_no_range_has_no_ratio() -> None:
    assert observed(np.zeros(4, np.float32)).sqnr_db(-1, 1) is None
    assert observed(NORMAL).sqnr_db(0, 0) is None


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "few"])
def test_mse_is_as_good_as_brute_force(name: str) -> None:
    values = TENSORS[name]
    low, high = observed(values).range("mse")
    ends = [np.linspace(0.04, 1, 25) * end if end else [0.0] for end in (min(values.min(), 0), max(values.max(), 0))]
    least = min(mean_squared_error(values, a, b) for a in ends[0] for b in ends[1])
    assert mean_squared_error(values, low, high) <= least * 1.02


def naive_entropy(stats: TensorStats, levels: int = 256) -> tuple[float, float]:
    """The definition in `ranges.entropy`, spelled out bin by bin."""
    low, high = min(stats.minimum or 0.0, 0.0), max(stats.maximum or 0.0, 0.0)
    width = max(-low, high) / ranges.ENTROPY_BINS
    below, above = int(np.ceil(-low / width - 1e-9)), int(np.ceil(high / width - 1e-9))
    bins = [0.0] * (below + above)
    values = zip(stats.bins.tolist(), stats.counts.tolist(), strict=True)
    for upper, count in values:
        if upper & 0x7FFF == 0:
            continue
        inner, outer = (np.array([(upper & 0x7FFF) + i << 16], np.uint32).view(np.float32)[0] for i in (0, 1))
        left, right = (-float(outer), -float(inner)) if upper >= 0x8000 else (float(inner), float(outer))
        left, right = max(left, stats.minimum or 0.0), min(right, stats.maximum or 0.0)
        position = left
        while position < right:  # share the count among the linear bins that the bfloat16 bin overlaps
            index = int(np.floor(position / width + 1e-9))
            end = min(right, (index + 1) * width)
            bins[min(index + below, len(bins) - 1)] += count * (end - position) / (right - left)
            position = end if end > position else right
    best, least = 0, float("inf")
    for t in ranges.entropy_thresholds(below, above, levels):
        start, stop = max(below - t, 0), min(below + t, len(bins))
        inside = bins[start:stop]
        true = list(inside)
        true[0] += sum(bins[:start])
        true[-1] += sum(bins[stop:])
        cells: list[list[int]] = [[] for _ in range(levels)]
        for j in range(len(inside)):
            cells[j * levels // len(inside)].append(j)
        quantized = [0.0] * len(inside)
        for cell in cells:
            filled = [j for j in cell if true[j] > 0]
            for j in filled:
                quantized[j] = sum(inside[k] for k in cell) / len(filled)
        total, spread = sum(true), sum(quantized)
        divergence = sum(
            p / total * log(p / total / max(q / spread, 1e-9)) for p, q in zip(true, quantized, strict=True) if p > 0
        )
        if divergence < least:
            best, least = t, divergence
    return max(low, -best * width), min(high, best * width)


@pytest.mark.parametrize("name", ["normal", "relu", "silu", "outlier", "negative"])
def test_entropy_finds_the_threshold_of_the_naive_search(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "ENTROPY_BINS", 1024)
    stats = observed(TENSORS[name][-4000:])
    assert stats.range("entropy") == pytest.approx(naive_entropy(stats), rel=0.021)


def test_a_few_distinct_values_are_not_clipped() -> None:
    assert observed(np.repeat(np.array([0.0, 1.0, 2.0, 3.0], np.float32), 50)).range("entropy") == (0, 3)


@pytest.mark.parametrize("name", [*TENSORS])
@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_clipping_stays_within_the_tensors_own_range(name: str, method: str) -> None:
    stats = observed(TENSORS[name])
    widest = stats.range("minmax")
    low, high = stats.range(method)
    assert widest[0] <= low <= 0 <= high <= widest[1] and low < high


def test_clipping_methods_cut_off_an_outlier_and_minmax_does_not() -> None:
    stats = observed(np.concatenate([NORMAL, np.array([60], np.float32)]))
    assert stats.range("minmax")[1] == 60
    ratio: Callable[[str], float] = lambda method: stats.sqnr_db(*stats.range(method)) or 0.0  # noqa: E731
    assert all(stats.range(method)[1] < 30 for method in ("percentile", "entropy"))
    assert stats.range("mse")[1] < 59
    assert ratio("mse") > max(map(ratio, ("percentile", "entropy", "minmax")))


@pytest.mark.parametrize(("below", "above"), [(8192, 8192), (0, 8192), (200, 8192), (5, 8192), (8192, 0), (100, 100)])
def test_thresholds_leave_a_bin_for_each_level(below: int, above: int) -> None:
    found = ranges.entropy_thresholds(below, above, 256)
    if below + above < 256:
        assert not found
        return
    assert found == sorted(set(found)) and found[-1] == max(below, above)
    windows = [min(t, below) + min(t, above) for t in found]
    assert windows[0] in (256, 257) and min(windows) == windows[0]
