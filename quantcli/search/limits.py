"""Limits on outputs, what is lost of each, and how losses are kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import inf
from typing import Any

from quantcli.search.bounds import Drop
from quantcli.search.budget import Budget
from quantcli.search.judge import KL, metric_of, require_kl
from quantcli.system.user_functions import is_function

#: A limit on outputs: the option that sets it, the limit, and what is lost.
Limited = tuple[str, float, Drop]

_PARTS = ("mean", "bound", "samples", "deviation")


def limits_of(budget: Budget, drops: Mapping[str, Drop]) -> list[Limited]:
    """The limits on outputs that a budget sets, with what is lost of each. Raises UsageError for an unknown metric."""
    found = []
    if budget.max_drop is not None:
        found.append(("--max-drop", budget.max_drop, drops[metric_name(budget, drops)]))
    if budget.max_kl is not None:
        require_kl(drops)
        found.append(("--max-kl", budget.max_kl, drops[KL]))
    return found


def metric_name(budget: Budget, drops: Mapping[str, Drop | None]) -> str:
    """The metric that a drop is of; of a function of the user's own the number it returns, or the first of several."""
    metric = budget.metric
    if metric is not None and is_function(metric):
        name = metric.rpartition(":")[2]
        metric = name if name in drops else next(iter(drops), name)
    return metric_of(drops, metric)


def flat(drops: Mapping[str, Drop]) -> dict[str, float | None]:
    """Losses as numbers by ``METRIC PART``; None: infinite."""
    return {
        f"{name} {part}": None if value == inf else value
        for name, drop in drops.items()
        for part, value in asdict(drop).items()
    }


def restored(known: Mapping[str, float | None]) -> dict[str, Drop]:
    """The losses that numbers of `flat` tell of, other numbers among them or not."""
    kept: dict[str, dict[str, Any]] = {}
    for entry, value in known.items():
        name, _, part = entry.rpartition(" ")
        if part in _PARTS:
            kept.setdefault(name, {})[part] = inf if value is None else value
    return {name: Drop(**parts) for name, parts in kept.items()}
