"""What earlier searches of a graph tried, so that a later budget is answered without another trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantcli.planning.recipe import Recipe
from quantcli.search.budget import Budget
from quantcli.search.choices import Mix
from quantcli.search.onnx_measured import Measurements
from quantcli.search.onnx_mixes import AS_SMALL, WORTH_TIME, Mixes

#: What is known is small enough where a mix that is smaller by no more than this is known to lose too much.
_SMALL_ENOUGH = 1.05


@dataclass(frozen=True)
class _Tried:
    """A recipe that was judged; ``work`` as `Mixes.work` counts it."""

    recipe: Recipe
    nbytes: int
    work: float
    is_kept: bool


def read_off(
    budget: Budget,
    mixes: Mixes,
    measured: Measurements,
    uniforms: Sequence[tuple[Recipe, float]],
    recipe_of: Callable[[Mix], Recipe],
    *,
    is_settled: bool = False,
) -> Recipe | None:
    """The recipe that keeps a budget's limits on outputs and bytes, as far as it is known without a run.

    Args:
        budget: the limits.
        mixes: what is chosen of.
        measured: what is known.
        uniforms: recipes of one scheme for all layers and their work, the smallest first.
        recipe_of: notes a mix, and makes its recipe.
        is_settled: nothing smaller than what is known is to be expected.

    Returns:
        The recipe, or None: a single scheme that may matter was not judged, nothing is known to keep the limits, or
        what does is more than a twentieth larger than the largest mix below it that is known not to.
    """
    single: _Tried | None = None
    for recipe, work in uniforms:
        is_kept = measured.verdict(budget, recipe)
        if is_kept is None:
            return None
        if is_kept:
            single = _Tried(recipe, measured.size(recipe), work, is_kept)
            break
    tried = [each for mix in measured.mixes() if (each := _tried(budget, mixes, measured, mix, recipe_of))]
    kept = [each for each in tried if each.is_kept and (single is None or _is_better(each, single))]
    fitting = [
        each
        for each in [*kept, *([single] if single else [])]
        if budget.max_size is None or each.nbytes <= budget.max_size
    ]
    smallest = min(fitting, key=lambda each: each.nbytes, default=None)
    if smallest is None:
        return None
    lost = [each.nbytes for each in tried if not each.is_kept and each.nbytes < smallest.nbytes]
    floor = max(lost, default=mixes.nbytes(mixes.least_bytes()))
    if not is_settled and smallest.nbytes > _SMALL_ENOUGH * floor:
        return None
    alike = [each for each in fitting if each.nbytes <= AS_SMALL * smallest.nbytes]
    return min(alike, key=lambda each: (each.work, each.nbytes)).recipe


def _tried(
    budget: Budget, mixes: Mixes, measured: Measurements, mix: Mix, recipe_of: Callable[[Mix], Recipe]
) -> _Tried | None:
    recipe = recipe_of(mix)
    is_kept = measured.verdict(budget, recipe)
    return None if is_kept is None else _Tried(recipe, measured.size(recipe), mixes.work(mix), is_kept)


def _is_better(mix: _Tried, single: _Tried) -> bool:
    """Whether a mix is smaller than a single scheme and has no more work, or much smaller."""
    return mix.nbytes < single.nbytes and (mix.work <= single.work or mix.nbytes <= WORTH_TIME * single.nbytes)
