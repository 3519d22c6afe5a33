"""How much memory a conversion may take, where the user limits it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from quantcli.errors import UsageError
from quantcli.system.text import format_bytes

#: What the libraries that convert a graph take before the first weight: torch, onnx, onnxruntime and what they load.
LIBRARIES_BYTES = 440 << 20

#: Weights that the runtime is given at a time; its copies of these and the libraries are less than a gigabyte.
_PIECE_BYTES = 128 << 20

#: Bytes of memory for each byte of a weight: itself, and what is made of it here, or for a kernel by the runtime.
_COPIES = 3

_limit: ContextVar[int | None] = ContextVar("_limit", default=None)


@contextmanager
def within_memory(limit: int | None) -> Iterator[None]:
    """Let `piece_bytes` and `require_memory` heed a limit in bytes meanwhile; None: no limit."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def memory_limit() -> int | None:
    """Bytes that must not be exceeded within `within_memory`."""
    return _limit.get()


def piece_bytes() -> int:
    """Bytes of a graph's weights that may be in memory at a time."""
    limit = _limit.get()
    return _PIECE_BYTES if limit is None else max(1, min(_PIECE_BYTES, (limit - LIBRARIES_BYTES) // _COPIES))


def require_memory(name: str, nbytes: int) -> None:
    """Raise UsageError where a weight of so many bytes does not fit into the limit."""
    limit, needed = _limit.get(), LIBRARIES_BYTES + _COPIES * nbytes
    if limit is not None and needed > limit:
        raise UsageError(
            f"--max-memory {format_bytes(limit)} is too little: {name} needs {format_bytes(needed)} in all.",
            "Raise the limit.",
        )
