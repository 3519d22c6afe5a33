"""What a causal language model of transformers remembers, told without its weights: keys and values, or something else.

The model is built without memory for its weights (torch's device ``meta``) and asked for the cache of a few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantcli.checkpoint.config_file import read_config
from quantcli.checkpoint.hugging_face import is_causal_config
from quantcli.errors import InputError
from quantcli.export.experts import can_be_taken_apart
from quantcli.models import hugging_face
from quantcli.system.text import first_line, listed

_TOKENS = 4

#: Model types that remember keys and values, and that torch exports for one length of a text alone (tried: torch 2.13).
_FIXED_LENGTH = ("mpt",)


@dataclass(frozen=True)
class CacheShape:
    """Of each layer's cache, heads and length of a head, of keys and of values."""

    keys: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...]

    @property
    def uniform(self) -> tuple[int, int] | None:
        """Heads and their length where all layers have the same, as most runtimes take it; else None."""
        sizes = {*self.keys, *self.values}
        return sizes.pop() if len(sizes) == 1 else None


@dataclass(frozen=True)
class NoCache:
    """Why a model cannot be exported with a key-value cache, and whether an export for scoring may be had at least."""

    reason: str
    exports: bool = True


def why_no_cache(folder: Path) -> NoCache | None:
    """Why a folder's model cannot be exported with a key-value cache; None where it can.

    Raises:
        InputError: transformers cannot read its config.json, or has no such model.
        MissingExtraError: transformers is not installed.
    """
    found = _look(folder)
    return found if isinstance(found, NoCache) else None


def read_cache_shape(folder: Path) -> CacheShape:
    """What a folder's model remembers.

    Raises:
        InputError: that is no plain cache of keys and values, or transformers has no such model.
        MissingExtraError: transformers is not installed.
    """
    found = _look(folder)
    if isinstance(found, NoCache):
        raise InputError(f"{folder} cannot be exported with a key-value cache: {found.reason}.")
    return found


def _look(folder: Path) -> CacheShape | NoCache:
    plain = read_config(folder / "config.json")
    if not is_causal_config(plain):
        return NoCache(f"{folder} is no causal language model")
    config = hugging_face.load_config(folder)
    vars(config).pop("quantization_config", None)
    name = config.model_type
    if getattr(config, "use_bidirectional_attention", None):
        return NoCache(f"{name} attends to what follows as well, by use_bidirectional_attention")
    if rotary := _changing_rotary(config):
        reason = f"the rotary embedding of {name} is {rotary}, whose frequencies change with the length of a text"
        return NoCache(reason, exports=False)
    try:
        with torch.device("meta"), hugging_face.quiet():
            loader = hugging_face.transformers_library().AutoModelForCausalLM
            model = loader.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except (ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"transformers cannot build the model of {folder}: {first_line(error)}") from error
    return _kind_reason(name, model, config) or _shape(name, model)


def _changing_rotary(config: Any) -> str | None:
    """The kind of a rotary embedding that is computed anew for each length of a text, None where there is none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sections = [each for each in parameters.values() if isinstance(each, Mapping)] or [parameters]
    kinds = (each.get("rope_type", "default") for each in sections)
    return next((kind for kind in kinds if kind in ("dynamic", "longrope")), None)


def _kind_reason(name: str, model: nn.Module, config: Any) -> NoCache | None:
    """Why a model has no plain cache, by what its class and its layers are."""
    if name in _FIXED_LENGTH:
        return NoCache(f"torch exports {name} with a cache for one length of a text alone")
    if name == "falcon" and config.alibi:
        return NoCache("falcon with alibi multiplies in bfloat16, which onnxruntime has no kernel for", exports=False)
    library = hugging_face.transformers_library()
    layers = library.DynamicCache(config=config.get_text_config(decoder=True)).layers
    # A window is what masks make of it; keys and values of all tokens are kept.
    plain = ("DynamicLayer", "DynamicSlidingWindowLayer")
    others = sorted({type(layer).__name__ for layer in layers} - {*plain})
    if getattr(model, "_is_stateful", False) or others:
        kind = f" ({listed(others)})" if others else ""
        return NoCache(f"{name} remembers a state of its own kind{kind}, and not keys and values alone", exports=False)
    experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    if experts:
        reason = f"{name} is a mixture of experts, whose weights no operator of an export keeps as codes"
        return NoCache(reason, exports=all(map(can_be_taken_apart, experts)))
    return None


def _shape(name: str, model: nn.Module) -> CacheShape | NoCache:
    cache = hugging_face.transformers_library().DynamicCache()
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
        return NoCache(f"{name} does not run with a cache of keys and values: {first_line(error).rstrip('.')}")
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in filled]
    if not shapes or any(len(each) != 4 or each[2] != _TOKENS for pair in shapes for each in pair):
        return NoCache(f"{name} does not keep keys and values of each token")
    return CacheShape(
        tuple((keys[1], keys[3]) for keys, _ in shapes), tuple((values[1], values[3]) for _, values in shapes)
    )
