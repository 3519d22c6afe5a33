"""Inputs of a model's kind, made up: to see that an artifact runs, and not what it knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

#: Texts at a time, their tokens, and samples of sound.
_BATCH, _TOKENS, _SOUND = 2, 16, 4000


def candidates(model: Any, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Sets of inputs to try one after the other, those of the model's own kind first; the same every time.

    On the meta device they come without a mask first: most classes look at its values, which are not there.
    """
    import torch

    makers: list[Callable[[Any], dict[str, Any]]] = [
        *(_text_and_pixels, _text, _text_to_text, _pixels, _patches, _sound, _features)
    ]
    made = [make(model) for make in makers]
    made.sort(key=lambda inputs: model.main_input_name not in inputs)
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), None)
    if device == "meta":
        unmasked = [{name: inputs[name] for name in inputs if name != "attention_mask"} for inputs in made]
        made = [inputs for pair in zip(unmasked, made, strict=True) for inputs in pair]
    for inputs in made:
        if inputs:
            yield {
                name: value.to(device=device, dtype=floating if value.is_floating_point() and floating else None)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in inputs.items()
            }


def _find(config: Any, *names: str) -> Any:
    """A setting of the configuration, or of one within it."""
    for name in names:
        if isinstance(getattr(config, name, None), (int, list, tuple)):
            return getattr(config, name)
    for value in vars(config).values():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            found = _find(value, *names)
            if found is not None:
                return found
    return None


def _ids(model: Any) -> Any:
    """Token ids that stand for words: those that the configuration has a use of its own for are left out."""
    import torch

    words = _find(model.config, "vocab_size") or 64
    special = {value for value in _settings(model.config) if 0 <= value < words}
    ordinary = [word for word in range(min(words, 4096)) if word not in special] or [0]
    chosen = torch.randint(
        0, len(ordinary), (_BATCH, _TOKENS), generator=torch.Generator(device="cpu").manual_seed(0), device="cpu"
    )
    return torch.tensor(ordinary, device="cpu")[chosen]


def _settings(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")):
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
        elif hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _settings(value)


def _text(model: Any) -> dict[str, Any]:
    import torch

    ids = _ids(model)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _text_to_text(model: Any) -> dict[str, Any]:
    return _text(model) | {"decoder_input_ids": _ids(model).flip(0)}


def _noise(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")


def _pixels(model: Any) -> dict[str, Any]:
    size = _find(model.config, "image_size") or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = getattr(model.config, "num_frames", None)
    row = (frames,) if isinstance(frames, int) else ()
    return {"pixel_values": _noise(_BATCH, *row, _find(model.config, "num_channels") or 3, height, width)} | _said(
        model
    )


def _patches(model: Any) -> dict[str, Any]:
    """Patches of pictures of any size, each behind its row and column, counted from one (Pix2Struct)."""
    import torch

    width = _find(model.config, "patch_embed_hidden_size")
    if not isinstance(width, int):
        return {}
    place = torch.arange(_TOKENS, device="cpu").float()
    places = torch.stack([place // 4 + 1, place % 4 + 1], -1).expand(_BATCH, _TOKENS, 2)
    return {"flattened_patches": torch.cat([places, _noise(_BATCH, _TOKENS, width)], -1)} | _said(model)


def _text_and_pixels(model: Any) -> dict[str, Any]:
    """For models of two towers, which want both: text that names no picture goes with pictures there."""
    both = hasattr(model.config, "text_config") and hasattr(model.config, "vision_config")
    return _text(model) | _pixels(model) if both and not hasattr(model.config, "image_token_id") else {}


def _sound(model: Any) -> dict[str, Any]:
    return {"input_values": _noise(_BATCH, _SOUND)} | _said(model)


def _said(model: Any) -> dict[str, Any]:
    """What a decoder is given, where there is one: it says what it sees or hears."""
    takes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return {"decoder_input_ids": _ids(model)} if takes else {}


def _features(model: Any) -> dict[str, Any]:
    config = model.config
    bins = _find(config, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80
    frames = 2 * (_find(config, "max_source_positions") or 64)
    return {"input_features": _noise(_BATCH, bins, frames), "decoder_input_ids": _ids(model)}
