"""Tensors in files that take memory only while somebody holds their values. Imported where a graph is at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


class MappedTensor(ir.ExternalTensor):
    """An external tensor whose file is mapped anew each time that it is read.

    onnx-ir keeps a mapping for as long as its tensor lives: in the end a process holds every page of every weight that
    it ever looked at. Here the mapping goes with the last array that was made of it. Threads may read at once.
    """

    def numpy(self) -> np.ndarray:
        """The values, mapped read-only."""
        return self._anew().numpy()

    def tobytes(self) -> bytes:
        """The bytes as they are stored."""
        return self._anew().tobytes()

    def __array__(self, dtype: Any = None) -> np.ndarray:
        values: np.ndarray = self.numpy().__array__(dtype)
        return values

    def _anew(self) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.location, self.offset, self.length, self.dtype, shape=self.shape, name=self.name,
            base_dir=self.base_dir,
        )  # fmt: skip
