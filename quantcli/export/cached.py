"""A causal language model with its key-value cache as something torch can export: one graph for prompt and next tokens.

Inputs and outputs are called as the runtimes of language models call them. Attention is that of torch, in standard
operators, and the cache grows by the tokens of each run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quantcli.core.ports import CACHE_INPUT, CACHE_OUTPUT
from quantcli.export.cache_shape import CacheShape, read_cache_shape
from quantcli.export.source import Example, ExportSource, wave
from quantcli.models import hugging_face
from quantcli.models.positions import longest_sequence
from quantcli.models.runner import TorchRunner, open_runner
from quantcli.models.stored_parameters import vocabulary_of

if TYPE_CHECKING:
    import onnx_ir as ir

#: What axes are called: those of inputs that a runtime fills, and of the mask, which is as long as all tokens.
BATCH, LENGTH, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {LENGTH}"
_READ = ("input_ids", "attention_mask")
#: Texts of an example, tokens of each, and tokens in its cache; and tokens of a whole text. The first one is traced:
#: an axis of one, or of none, torch would take for a fixed one.
_TRACED, _STEP, _WHOLE = (2, 5, 7), (3, 1, 4), 24
#: Windows of attention up to this length are passed by the whole text.
_LONGEST = 300


def cached_source(folder: Path) -> ExportSource:
    """The model of a folder that reads tokens and a cache, and returns logits and the next cache.

    Raises:
        InputError: it cannot be loaded, or its cache is none of keys and values.
        MissingExtraError: transformers is not installed.
    """
    shape = read_cache_shape(folder)
    runner = open_runner(folder, causal=True, decoded=True)
    assert isinstance(runner, TorchRunner)
    model = runner.module
    model.set_attn_implementation("eager")  # type: ignore[operator]
    names = [f"past_{layer}_{part}" for layer in range(len(shape.keys)) for part in ("key", "value")]
    module = _Cached(model, names).eval()

    def run(example: Example) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = dict(zip(outputs, module(**example), strict=True))
            if not example[names[0]].shape[2]:
                # Of a whole text, what the model says without any cache.
                read = {name: example[name] for name in _READ}
                found["logits"] = model(**read, use_cache=False, return_dict=True).logits
        return {name: value.numpy() for name, value in found.items()}

    outputs = ["logits", *(_public(name, CACHE_OUTPUT) for name in names)]
    free = torch.export.Dim.DYNAMIC
    dynamic: dict[str, Any] = {name: {0: free, 1: free} for name in _READ}
    dynamic |= {name: {0: free, 2: free} for name in names}
    sizes = (_TRACED, _STEP, (1, _whole_length(folder), 0))
    examples = [_example(model, shape, names, *each) for each in sizes]
    inputs = [*_READ, *(_public(name, CACHE_INPUT) for name in names)]
    return ExportSource(str(folder), module, run, examples, dynamic, outputs, prefix="model.", input_names=inputs)


class _Cached(nn.Module):
    """A model that takes and returns keys and values of each layer."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        cache_type = hugging_face.transformers_library().DynamicCache

        def forward(**given: Tensor) -> tuple[Tensor, ...]:
            kept = [given[name] for name in names]
            cache = cache_type(list(zip(kept[::2], kept[1::2], strict=True)))
            read = {name: given[name] for name in _READ}
            returned = model(**read, past_key_values=cache, use_cache=True, return_dict=True)
            after = (part for layer in cache.layers for part in (layer.keys, layer.values))
            return (returned.logits, *after)

        # torch.export matches free axes with the parameters' names, and confuses those of a plain **given.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in (*_READ, *names)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _public(name: str, prefix: str) -> str:
    """What runtimes call an entry of the cache: ``past_key_values.0.key`` for ``past_0_key``."""
    _, layer, part = name.split("_")
    return f"{prefix}{layer}.{part}"


def _whole_length(folder: Path) -> int:
    """Tokens of a whole text: more than a window of attention holds, where one is short."""
    config = hugging_face.load_config(folder)
    window = getattr(config, "sliding_window", None) or 0
    length = window + 8 if 0 < window < _LONGEST else _WHOLE
    return min(max(length, _WHOLE), longest_sequence(folder))


def _example(model: nn.Module, shape: CacheShape, names: list[str], batch: int, length: int, past: int) -> Example:
    """Any tokens and any cache, as only torch and its own export are compared; a second text is shorter, if any."""
    ids = (torch.arange(batch * length).reshape(batch, length) * 37 + 5) % vocabulary_of(model)
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    mask[1:, : past // 2] = 0
    sizes = (size for pair in zip(shape.keys, shape.values, strict=True) for size in pair)
    cache = {
        name: wave((batch, heads, past, width)) * (1 + number % 3)
        for number, (name, (heads, width)) in enumerate(zip(names, sizes, strict=True))
    }
    return {"input_ids": ids, "attention_mask": mask, **cache}


def name_axes(model: ir.Model) -> None:
    """Call the free axes of an exported decoder what they are, in place of the exporter's numbers."""
    import onnx_ir as ir

    for value in model.graph.inputs:
        _name(value, (BATCH, LENGTH) if value.name == "input_ids" else (BATCH, TOTAL), ir)
    for value in model.graph.outputs:
        _name(value, (BATCH, LENGTH) if value.name == "logits" else (BATCH, TOTAL), ir)
    for value in model.graph.inputs:
        if value.name and value.name.startswith(CACHE_INPUT):
            _name(value, (BATCH, PAST), ir)


def _name(value: ir.Value, free: tuple[str, str], library: Any) -> None:
    """Give a value's two free axes their names."""
    assert value.shape is not None
    names: Iterator[str] = iter(free)
    value.shape = library.Shape([axis if isinstance(axis, int) else next(names) for axis in value.shape])
