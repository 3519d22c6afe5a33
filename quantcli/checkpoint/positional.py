"""Reading and writing at an offset, from any thread, without a memory map.

A map would count every touched page of a shard as resident memory; explicit reads cost only their buffer.
"""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import InputError
from quantcli.system.files import reading

if TYPE_CHECKING:
    from torch import Tensor

_HAS_POSITIONAL_IO = hasattr(os, "preadv") and hasattr(os, "pwrite")
#: Bytes that are read or written at a time: macOS refuses 2 GiB and more.
_PIECE = 1 << 30


class PositionalFile:
    """One file that threads read from, or write to, at offsets of their own."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self.path = path
        flags = (os.O_RDWR | os.O_CREAT) if write else os.O_RDONLY
        with nullcontext() if write else reading(path):
            self._descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
        self._lock = threading.Lock()

    def read_tensor(self, offset: int, count: int) -> Tensor:
        """``count`` bytes from ``offset`` as a uint8 tensor.

        Raises InputError where the file ends early, or the system cannot read it.
        """
        import torch

        buffer = torch.empty(count, dtype=torch.uint8)
        with reading(self.path):
            self._read_into(buffer.numpy().data, offset)
        return buffer

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            if _HAS_POSITIONAL_IO:
                got = os.preadv(self._descriptor, [view[done : done + _PIECE]], offset + done)
            else:
                with self._lock:
                    os.lseek(self._descriptor, offset + done, os.SEEK_SET)
                    piece = os.read(self._descriptor, min(_PIECE, len(view) - done))
                view[done : done + len(piece)] = piece
                got = len(piece)
            if got == 0:
                raise InputError(f"{self.path} ends at byte {offset + done}, before the data its header promises.")
            done += got

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` at ``offset``."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            if _HAS_POSITIONAL_IO:
                done += os.pwrite(self._descriptor, view[done : done + _PIECE], offset + done)
            else:
                with self._lock:
                    os.lseek(self._descriptor, offset + done, os.SEEK_SET)
                    done += os.write(self._descriptor, view[done : done + _PIECE])

    def resize(self, size: int) -> None:
        """Extend (sparsely) or cut the file to ``size`` bytes."""
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        """Release the descriptor; further use is an error, closing again is not."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
