"""The solver against all mixes that there are."""

from __future__ import annotations

import os
import time
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.search.choices import Choice, Group, chosen, rules_of, total
from quantcli.search.solver import best_mix, best_mixes
from quantcli.system.files import silent_stdout


def group(name: str, *choices: tuple[int, float]) -> Group:
    return Group((name,), tuple(Choice(str(n), (("scheme", str(n)),), *each) for n, each in enumerate(choices)))


PAIRS = st.tuples(st.integers(1, 1_000_000_000), st.floats(0, 1, allow_subnormal=False).map(lambda x: round(x, 6)))
GROUPS = st.lists(st.lists(PAIRS, min_size=1, max_size=3), min_size=1, max_size=7).map(
    lambda rows: [group(f"layer{n}", *row) for n, row in enumerate(rows)]
)


@settings(max_examples=40, deadline=None)
@given(GROUPS, st.floats(0, 1))
def test_nothing_better_is_found_by_trying_all(groups: list[Group], share: float) -> None:
    mixes = list(product(*(range(len(each.choices)) for each in groups)))
    sizes = [total(groups, mix, "nbytes") for mix in mixes]
    limit = min(sizes) + share * (max(sizes) - min(sizes))
    found = best_mix(groups, "cost", {"nbytes": limit})
    assert found is not None
    assert total(groups, found, "nbytes") <= limit
    least = min(total(groups, mix, "cost") for mix, size in zip(mixes, sizes, strict=True) if size <= limit)
    assert total(groups, found, "cost") <= least + 1e-6


def test_the_smallest_within_a_cost() -> None:
    groups = [group("a", (100, 0.5), (200, 0.1)), group("b", (100, 0.2), (300, 0.0))]
    assert best_mix(groups, "nbytes", {"cost": 0.31}) == (1, 0)
    assert best_mix(groups, "nbytes", {"cost": 0.05}) is None
    assert best_mix(groups, "cost", {"nbytes": 199}) is None


def test_a_ceiling_is_one_to_the_last_byte() -> None:
    """The solver itself takes a millionth of the largest size for nothing, which is two bytes here."""
    groups = [group("a", (1, 0.0), (2_000_001, 0.0)), group("b", (1, 1.0), (3, 0.0))]
    assert best_mix(groups, "cost", {"nbytes": 2}) == (0, 0)


def test_mixes_come_in_order_and_once() -> None:
    groups = [group("a", (1, 0.3), (2, 0.1)), group("b", (1, 0.25), (2, 0.0))]
    found = list(best_mixes(groups, "cost", {"nbytes": 4}, count=9))
    costs = [total(groups, mix, "cost") for mix in found]
    assert costs == sorted(costs)
    assert costs == pytest.approx([0.1, 0.3, 0.35, 0.55])


def test_rules_name_layers_that_are_stored_alike() -> None:
    groups = [group("a", (1, 0.3), (2, 0.1)), group("b", (1, 0.2), (2, 0.0)), group("c", (1, 0.0))]
    assert rules_of(groups, (0, 1, 0)) == [
        {"match": ["a", "c"], "scheme": "0"},
        {"match": ["b"], "scheme": "1"},
    ]
    assert [choice.label for choice in chosen(groups, (0, 1, 0))] == ["0", "1", "0"]


def test_what_the_solver_prints_never_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with silent_stdout():
        os.write(1, b"for its makers\n")
    os.write(1, b"data\n")
    assert capfd.readouterr().out == "data\n"


def test_many_groups_are_chosen_for_in_seconds() -> None:
    random = Random(0)
    rows = [[(random.randint(1, 10**6), random.random()) for _ in range(5)] for _ in range(600)]
    groups = [group(f"layer{n}", *row) for n, row in enumerate(rows)]
    limit = sum(min(size for size, _ in row) for row in rows) * 1.5
    started = time.process_time()
    found = best_mix(groups, "cost", {"nbytes": limit})
    assert found is not None and total(groups, found, "nbytes") <= limit
    assert time.process_time() - started < 20
