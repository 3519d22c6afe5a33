"""Latency of functions side by side: interleaved rounds, percentiles, and speed-ups with confidence intervals."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from time import perf_counter_ns

import numpy as np

#: What is measured where the user names no number of rounds: so long per function, within these bounds.
BUDGET_NS = 3_000_000_000
MIN_ROUNDS, MAX_ROUNDS = 20, 400

#: A turn of a fast function takes about so long, so that a round outlasts the clock's and scheduler's grain.
_TURN_NS = 5_000_000
_MAX_CALLS = 20
_WARM_UP_NS = 200_000_000

_RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Timing:
    """Times of one function in ns: one row per round ``[rounds, calls]``."""

    ns: np.ndarray

    @property
    def rounds(self) -> np.ndarray:
        """Median of every round, ns ``[rounds]``."""
        return np.asarray(np.median(self.ns, axis=1))

    def percentile_ms(self, percent: float) -> float:
        """A percentile over all calls, in ms."""
        return float(np.percentile(self.ns, percent)) / 1e6

    def per_second(self, samples: int) -> float:
        """Throughput where every call handles so many samples."""
        return samples * self.ns.size / (float(self.ns.sum()) / 1e9)


@dataclass(frozen=True)
class Speedup:
    """How many times faster than the reference, with a confidence interval of 95%."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, or ``no difference`` where the interval holds 1."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference"


def speedup(reference: Timing, candidate: Timing, seed: int = 0) -> Speedup:
    """Median over rounds of the reference's time by the candidate's.

    Times are paired by round, since what disturbs a round disturbs both; on a busy machine, where times have
    two modes, the ratio of two medians may compare one mode with the other. The interval is the percentile
    bootstrap (Efron 1979) over rounds.
    """
    ratios = reference.rounds / candidate.rounds
    picks = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(np.median(ratios[picks], axis=1), [tail, 100 - tail])
    return Speedup(float(np.median(ratios)), float(low), float(high))


def time_interleaved(
    functions: Sequence[Callable[[int], object]],
    *,
    rounds: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Timing]:
    """Time functions in rounds, every function once per round, in an order shuffled by ``seed``.

    A turn is one call that is not counted, which brings caches and threads back to this function, and then a
    few that are: one where a call is long, up to 20 where it is short. Garbage is not collected meanwhile.

    Args:
        functions: each is called with the number of the round.
        rounds: by default about three seconds for each function, and no less than 20 rounds.
        seed: what the order is shuffled by.
        progress: called with rounds done and rounds in all.
    """
    typical = [_warm_up(function) for function in functions]
    calls = [min(_MAX_CALLS, max(1, _TURN_NS // each)) for each in typical]
    if rounds is None:
        one_round = sum(each * (count + 1) for each, count in zip(typical, calls, strict=True))
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, ceil(BUDGET_NS * len(functions) / one_round)))
    taken = [np.empty((rounds, count), dtype=np.int64) for count in calls]
    generator, order = random.Random(seed), list(range(len(functions)))
    with _no_garbage_collection():
        for number in range(rounds):
            generator.shuffle(order)
            for index in order:
                function = functions[index]
                function(number)
                for call in range(calls[index]):
                    start = perf_counter_ns()
                    function(number)
                    taken[index][number, call] = perf_counter_ns() - start
            if progress:
                progress(number + 1, rounds)
    return [Timing(each) for each in taken]


def _warm_up(function: Callable[[int], object]) -> int:
    """Call a function a few times; what a call takes then, in ns."""
    started = perf_counter_ns()
    function(0)
    taken: list[int] = []
    while len(taken) < 2 or perf_counter_ns() - started < _WARM_UP_NS:
        start = perf_counter_ns()
        function(len(taken))
        taken.append(perf_counter_ns() - start)
    return max(1, int(np.median(taken)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
