"""Proof of a decoder that torch exported: from its cache as from the whole text, and beside its decoded weights."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.conversion.decoder.proof import (
    LEAST_ROUNDED_SQNR_DB,
    LEAST_SQNR_DB,
    divergence,
    require_cache,
    sqnr_db,
    without_rounding,
)
from quantcli.errors import InputError
from quantcli.models.decoder import Decoder, cached_decoder
from quantcli.models.hugging_face import load_config
from quantcli.models.positions import longest_sequence
from quantcli.models.session import Session

#: Tokens of the made-up text, and windows of attention up to this length that it passes.
_LENGTH, _LONGEST = 24, 300


def prove_exported(
    artifact: Path, decoded: Path, exported_db: float | None, folder: Path, *, cast: bool
) -> dict[str, Any]:
    """Run an artifact from its cache, and beside the graph that torch exported with the artifact's weights decoded.

    Args:
        artifact: the graph.
        decoded: torch's graph, its weights those that the artifact's codes stand for.
        exported_db: signal to noise of torch's graph beside torch itself, as it was exported; None where equal.
        folder: the model's folder.
        cast: whether the artifact computes in 16 bits, where it rounds all that it computes.

    Returns:
        For the manifest, in the keys of `quantcli.conversion.decoder.proof.prove_decoder`.

    Raises:
        InputError: its logits are not those that they should be.
    """
    ids = _tokens(folder)
    least = LEAST_ROUNDED_SQNR_DB if cast else LEAST_SQNR_DB
    exact = artifact.with_name("exact.onnx")
    try:
        without_rounding(artifact, exact)
        plain = _opened(exact)
        expected = plain.read(ids)
        found: dict[str, Any] = {"tokens": ids.shape[1], "cache_sqnr_db": require_cache(plain, ids, least)}
        del plain
    finally:
        exact.unlink(missing_ok=True)
    beside = sqnr_db(_opened(decoded).read(ids), expected)
    if beside < least:
        raise InputError(
            f"The decoder does not compute what torch's export computes with the same weights: its logits reach "
            f"{beside:.1f} dB SQNR, at least {least:.0f} dB are expected.",
            "Please report it, with the model's config.json.",
        )
    reached = min(beside, inf if exported_db is None else exported_db)
    found["torch"] = {"compared": True, "sqnr_db": None if reached == inf else round(reached, 1)}
    rounded = _opened(artifact)
    logits = rounded.read(ids)
    found["rounded_cache_sqnr_db"] = require_cache(rounded, ids, LEAST_ROUNDED_SQNR_DB)
    equal = float(np.mean(expected.argmax(-1) == logits.argmax(-1)))
    return found | {"input_rounding": {"kl": divergence(expected, logits), "equal_tokens": equal}}


def _opened(file: Path) -> Decoder:
    return cached_decoder(Session(file), file, 0)


def _tokens(folder: Path) -> np.ndarray:
    """A text of tokens, int64 ``[1, length]``, long enough to leave a window of attention where one is short."""
    config = load_config(folder).get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or 0
    length = window + 8 if 0 < window < _LONGEST else _LENGTH
    length = min(max(length, _LENGTH), longest_sequence(folder))
    found: np.ndarray = (np.arange(length, dtype=np.int64)[None] * 37 + 5) % int(config.vocab_size)
    return found
