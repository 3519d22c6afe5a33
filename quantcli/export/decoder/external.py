"""Weights of a graph that is being built, written one after the other into the file beside it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from quantcli.errors import VerificationError

if TYPE_CHECKING:
    import onnx_ir as ir

#: Where tensors begin: kernels read vectors of so many bytes.
_ALIGNMENT = 64


class ExternalData:
    """A file of tensors, to be closed with `close`; ``path`` lies beside the graph's own file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO = path.open("wb")
        self._end = 0
        self._written: dict[str, tuple[int, int, int]] = {}

    def add(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        """Write an array of any shape; nothing of it is kept."""
        import onnx_ir as ir

        padding = -self._end % _ALIGNMENT
        self._stream.write(b"\0" * padding)
        offset = self._end + padding
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._stream.write(content)
        self._written[name] = offset, array.nbytes, zlib.crc32(content)
        self._end = offset + array.nbytes
        return self._tensor(name, ir.DataType.from_numpy(array.dtype), array.shape, offset, array.nbytes)

    def rows(self, name: str, tensor: ir.ExternalTensor, start: int, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """The bytes of some rows of a tensor that is written already, from ``start`` on, in another shape."""
        assert tensor.offset is not None and tensor.length is not None
        of_one = tensor.length // tensor.shape.numpy()[0]
        return self._tensor(name, tensor.dtype, shape, tensor.offset + start * of_one, shape[0] * of_one)

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()

    def read_back(self) -> int:
        """Reopen the file and compare every tensor with what was meant; returns how many there are.

        Raises:
            VerificationError: the bytes of one are others.
        """
        with self.path.open("rb") as stream:
            for name, (offset, length, checksum) in self._written.items():
                stream.seek(offset)
                if zlib.crc32(stream.read(length)) != checksum:
                    raise VerificationError(
                        f"{name} was read back otherwise than it was written.",
                        "The disk may be failing; if it happens again elsewhere, please report it.",
                    )
        return len(self._written)

    def _tensor(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int, length: int
    ) -> ir.ExternalTensor:
        import onnx_ir as ir

        return ir.ExternalTensor(
            self.path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )
