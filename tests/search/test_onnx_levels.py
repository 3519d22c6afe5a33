"""The level of noise that keeps a limit is found exactly, and in few trials near to what was expected."""

from __future__ import annotations

import pytest

from quantcli.search.clock import Clock, Pace
from quantcli.search.onnx_levels import LevelSearch
from quantcli.search.onnx_mixes import LEVELS, level_of


def tried(search: LevelSearch, first_kept: int) -> list[int]:
    found = []
    while (level := search.next) is not None and len(found) <= LEVELS:
        found.append(level)
        search.tell(level, is_kept=level >= first_kept)
    return found


@pytest.mark.parametrize("noise", [None, 1e3, 1.0, 2e-3, 1e-12])
def test_every_level_is_found(noise: float | None) -> None:
    for first in range(LEVELS):
        levels = tried(LevelSearch(noise), first)
        assert min(level for level in levels if level >= first) == first
        assert len(levels) == len(set(levels)) <= 16
    assert not [level for level in tried(LevelSearch(noise), LEVELS) if level >= LEVELS]


def test_a_limit_near_to_what_was_expected_takes_few_trials_of_levels_near_by() -> None:
    expected = level_of(1.6e-3)
    for first in range(expected - 3, expected + 4):
        levels = tried(LevelSearch(1.6e-3), first)
        assert len(levels) <= 5
        assert max(abs(level - first) for level in levels) <= 8


def test_no_level_is_tried_twice_even_where_answers_contradict_each_other() -> None:
    for noise in (None, 1.6e-3):
        for first in (False, True):
            search, levels = LevelSearch(noise), []
            while (level := search.next) is not None and len(levels) <= LEVELS:
                levels.append(level)
                search.tell(level, is_kept=(len(levels) % 3 == 0) != first)
            assert len(levels) == len(set(levels)) <= LEVELS


def test_a_clock_tells_whether_something_ends_in_time() -> None:
    assert Clock().has_room_for(1e9)
    assert Clock(60.0).has_room_for(30.0)
    assert not Clock(60.0).has_room_for(61.0)


def test_what_is_known_of_levels_is_not_tried_again() -> None:
    search = LevelSearch(1.6e-3)
    expected = level_of(1.6e-3)
    search.know(expected + 1, is_kept=True)
    search.know(expected - 1, is_kept=False)
    assert tried(search, expected) == [expected]
    settled = LevelSearch(1.6e-3)
    settled.settle()
    assert settled.next is None


def test_a_trial_is_begun_only_where_it_and_what_follows_it_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = Clock(60.0, 0.0)
    pace = Pace(clock)
    assert pace.has_time()
    with pace.trial():
        now = 15.0
    assert pace.has_time() and not clock.is_half_over()
    now = 31.0
    assert not pace.has_time() and clock.is_half_over()
    assert Pace(Clock(None, 0.0)).has_time() and not Clock(None, 0.0).is_half_over()
