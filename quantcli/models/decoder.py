"""Running decoders with a key-value cache: whole texts at once, or token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from quantcli.checkpoint.hugging_face import load_json
from quantcli.core.ports import CACHE_INPUT, CACHE_OUTPUT, Arrays, Port, cache_ports
from quantcli.errors import InputError
from quantcli.models.session import Session

if TYPE_CHECKING:
    from torch import nn

#: What onnxruntime-genai opens a folder by.
GENAI_CONFIG = "genai_config.json"
LOGITS = "logits"


class Decoder(Protocol):
    """A language model in the middle of a text."""

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[1, length, vocabulary]`` of the next tokens, int64 ``[1, length]``; all are remembered."""


def sized_cache(inputs: Iterable[Port], path: Path) -> tuple[Port, ...]:
    """Inputs of a decoder that hold its cache, with their sizes; those of onnxruntime-genai's builder leave one open.

    Raises:
        InputError: neither the graph at ``path`` nor a genai_config.json beside it tells them.
    """
    ports = cache_ports(inputs)
    if all(isinstance(size, int) for port in ports for size in (port.shape or ())[1::2]):
        return ports
    config = path.parent / GENAI_CONFIG
    size: Any = load_json(config) if config.is_file() else None
    for key in ("model", "decoder", "head_size"):
        size = size.get(key) if isinstance(size, dict) else None
    if not isinstance(size, int) or size < 1:
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


#: Operators that write the next cache where the last one lies.
_IN_PLACE = frozenset(("GroupQueryAttention",))


def cached_decoder(session: Session, path: Path, room: int) -> Decoder:
    """A decoder that a session runs, as its operators keep their cache; arguments are those of `CachedDecoder`.

    ``path`` is the graph of the session.
    """
    from quantcli.onnx.graph.model import open_onnx

    in_place = any(node.op_type in _IN_PLACE for node in open_onnx(path).ir.graph.all_nodes())
    return CachedDecoder(session, path, room) if in_place else GrowingDecoder(session, path)


class GrowingDecoder:
    """A decoder of standard operators in onnxruntime: each run returns a cache that is longer by what it read."""

    def __init__(self, session: Session, path: Path) -> None:
        self.session = session
        self._cache = empty_cache(sized_cache(session.inputs, path), 1)
        self._takes = {port.name for port in session.inputs}
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = length
        self._cache = {name: value[:, :, :length] for name, value in self._cache.items()}

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[1, length, vocabulary]`` of the next tokens, int64 ``[1, length]``; all are remembered."""
        names = {name: name.replace(CACHE_INPUT, CACHE_OUTPUT) for name in self._cache}
        known = _token_inputs(ids, self.length)
        feeds = {name: value for name, value in known.items() if name in self._takes} | self._cache
        found = self.session.run(feeds, [LOGITS, *names.values()])
        self._cache = {name: found[after] for name, after in names.items()}
        self.length += ids.shape[1]
        return found[LOGITS]


def _token_inputs(ids: np.ndarray, before: int) -> Arrays:
    """What a decoder is told of tokens ``[1, length]`` that follow so many others."""
    total = before + ids.shape[1]
    positions = np.arange(before, total, dtype=np.int64)[None]
    return {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), "position_ids": positions}


class CachedDecoder:
    """A decoder in onnxruntime that remembers what it has read of one text.

    ``room`` is for so many tokens at the most: the cache has its place from the start, as runtimes of language models
    have it, and is written where it lies.
    """

    def __init__(self, session: Session, path: Path, room: int) -> None:
        self.session, self.length = session, 0
        ports = sized_cache(session.inputs, path)
        shapes = (_empty_shape(port, 1) for port in ports)
        cache = {
            port.name: np.zeros((*shape[:2], room, shape[3]), port.dtype)
            for port, shape in zip(ports, shapes, strict=True)
        }
        self._binding = session.bind(cache, {name: name.replace(CACHE_INPUT, CACHE_OUTPUT) for name in cache})
        self._takes = {port.name for port in session.inputs}

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = length

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[1, length, vocabulary]`` of the next tokens, int64 ``[1, length]``; all are remembered."""
        known = _token_inputs(ids, self.length)
        self.length += ids.shape[1]
        return self._binding.run({name: value for name, value in known.items() if name in self._takes}, LOGITS)


class TorchDecoder:
    """A causal language model of transformers that remembers what it has read of one text."""

    def __init__(self, module: nn.Module) -> None:
        from quantcli.models.hugging_face import transformers_library

        self._module, self._empty = module, transformers_library().DynamicCache
        self._cache = self._empty()

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if not length:
            self._cache = self._empty()
        elif surplus := self._cache.get_seq_length() - length:
            self._cache.crop(-surplus)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[1, length, vocabulary]`` of the next tokens, int64 ``[1, length]``; all are remembered."""
        import torch

        with torch.inference_mode():
            found = self._module(torch.from_numpy(ids), past_key_values=self._cache, use_cache=True)
        return np.asarray(found.logits)
