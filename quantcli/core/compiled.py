"""Whether the compiled loops of `quantcli.core.loops` are used: where numba is installed, for many weights.

`quantcli.core.numerics` and `quantcli.core.packing` ask here; without the loops they take torch's own operations, which
give the same codes.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Weights from which on the loops save more than the time that it takes to import them.
WORTHWHILE = 1 << 26
#: Values below which a call of torch is as quick.
_FEW = 1 << 10


class _InUse:
    """The loops that are in use, in the whole process: they are chosen once, by the first large model."""

    loops: ModuleType | None = None


def use_for(weights: int) -> bool:
    """From now on use the loops, if a model of so many weights is worth it; whether they are in use."""
    if _InUse.loops is None and weights >= WORTHWHILE and importlib.util.find_spec("numba"):
        from quantcli.core import loops

        _InUse.loops = loops
    return _InUse.loops is not None


def stop() -> None:
    """Use torch's operations again."""
    _InUse.loops = None


def loops_for(values: Tensor) -> ModuleType | None:
    """The loops, where they are in use and take these values; else None."""
    if _InUse.loops is None or values.numel() < _FEW or values.requires_grad or not values.is_contiguous():
        return None
    return _InUse.loops if values.device.type == "cpu" else None
