"""Sizes, durations and lists of names as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FACTORS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """``80MB`` -> 80000000, ``1.5GiB`` -> 1610612736. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _FACTORS:
        raise ValueError(f"{text!r} is not a size such as 80MB or 1.5GiB")
    return round(float(match[1]) * _FACTORS[match[2]])


def format_bytes(count: float) -> str:
    """1610612736 -> ``1.61 GB``."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * factor:
            return f"{float(f'{count / factor:.3g}'):g} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """75.2 -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names of many, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
