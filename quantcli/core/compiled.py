"""Whether the compiled loops of `quantcli.core.loops` are used: where numba is installed, and they pay.

`quantcli.core.numerics` and `quantcli.core.packing` ask here; without the loops they take torch's own operations, which
give the same codes.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Weights from which on the loops save more than the second or two that importing them takes. For 1e9 weights (2 GB)
#: NF4, whose codes torch looks for, takes 10 s in place of 23 s; integers, rounded to nearest, take 1.9 s of processor
#: time for their codes, errors and bytes in place of 3.5 s.
WORTHWHILE_NF4, WORTHWHILE_INTEGERS = 1 << 26, 1 << 30
#: What numba and its compiler take of memory.
NBYTES = 130 << 20
#: Values below which a call of torch is as quick.
_FEW = 1 << 10


class _InUse:
    """The loops that are in use, in the whole process."""

    loops: ModuleType | None = None


def pays(*, nf4: int, integers: int) -> bool:
    """Whether a model is worth the loops: of so many weights that become NF4, and that become integers."""
    worthwhile = nf4 >= WORTHWHILE_NF4 or integers >= WORTHWHILE_INTEGERS
    return worthwhile and importlib.util.find_spec("numba") is not None


def use() -> None:
    """From now on use the loops. Raises ImportError without numba."""
    from quantcli.core import loops

    _InUse.loops = loops


def stop() -> None:
    """Use torch's operations again."""
    _InUse.loops = None


def loops_for(values: Tensor) -> ModuleType | None:
    """The loops, where they are in use and take these values; else None."""
    if _InUse.loops is None or values.numel() < _FEW or values.requires_grad or not values.is_contiguous():
        return None
    return _InUse.loops if values.device.type == "cpu" else None
