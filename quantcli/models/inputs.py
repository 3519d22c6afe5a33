"""What models take: names, types and shapes, and samples made to fit them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.core.ports import Arrays, Port, cache_ports, dtype_family
from quantcli.errors import InputError

if TYPE_CHECKING:
    from torch import nn

#: Token inputs that follow from the token ids where data does not bring them.
_DERIVED = ("attention_mask", "token_type_ids", "position_ids")
#: What a Hugging Face model may be given beside its main input, where its class takes it: by name, whether integers;
#: None: of either kind.
_BESIDE = {
    "decoder_input_ids": True, "decoder_attention_mask": True, "attention_mask": True, "bbox": None,
    "mm_token_type_ids": True, "image_grid_thw": True, "image_grid_hw": True, "image_sizes": True,
    "image_position_ids": True, "batch_num_images": True, "num_local_patches": True, "spatial_shapes": True,
    "aspect_ratio_ids": True, "aspect_ratio_mask": True, "cross_attention_mask": True,
    "pixel_mask": True, "pixel_attention_mask": True, "input_features_mask": True, "padding_mask": True,
    "pixel_values": False, "input_features": False, "input_values": False,
}  # fmt: skip
#: Tensors that a class of transformers takes in place of others, or while it is trained or generates.
_NEVER_GIVEN = re.compile(
    r"\w*(labels|embeds|_outputs|past_key_values|cache_\w+|position_ids|token_type_ids|logits_to_keep)"
)
_DECODER_IDS = "decoder_input_ids"
#: Inputs of a text that have a row for each text, and an entry for each of its tokens.
TOKEN_INPUTS = frozenset(("input_ids", *_DERIVED, _DECODER_IDS, "decoder_attention_mask"))
#: What the forward of a plain module calls token ids where it does not say ``_ids``.
_INTEGERS = ("ids", "idx", "tokens")


def fit(feeds: Mapping[str, np.ndarray], inputs: Sequence[Port], name: str) -> Arrays:
    """The arrays that a model takes, in its dtypes.

    A float becomes another float and an integer another integer that holds it; what follows from token ids
    (``attention_mask``, ``token_type_ids``, ``position_ids``) is filled in. What is optional and neither given nor
    follows is left out. Where names differ, inputs go by position if there are as many.

    Raises:
        InputError: an input is missing, or of another kind than the model's.
    """
    arrays = dict(feeds)
    missing = [port for port in inputs if port.name not in arrays]
    if missing and "input_ids" in arrays:
        arrays = derived_inputs(arrays["input_ids"]) | arrays
        missing = [port for port in inputs if port.name not in arrays]
    needed = [port for port in inputs if not port.optional]
    if any(not port.optional for port in missing):
        if len(feeds) not in (len(inputs), len(needed)):
            wanted = "; ".join(str(port) for port in needed)
            raise InputError(f"{name} needs inputs that the data lacks. Expected {wanted}; got {', '.join(feeds)}.")
        taken = inputs if len(feeds) == len(inputs) else needed
        arrays = {port.name: value for port, value in zip(taken, feeds.values(), strict=True)}
    return {port.name: _cast(arrays[port.name], port, name) for port in inputs if port.name in arrays}


def require_shape(value: np.ndarray, port: Port, name: str) -> None:
    """Raise InputError where a dimension other than the batch is not the one that a model takes."""
    wanted = (port.shape or ())[1:]
    fits = len(value.shape) == len(wanted) + 1 and all(
        dim == size for dim, size in zip(wanted, value.shape[1:], strict=True) if isinstance(dim, int)
    )
    if port.shape and not fits:
        shape = " x ".join(map(str, value.shape)) or "a single value"
        raise InputError(f"{name} takes other inputs than these. Expected {port}; got {shape}.")


def derived_inputs(ids: np.ndarray) -> Arrays:
    """Attention mask, token types and positions of unpadded token ids ``[batch, length]``."""
    positions = np.broadcast_to(np.arange(ids.shape[-1], dtype=ids.dtype), ids.shape)
    return dict(zip(_DERIVED, (np.ones_like(ids), np.zeros_like(ids), positions), strict=True))


def following(ports: Sequence[Port]) -> set[str]:
    """Names of inputs that a model demands and that follow from token ids of the same shape where data lacks them.

    Not beside a cache: positions then begin behind what it holds.
    """
    ids = next((port for port in ports if port.name == "input_ids" and not cache_ports(ports)), None)
    return {
        port.name
        for port in ports
        if ids is not None and port.name in _DERIVED and not port.optional and port.shape == ids.shape
    }


def decoder_inputs(feeds: Mapping[str, np.ndarray], start: int) -> Arrays:
    """Ids of an encoder-decoder's decoder where none are given: the encoder's text, one token behind, as in training.

    Where the encoder reads no text they are the ``start`` token alone.
    """
    if _DECODER_IDS in feeds or not feeds:
        return {}
    ids = feeds.get("input_ids")
    if ids is None:
        return {_DECODER_IDS: np.full((len(next(iter(feeds.values()))), 1), start, np.int64)}
    return {_DECODER_IDS: np.concatenate([np.full_like(ids[:, :1], start), ids[:, :-1]], 1)}


def _cast(value: np.ndarray, port: Port, name: str) -> np.ndarray:
    """An array in a port's dtype, where that keeps its meaning."""
    dtype = port.dtype_of(value.dtype)
    if dtype is None:
        raise InputError(f"{name} expects {port}; the data has {value.dtype}.")
    cast = value.astype(dtype, copy=False)
    if dtype_family(dtype) == "integer" and not (cast == value).all():
        raise InputError(f"{name} expects {port}; the data's {value.min()} to {value.max()} do not fit.")
    return cast


