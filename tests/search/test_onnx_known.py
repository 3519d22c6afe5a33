"""A later budget is read off what was judged before, as long as that says enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from quantcli.planning.recipe import Recipe
from quantcli.search.budget import Budget
from quantcli.search.choices import Choice, Group, Mix
from quantcli.search.onnx_known import read_off
from quantcli.search.onnx_measured import Measurements
from quantcli.search.onnx_mixes import Mixes
from quantcli.search.onnx_ways import Ways

WAYS = Ways(Recipe(), {}, {}, 0)
#: One layer with a choice for each 10 bytes, from 500 to 1000; the larger it is the less work it takes.
SIZES = range(500, 1001, 10)
MIXES = Mixes(WAYS, [Group(("layer",), tuple(Choice(str(n), (), n, 0.0, 2000 - n) for n in SIZES))])
SINGLE = Recipe(group_size=16)


def recipe_of(mix: Mix) -> Recipe:
    return Recipe(group_size=SIZES[mix[0]])


@dataclass
class Known:
    """What is known: whether a recipe of so many bytes keeps the limits. ``single`` is that of the single scheme."""

    judged: dict[int, bool]
    single: tuple[int, bool | None] = (2000, True)

    def mixes(self) -> list[Mix]:
        return [(SIZES.index(size),) for size in self.judged]

    def size(self, recipe: Recipe) -> int:
        return self.single[0] if recipe == SINGLE else int(recipe.group_size or 0)

    def verdict(self, budget: Budget, recipe: Recipe) -> bool | None:
        return self.single[1] if recipe == SINGLE else self.judged[self.size(recipe)]


def read(known: Known, most: int | None = None, work: float = 2000.0, *, is_settled: bool = False) -> int | None:
    """Bytes of what is read off."""
    budget = Budget(max_drop=0.01, max_size=most)
    found = read_off(budget, MIXES, cast(Measurements, known), [(SINGLE, work)], recipe_of, is_settled=is_settled)
    return None if found is None else known.size(found)


def test_the_smallest_that_is_known_to_keep_the_limit_is_taken() -> None:
    assert read(Known({1000: True, 800: True, 770: False, 600: False})) == 800


def test_where_much_may_be_gained_it_is_looked_for() -> None:
    assert read(Known({1000: True, 800: True, 760: False})) is None
    assert read(Known({1000: True, 800: True})) is None
    assert read(Known({1000: True, 800: True}), is_settled=True) == 800


def test_the_smallest_mix_of_all_needs_none_below_it() -> None:
    assert read(Known({500: True, 1000: True})) == 500


def test_of_those_that_are_about_as_small_the_one_with_the_least_work_is_taken() -> None:
    assert read(Known({800: True, 810: True, 820: True, 770: False})) == 810


@pytest.mark.parametrize(("size", "found"), [(880, 880), (900, 800)])
def test_a_mix_that_is_slower_than_a_single_scheme_has_to_be_much_smaller(size: int, found: int) -> None:
    assert read(Known({800: True, 870: False, 790: False}, single=(size, True)), work=1000.0) == found


def test_a_single_scheme_that_was_not_judged_may_matter() -> None:
    assert read(Known({800: True, 770: False}, single=(2000, None))) is None


def test_a_ceiling_on_bytes_is_kept() -> None:
    known = Known({800: True, 770: False})
    assert read(known, most=800) == 800
    assert read(known, most=799) is None
