"""Timing: what is measured is what was slept; intervals hold what they should."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from quantcli.benchmarking.timing import MIN_ROUNDS, Timing, speedup, time_interleaved


def test_a_function_is_as_slow_as_it_is() -> None:
    slow, fast = time_interleaved([lambda _: time.sleep(0.01), lambda _: time.sleep(0.004)], rounds=12)
    assert slow.ns.shape == (12, 1)
    assert 10 <= slow.percentile_ms(50) < 30
    assert 4 <= fast.percentile_ms(50) < 20
    assert slow.per_second(8) == pytest.approx(8 / (slow.ns.mean() / 1e9))
    gain = speedup(slow, fast)
    assert 1 < gain.low <= gain.ratio <= gain.high < 4
    assert gain.verdict == "faster"
    assert speedup(fast, slow).verdict == "slower"
    assert speedup(slow, slow).verdict == "no difference"


def test_rounds_are_interleaved_and_uncounted_calls_come_first() -> None:
    seen: list[tuple[str, int, bool]] = []

    def function(name: str) -> object:
        def call(number: int) -> None:
            seen.append((name, number, gc.isenabled()))
            time.sleep(0.006)

        return call

    time_interleaved([function("a"), function("b")], rounds=8)  # type: ignore[list-item]
    timed = seen[-32:]
    assert [number for _, number, _ in timed] == [number for number in range(8) for _ in range(4)]
    assert not any(enabled for _, _, enabled in timed)
    assert gc.isenabled()
    firsts = {timed[4 * number][0] for number in range(8)}
    assert firsts == {"a", "b"}


def test_percentiles_against_sorting() -> None:
    ns = np.random.default_rng(0).integers(1, 10**6, (101, 1))
    timing, ordered = Timing(ns), np.sort(ns.ravel())
    assert [timing.percentile_ms(p) for p in (50, 90, 99)] == pytest.approx([ordered[p] / 1e6 for p in (50, 90, 99)])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        load = generator.uniform(1, 3, 60)  # a busy machine slows both of a round
        ours = load * 2e6 * generator.lognormal(0, 0.1, 60)
        theirs = load * 1e6 * generator.lognormal(0, 0.1, 60)
        found = speedup(Timing(ours[:, None]), Timing(theirs[:, None]), seed)
        held += found.low <= 2 <= found.high
    assert 0.88 <= held / 200 <= 1


def test_fast_functions_are_called_several_times_a_round() -> None:
    (timing,) = time_interleaved([lambda _: None], rounds=MIN_ROUNDS)
    assert timing.ns.shape == (MIN_ROUNDS, 20)
