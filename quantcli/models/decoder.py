"""Running decoders with a key-value cache: whole texts at once, or token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from quantcli.checkpoint.hugging_face import load_json
from quantcli.core.ports import Arrays, Port, cache_ports
from quantcli.errors import InputError
from quantcli.models.session import Session

#: What onnxruntime-genai opens a folder by.
GENAI_CONFIG = "genai_config.json"
LOGITS = "logits"


def sized_cache(inputs: Iterable[Port], path: Path) -> tuple[Port, ...]:
    """Inputs of a decoder that hold its cache, with their sizes; those of onnxruntime-genai's builder leave one open.

    Raises:
        InputError: neither the graph at ``path`` nor a genai_config.json beside it tells them.
    """
    ports = cache_ports(inputs)
    if all(isinstance(size, int) for port in ports for size in (port.shape or ())[1::2]):
        return ports
    config = path.parent / GENAI_CONFIG
    size = load_json(config).get("model", {}).get("decoder", {}).get("head_size") if config.is_file() else None
    if not isinstance(size, int):
        raise InputError(
            f"{path} does not tell the sizes of its cache: {ports[0]}.", f"Put its {GENAI_CONFIG} beside it."
        )
    return tuple(replace(port, shape=(*(port.shape or ())[:3], size)) for port in ports)


def empty_cache(ports: Iterable[Port], batch: int) -> Arrays:
    """A cache of no tokens, for so many texts side by side; ``ports`` are those of `sized_cache`."""
    return {port.name: np.zeros(_empty_shape(port, batch), port.dtype) for port in ports}


def _empty_shape(port: Port, batch: int) -> tuple[int, int, int, int]:
    _, heads, _, size = port.shape or ()
    assert isinstance(heads, int) and isinstance(size, int)
    return batch, heads, 0, size


class CachedDecoder:
    """A decoder in onnxruntime that keeps the cache of what it has read. Raises InputError where it cannot be loaded.

    ``threads`` is for each operator, by default the usable cores.
    """

    def __init__(self, path: Path, *, threads: int | None = None, shared: bool = False) -> None:
        self.session = Session(path, threads=threads, shared=shared)
        self._past = sized_cache(self.session.inputs, path)
        self._takes = {port.name for port in self.session.inputs}
        present = [port.name for port in self.session.outputs if port.name.startswith("present.")]
        self._outputs = [LOGITS, *present]
        self.forget(1)

    def forget(self, batch: int) -> None:
        """Begin anew, with so many texts side by side."""
        self._cache = list(empty_cache(self._past, batch).values())

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
