"""The best mix under limits: an integer program, solved by HiGHS through SciPy.

One choice of each group is taken (a multiple-choice knapsack, Sinha and Zoltners 1979).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from quantcli.search.choices import Group, Mix, total
from quantcli.system.files import silent_stdout

#: Up to so many groups the very best mix is found; of more the proof could take hours, and one that is worse by no
#: more than this share is as good, estimates being what they are.
_EXACT_GROUPS, _GAP = 64, 1e-4

Column = Literal["nbytes", "cost", "milliseconds"]


def best_mix(
    groups: Sequence[Group],
    minimize: Column,
    limits: Mapping[Column, float],
    *,
    without: Sequence[Mix] = (),
    seconds: float | None = None,
) -> Mix | None:
    """The mix with the least sum of one column whose sums of others stay within limits; None where none does.

    Args:
        groups: what is chosen of.
        minimize: the column whose sum is to be least.
        limits: the most that sums of columns may be.
        without: mixes that are not to be found again.
        seconds: the most time to take; what was found by then need not be the best.
    """
    if not groups:
        return () if all(limit >= 0 for limit in limits.values()) and not without else None
    excluded = list(without)
    while True:
        mix = _solve(groups, minimize, limits, excluded, seconds)
        # The solver takes a millionth of a limit for nothing; a ceiling is one to the last byte.
        if mix is None or all(total(groups, mix, name) <= limit for name, limit in limits.items()):
            return mix
        excluded.append(mix)


def _solve(
    groups: Sequence[Group],
    minimize: Column,
    limits: Mapping[Column, float],
    without: Sequence[Mix],
    seconds: float | None,
) -> Mix | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    owner = np.repeat(np.arange(len(groups)), [len(group.choices) for group in groups])
    first = np.concatenate([[0], np.cumsum([len(group.choices) for group in groups])])
    count = len(owner)

    def column(name: Column) -> Any:
        return np.array([getattr(choice, name) for group in groups for choice in group.choices], np.float64)

    one_each = csr_array((np.ones(count), (owner, np.arange(count))), shape=(len(groups), count))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        # Scaled so that the solver's tolerance, which is absolute, means the same for bytes and for nats.
        scale = max(float(np.abs(column(name)).max()), 1e-300)
        constraints.append(LinearConstraint(column(name)[None] / scale, -np.inf, limit / scale))
    for mix in without:
        taken = np.zeros((1, count))
        taken[0, first[:-1] + np.array(mix)] = 1
        constraints.append(LinearConstraint(taken, -np.inf, len(groups) - 1))
    objective = column(minimize)
    gap = 0.0 if len(groups) <= _EXACT_GROUPS else _GAP
    options: dict[str, Any] = {"mip_rel_gap": gap} | ({} if seconds is None else {"time_limit": seconds})
    with silent_stdout():
        found = milp(
            objective / max(float(np.abs(objective).max()), 1e-300),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options=options,
        )
    if found.x is None:
        return None
    return tuple(int(found.x[first[index] : first[index + 1]].argmax()) for index in range(len(groups)))


def best_mixes(
    groups: Sequence[Group], minimize: Column, limits: Mapping[Column, float], *, count: int
) -> Iterator[Mix]:
    """The best mixes in their order, at most ``count`` of them; one is searched for when it is asked for."""
    found: list[Mix] = []
    while len(found) < count and (mix := best_mix(groups, minimize, limits, without=found)) is not None:
        found.append(mix)
        yield mix