def hugging_face_ports(path: Path, *, text: bool = False) -> tuple[Port, ...]:
    """What the class takes that a folder's config.json names: its main input, and what may come with it.

    With ``text`` that is token ids, with a mask and, where it has such, token types, whatever else the model sees.
    """
    from quantcli.checkpoint.config_file import read_config
    from quantcli.models.hugging_face import config_inputs, is_causal, named_class, tensor_inputs

    config = read_config(path / "config.json")
    main, *taken = config_inputs(config)
    tensors = tensor_inputs(config)
    if named_class(config) is None and not text and (path / "preprocessor_config.json").is_file():
        main = "pixel_values"
    ids = ("batch", "sequence")
    if main == "input_ids" or ("input_ids" in taken and (text or is_causal(path))):
        taken.append(main)
        ports = [Port("input_ids", np.dtype(np.int64), ids), Port("attention_mask", np.dtype(np.int64), ids, True)]
        # Some models without token types take that input all the same and read words in it (GPT-2).
        # Models that see are told by it which tokens are images (PaliGemma).
        if config.get("type_vocab_size") or "vision_config" in config:
            ports.append(Port("token_type_ids", np.dtype(np.int64), ids, True))
        ports = [port for port in ports if port.name == "input_ids" or port.name in taken]
    elif main == "pixel_values":
        # A model of videos has as many pictures in a row.
        picture = ("channels", "height", "width")
        shape = ("batch", "frames", *picture) if isinstance(config.get("num_frames"), int) else ("batch", *picture)
        ports = [Port(main, np.dtype(np.float32), shape)]
    else:
        # Of a class that reads sound under either name `inputs` means whichever it is (SpeechEncoderDecoder).
        ports = [] if main == "inputs" and "input_values" in taken else [_tensor(main, optional=False)]
    known = {port.name for port in ports}
    for name, integers in _BESIDE.items():
        if name in taken and name not in known:
            kind = np.dtype(np.int64 if integers else np.float32)
            ports.append(_tensor(name) if integers is None else Port(name, kind, None, True))
            known.add(name)
    return (*ports, *(_tensor(name) for name in tensors if name not in known and not _NEVER_GIVEN.fullmatch(name)))


def _tensor(name: str, *, optional: bool = True) -> Port:
    """An input of which only the name is known."""
    return Port(name, np.dtype(np.float32), None, optional, floats=np.dtype(np.float32))


def signature_ports(module: nn.Module, name: str, floats: np.dtype[Any] | None = None) -> tuple[Port, ...]:
    """Inputs of a module, as the signature of its forward tells: names, and a guess what they hold.

    Data may bring what the guess did not see. What is floating-point becomes ``floats``, float32 by default.
    """
    needed = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            needed.append(parameter.name)
    if not needed:
        raise InputError(f"{name}: the module's forward names no input.", "Give it named parameters.")
    integers = [each for each in needed if each.endswith(("_ids", "_mask")) or each in _INTEGERS]
    floats = np.dtype(np.float32) if floats is None else floats
    guesses = {True: np.dtype(np.int64), False: floats}
    return tuple(Port(each, guesses[each in integers], None, floats=floats) for each in needed)


def computed_in(module: nn.Module) -> np.dtype[Any]:
    """The one floating-point type of a module's parameters; float32 where there are several, or numpy has it not."""
    found = {str(each.dtype).removeprefix("torch.") for each in module.parameters() if each.is_floating_point()}
    return np.dtype(found.pop() if len(found) == 1 and found <= {"float16", "float64"} else np.float32)
