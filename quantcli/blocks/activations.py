"""Hidden states between two blocks, in memory as far as it goes, and on disk beyond."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """A list of tensors, one per batch; those that do not fit into ``limit`` bytes lie in files in ``folder``."""

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        self._folder, self._name, self._limit = folder, name, limit
        self._held: dict[int, Tensor] = {}
        self._spilled: dict[int, tuple[Path, torch.Size]] = {}

    def __len__(self) -> int:
        return len(self._held) + len(self._spilled)

    def __getitem__(self, index: int) -> Tensor:
        if index in self._held:
            return self._held[index]
        path, shape = self._spilled[index]
        # Read, not mapped: mapped pages would count as memory for as long as the file is in use.
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).reshape(shape)

    def __setitem__(self, index: int, values: Tensor) -> None:
        """Put or replace an entry, float32 of any shape."""
        self._held.pop(index, None)
        path, _ = self._spilled.pop(index, (self._folder / f"{self._name}-{index}.bin", None))
        if self.nbytes_held + values.nbytes <= self._limit:
            self._held[index] = values
            path.unlink(missing_ok=True)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(values.numpy().tobytes())
        self._spilled[index] = path, values.shape

    @property
    def nbytes_held(self) -> int:
        """Memory that is taken."""
        return sum(each.nbytes for each in self._held.values())

    def clear(self) -> None:
        """Forget everything, files included."""
        self._held.clear()
        for path, _ in self._spilled.values():
            path.unlink(missing_ok=True)
        self._spilled.clear()
