"""Why no artifact keeps a budget, and the nearest that can be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, isfinite, log10
from typing import Any

from quantcli.errors import BudgetError
from quantcli.search.budget import Budget
from quantcli.search.limits import Limited
from quantcli.system.text import format_bytes


def too_large(budget: Budget, nbytes: int, candidates: Sequence[Any]) -> BudgetError:
    """The smallest artifact has more bytes than are allowed."""
    together = " together with the other limits" if len(budget.ceilings) > 1 else ""
    return BudgetError(
        f"--max-size {format_bytes(budget.max_size or 0)} cannot be met{together}: the smallest found with "
        f"{', '.join(budget.allow)} has {nbytes} bytes ({format_bytes(nbytes)}).",
        f"The nearest that can be met: --max-size {nbytes}",
        _told(budget, {"max_size": nbytes}, candidates),
    )


def too_slow(budget: Budget, milliseconds: float, candidates: Sequence[Any]) -> BudgetError:
    """The fastest artifact takes longer than is allowed."""
    # It will be measured again, and not be the same to the last digit.
    near = above(1.1 * milliseconds)
    return BudgetError(
        f"--max-latency-p50 {budget.max_latency_p50:g}ms cannot be met: the fastest found takes {milliseconds:.3g} ms.",
        f"The nearest that can be met: --max-latency-p50 {near}ms",
        _told(budget, {"max_latency_p50": float(near)}, candidates),
    )


def too_few_samples(budget: Budget, limited: Limited, candidates: Sequence[Any]) -> BudgetError:
    """A loss is small, and the samples do not show that it is small enough."""
    option, limit, drop = limited
    more, near = drop.samples_for(limit), above(drop.bound)
    return BudgetError(
        f"{drop.samples} samples are too few to show that {option} {limit:g} is kept: the loss is {drop.mean:.3g}, "
        f"and could be {drop.bound:.3g}.",
        f"About {more} samples would do; or allow {option} {near}.",
        _told(budget, {"samples": more or 0, _key(option): float(near)}, candidates),
    )


def loses_too_much(budget: Budget, limits: Sequence[Limited], candidates: Sequence[Any]) -> BudgetError:
    """What loses least loses too much, or is not seen to lose less; ``limits`` are of that."""
    for limited in limits:
        _, limit, drop = limited
        if drop.bound > limit and drop.samples_for(limit) is not None:
            return too_few_samples(budget, limited, candidates)
    option, limit, drop = next(each for each in limits if each[2].bound > each[1])
    return BudgetError(
        f"{option} {limit:g} cannot be met with {', '.join(budget.allow)}: the least loss found is {drop.mean:.3g} "
        f"(at most {drop.bound:.3g}).",
        f"The nearest that can be met: {option} {above(drop.bound)}",
        _told(budget, {_key(option): float(above(drop.bound))}, candidates),
    )


def _told(budget: Budget, nearest: Mapping[str, float], candidates: Sequence[Any]) -> dict[str, Any]:
    return {"asked": budget.ceilings, "nearest": dict(nearest), "candidates": list(candidates)}


def _key(option: str) -> str:
    return option.strip("-").replace("-", "_")


def above(value: float) -> str:
    """A number of three digits that is no less."""
    if not isfinite(value) or value <= 0:
        return f"{value:g}"
    step = 10.0 ** (floor(log10(value)) - 2)
    return f"{ceil(value / step) * step:.6g}"
