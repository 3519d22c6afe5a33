"""Where samples come from: a kind of DATA is one file, and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from quantcli.data.sources.base import SourceKind

SOURCES = {
    "arrays": "quantcli.data.sources.arrays",
    "images": "quantcli.data.sources.images",
    "sounds": "quantcli.data.sources.sounds",
    "texts": "quantcli.data.sources.texts",
    "illustrated texts": "quantcli.data.sources.illustrated_texts",
    "functions": "quantcli.data.sources.functions",
}


def source_kinds() -> dict[str, SourceKind]:
    """All kinds of DATA, by what they hold."""
    return {name: cast("SourceKind", import_module(module)) for name, module in SOURCES.items()}


def kinds_of(data: str) -> dict[str, SourceKind]:
    """The kinds that DATA is of: one, unless it is missing, unknown, or a folder of several."""
    return {name: kind for name, kind in source_kinds().items() if kind.accepts(data)}


def is_text(data: str) -> bool:
    """Whether DATA becomes tokens."""
    return any(kind.IS_TEXT for kind in kinds_of(data).values())
