"""Running blocks the plain way: what tests of the block-sequential engine compare it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

#: Lists of blocks of the tiny models, in the order of their forward pass.
LISTS = {
    "llama": ["model.layers"],
    "bert": ["encoder.layer"],
    "gpt2": ["transformer.h"],
    "t5": ["encoder.block", "decoder.block"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
    "vit": ["vit.layers"],
}


def network(folder: Path) -> nn.Module:
    """A model as transformers loads it: its own class, float32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    loaded = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()  # type: ignore[no-any-return]


def token_file(path: Path, count: int = 6, length: int = 24, seed: int = 0, vocabulary: int = 96) -> Path:
    """Random token ids as calibration data."""
    ids = np.random.default_rng(seed).integers(3, vocabulary, (count, length))
    np.savez(path, input_ids=ids)
    return path


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
    """Arguments, keywords and output of every call of these modules meanwhile, in order."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, output))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def hidden(output: Any) -> Tensor:
    """A block's hidden states: what it returns, or the first of it."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found
