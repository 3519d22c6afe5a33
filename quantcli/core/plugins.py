"""Tables of plug-ins: members of a family by name, each a module that is imported when it is first used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcli.system.text import lookup


@dataclass(frozen=True)
class Entry:
    """What can be told of a plug-in without importing its ``module``: one line of ``help``, without a full stop."""

    module: str
    help: str


def load(table: Mapping[str, Entry], kind: str, name: str) -> Any:
    """The module of a name. Raises UsageError, with the nearest known one, for another."""
    return lookup({known: entry.module for known, entry in table.items()}, kind, name)
