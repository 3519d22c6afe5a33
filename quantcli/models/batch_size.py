"""How many samples a model runs on at a time where its inputs leave that open: some run on one number only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from quantcli.errors import InputError

if TYPE_CHECKING:
    import numpy as np

#: Numbers of samples that are tried in turn: the small ones, and what people export models with.
SIZES: tuple[int, ...] = (*range(1, 17), 20, 24, 32, 48, 50, 64, 96, 100, 128, 256)


def least_batch_size(
    run: Callable[[Mapping[str, np.ndarray]], object],
    feeds: Callable[[int], Mapping[str, np.ndarray] | None],
    most: int | None = None,
) -> int | None:
    """The least number of samples that a model runs on, of those that are tried; None where there is none.

    A graph whose batch axis is free may have been traced with one size: a Reshape or a state in it then fits no other.

    Args:
        run: runs the model; an InputError says that it does not run.
        feeds: so many samples, or None where there are not as many.
        most: how many there are, if that is known: all of them are tried last.
    """
    sizes = SIZES if most is None else (*(size for size in SIZES if size < most), most)
    for size in sizes:
        arrays = feeds(size)
        if arrays is None:
            return None
        try:
            run(arrays)
        except InputError:
            continue
        return size
    return None
