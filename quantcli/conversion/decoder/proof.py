"""A decoder, run: from its cache as from the whole text, and beside torch on the values that its codes stand for."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import InputError, MissingExtraError
from quantcli.export.decoder.architecture import Decoder
from quantcli.export.decoder.genai import READ_ANEW
from quantcli.models.decoder import CachedDecoder
from quantcli.models.decoder import Decoder as LanguageModel
from quantcli.models.kernels import prove
from quantcli.models.session import Session
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.text import format_bytes

if TYPE_CHECKING:
    from torch import nn

#: Where nothing is rounded, only the order of sums differs: 100 dB and more.
LEAST_SQNR_DB = 60.0
#: Where products round their inputs to int8, a last digit now and then tips a code.
LEAST_ROUNDED_SQNR_DB = 20.0

#: Tokens of the made-up text, unless a window of attention is to be passed.
_LENGTH, _LONGEST = 24, 300


def prove_decoder(artifact: Path, decoder: Decoder, values: Checkpoint) -> dict[str, Any]:
    """Run an artifact, and compare its logits.

    Args:
        artifact: the graph.
        decoder: its dimensions.
        values: what its codes stand for, as a Hugging Face folder.

    Returns:
        For the manifest and the report: ``runtime`` as `quantcli.models.kernels.prove` has it, and ``decoder``.

    Raises:
        InputError: the runtime cannot load it, or its logits are not those that they should be.
    """
    ids = made_up_tokens(decoder)
    exact = artifact.with_name("exact.onnx")
    try:
        without_rounding(artifact, exact)
        plain = CachedDecoder(Session(exact), exact, ids.shape[1])
        expected = plain.read(ids)
        found: dict[str, Any] = {"tokens": ids.shape[1], "cache_sqnr_db": require_cache(plain, ids, LEAST_SQNR_DB)}
        del plain
    finally:
        exact.unlink(missing_ok=True)
    found |= _beside_torch(expected, ids, values)
    rounded = CachedDecoder(Session(artifact), artifact, ids.shape[1])
    logits = rounded.read(ids)
    found["rounded_cache_sqnr_db"] = require_cache(rounded, ids, LEAST_ROUNDED_SQNR_DB)
    found |= {"input_rounding": {"kl": divergence(expected, logits), "equal_tokens": _agreement(expected, logits)}}
    return {"runtime": prove(artifact).to_json(), "decoder": found}


def made_up_tokens(decoder: Decoder) -> np.ndarray:
    """A text of tokens, int64 ``[1, length]``, long enough to leave a window of attention where one is short."""
    windows = [window for window in decoder.windows if 0 < window < _LONGEST]
    # Keys that are cached of a short text keep its angles, so that a cache does not reach beyond it.
    longest = decoder.short_context or decoder.context
    length = min(max([_LENGTH, *(window + 8 for window in windows)]), longest)
    return (np.arange(length, dtype=np.int64)[None] * 37 + 5) % decoder.vocabulary


def sqnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Signal to noise; infinite where all is equal, minus infinite where something is no number."""
    if expected.shape != got.shape or not np.isfinite(got).all():
        return -inf
    signal = float(np.sum(np.square(expected, dtype=np.float64)))
    noise = float(np.sum(np.square(np.subtract(got, expected, dtype=np.float64))))
    return inf if noise == 0 else -inf if signal == 0 else 10 * log10(signal / noise)


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean over tokens of the Kullback-Leibler divergence of next-token distributions, in nats."""
    ours, theirs = (_log_softmax(np.asarray(each, np.float64)) for each in (expected, got))
    return float(np.mean(np.sum(np.exp(ours) * (ours - theirs), axis=-1)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _agreement(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.mean(expected.argmax(-1) == got.argmax(-1)))


def require_cache(model: LanguageModel, ids: np.ndarray, least: float) -> float | None:
    """SQNR of logits read half at once and then token by token, against those of the whole text; None where equal.

    Raises:
        InputError: it is less than ``least``.
    """
    model.rewind(0)
    whole = model.read(ids)
    half = ids.shape[1] // 2
    model.rewind(0)
    parts = [model.read(ids[:, :half])] + [model.read(ids[:, at : at + 1]) for at in range(half, ids.shape[1])]
    found = sqnr_db(whole, np.concatenate(parts, 1))
    if found < least:
        raise InputError(
            f"The decoder computes other logits from its cache than from the whole text: {found:.1f} dB SQNR, at least "
            f"{least:.0f} dB are expected.",
            "Please report it, with the model's config.json.",
        )
    return None if found == inf else round(found, 1)


def _beside_torch(expected: np.ndarray, ids: np.ndarray, values: Checkpoint) -> dict[str, Any]:
    """How logits compare with torch's on the same values; or why torch was not asked."""
    needed = sum(info.numel for info in values.infos()) * 4
    if needed > free_memory_bytes() // 2:
        reason = f"torch takes {format_bytes(needed)} for these weights, more than half of the memory that is free"
        return {"torch": {"compared": False, "reason": reason}}
    from quantcli.models.hugging_face import load_values

    try:
        module = load_values(values)
    except MissingExtraError as error:
        return {"torch": {"compared": False, "reason": str(error)}}
    found = sqnr_db(_logits(module, ids), expected)
    if found < LEAST_SQNR_DB:
        raise InputError(
            f"The decoder does not compute what torch computes on the same weights: its logits reach {found:.1f} dB "
            f"SQNR, at least {LEAST_SQNR_DB:.0f} dB are expected.",
            "Please report it, with the model's config.json.",
        )
    return {"torch": {"compared": True, "sqnr_db": None if found == inf else round(found, 1)}}


def _logits(module: nn.Module, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        found: np.ndarray = module(torch.from_numpy(ids)).logits.float().numpy()
    return found


def without_rounding(artifact: Path, target: Path) -> None:
    """The same graph on the same file of weights, whose products take their inputs as they are."""
    import onnx

    model = onnx.load(artifact, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    target.write_bytes(model.SerializeToString())


def warnings(proof: Mapping[str, Any], decoder: Decoder, target: str | None) -> list[str]:
    """What a report warns of; ``target`` is the runtime that is asked for."""
    torch, short = proof["decoder"]["torch"], decoder.short_context
    found = [] if torch["compared"] else [f"The decoder was not compared with torch: {torch['reason']}."]
    read_anew = READ_ANEW.get(decoder.architecture.genai_type) if target == "onnxruntime-genai" else None
    if short is not None and short != read_anew:
        found.append(
            f"Texts of more than {short} tokens have rotary embeddings of their own (longrope). Where a text grows "
            f"beyond {short} tokens while it is generated, the runtime must read all of it again: keys that are cached "
            "until then are those of a short text."
        )
    return found
