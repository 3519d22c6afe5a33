"""Running decoders with a key-value cache: whole texts at once, or token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantcli.core.ports import Arrays, Port
from quantcli.models.session import Session

#: How inputs that hold the cache are called.
_PAST = "past_key_values."
LOGITS = "logits"


def is_decoder(inputs: Sequence[Port]) -> bool:
    """Whether a graph with these inputs continues from a cache."""
    names = {port.name for port in inputs}
    return "input_ids" in names and any(name.startswith(_PAST) for name in names)


class CachedDecoder:
    """A decoder in onnxruntime that keeps the cache of what it has read. Raises InputError where it cannot be loaded.

    ``threads`` is for each operator, by default the usable cores.
    """

    def __init__(self, path: Path, *, threads: int | None = None, shared: bool = False) -> None:
        self.session = Session(path, threads=threads, shared=shared)
        self._past = [port for port in self.session.inputs if port.name.startswith(_PAST)]
        self._takes = {port.name for port in self.session.inputs}
        present = [port.name for port in self.session.outputs if port.name.startswith("present.")]
        self._outputs = [LOGITS, *present]
        self.forget(1)

    def forget(self, batch: int) -> None:
        """Begin anew, with so many texts side by side."""
        self._cache = [np.zeros(self._empty(port, batch), port.dtype) for port in self._past]

    @property
    def length(self) -> int:
        """How many tokens of each text are in the cache."""
        return int(self._cache[0].shape[2])

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[batch, length, vocabulary]`` of the next tokens, int64 ``[batch, length]``; all are remembered."""
        logits, *self._cache = self.session.run(self._feeds(ids), self._outputs).values()
        return np.asarray(logits)

    def score(self, ids: np.ndarray) -> np.ndarray:
        """Logits of whole texts, from an empty cache, of which nothing is kept."""
        self.forget(len(ids))
        return self.session.run(self._feeds(ids), [LOGITS])[LOGITS]

    def _feeds(self, ids: np.ndarray) -> Arrays:
        batch, length = ids.shape
        total = self.length + length
        positions = np.broadcast_to(np.arange(self.length, total, dtype=np.int64), ids.shape)
        known = {"input_ids": ids, "attention_mask": np.ones((batch, total), np.int64), "position_ids": positions}
        feeds = {name: np.ascontiguousarray(value, np.int64) for name, value in known.items() if name in self._takes}
        return feeds | {port.name: value for port, value in zip(self._past, self._cache, strict=True)}

    @staticmethod
    def _empty(port: Port, batch: int) -> tuple[int, ...]:
        assert port.shape is not None
        _, heads, _, head_dim = port.shape
        assert isinstance(heads, int) and isinstance(head_dim, int)
        return batch, heads, 0, head_dim
