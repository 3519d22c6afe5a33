"""Sizes, durations and lists of names as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from quantcli.errors import UsageError


def lookup(table: Mapping[str, str], kind: str, name: str) -> Any:
    """The module that a table of plug-ins gives a name. Raises UsageError, with the nearest known one, for another."""
    if name not in table:
        raise UsageError(f"Unknown {kind} {name!r}.", suggestion(name, table))
    return import_module(table[name])


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or lists them all."""
    near = get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."


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


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's text without its full stop, or what kind of error it is where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:most].rstrip(".") if text else repr(error)
