"""Bounds of a loss, against intervals that SciPy and simulation give."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from quantcli.search.bounds import drop_of


def test_equal_answers_on_few_samples_show_little() -> None:
    drop = drop_of([0.0] * 100)
    assert drop.mean == 0
    # The rule of three.
    assert drop.bound == pytest.approx(0.03, abs=0.001)
    assert 299 <= (drop.samples_for(0.01) or 0) <= 301


def test_a_rate_is_bounded_as_by_clopper_and_pearson() -> None:
    losses = [1.0] * 3 + [0.0] * 97
    exact = binomtest(3, 100).proportion_ci(0.9, method="exact").high
    assert drop_of(losses).bound == pytest.approx(exact, abs=1e-6)


def test_the_bound_holds_in_95_of_100_cases() -> None:
    random = np.random.default_rng(0)
    true = 0.02
    held = sum(drop_of(list(random.normal(true, 0.1, 40))).bound >= true for _ in range(2000))
    assert 0.93 < held / 2000 < 0.97
    flips = [drop_of([float(x) for x in random.choice([1, -1, 0], 200, p=[0.04, 0.02, 0.94])]) for _ in range(1000)]
    assert sum(drop.bound >= true for drop in flips) / 1000 > 0.94


def test_more_samples_are_asked_for_only_where_they_would_help() -> None:
    assert drop_of([0.05] * 10).samples_for(0.01) is None
    assert drop_of([0.3]).bound > 1e9
    # Twice the room, a quarter of the samples.
    losses = [0.5, -0.5] * 50
    narrow, wide = drop_of(losses).samples_for(0.01), drop_of(losses).samples_for(0.02)
    assert narrow is not None and wide is not None
    assert narrow == pytest.approx(4 * wide, rel=0.01)
