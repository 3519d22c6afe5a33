"""Libraries of custom operators, which every session of onnxruntime registers: those that the user names, no others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from quantcli.errors import InputError

_registered: list[Path] = []


def register(libraries: Iterable[Path]) -> None:
    """Make sessions that are opened from now on register these libraries, in place of those named before.

    Raises:
        InputError: one is missing, or onnxruntime cannot load it.
    """
    found = [library.resolve() for library in libraries]
    for library in found:
        from quantcli.models.session import require_loadable

        if not library.is_file():
            what = "is not a file" if library.exists() else "does not exist"
            raise InputError(f"{library}, named by --custom-ops, {what}.")
        require_loadable(library)
    _registered[:] = found


def registered() -> tuple[Path, ...]:
    """The libraries, in the order in which they were named."""
    return tuple(_registered)
