"""The configuration that onnxruntime-genai opens a folder by (read in its release 0.18)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.checkpoint.hugging_face import load_json
from quantcli.export.decoder.architecture import Decoder
from quantcli.export.decoder.graph import PAST, PRESENT

#: Settings of a search, with the values that hold where generation_config.json has none.
_SEARCH: dict[str, Any] = {
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip
#: Tokens of a prompt that are read at once. The graph returns logits of all of them, which of a long prompt would be
#: several times the model.
CHUNK_SIZE = 64
#: Where it reads a text anew that it generates, because all positions of longer texts are turned by other angles
#: (longrope): by what it calls the model, after so many tokens.
READ_ANEW = {"phi3": 4096}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Dimensions:
    """What a runtime is told of a decoder.

    - ``kind``: what onnxruntime-genai calls it.
    - ``context``: tokens of a text at the most.
    - ``in_place``: whether the next cache is written where the last one lies; else it grows with each run.
    - ``in_pieces``: whether a prompt may be read piece by piece.
    """

    kind: str
    context: int
    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    in_place: bool
    in_pieces: bool = True

    @classmethod
    def of(cls, decoder: Decoder) -> Dimensions:
        """Those of a decoder that is built here."""
        return cls(
            decoder.architecture.genai_type, decoder.context, decoder.vocabulary, decoder.hidden, decoder.heads,
            decoder.kv_heads, decoder.head_dim, decoder.layers, in_place=True,
            # The first pieces of a long prompt would be turned as short texts are.
            in_pieces=decoder.short_context is None,
        )  # fmt: skip


def genai_config(decoder: Dimensions, folder: Path, filename: str) -> dict[str, Any]:
    """``genai_config.json`` of a decoder; special tokens and the defaults of a search come from ``folder``.

    Raises:
        InputError: a configuration is damaged.
    """
    said = _generation(folder)
    search = {name: default if said.get(name) is None else said[name] for name, default in _SEARCH.items()}
    numbered = dict.fromkeys(("key", "value"), "%d")
    past, present = ({kind: name.format(number, kind) for kind, number in numbered.items()} for name in (PAST, PRESENT))
    model: dict[str, Any] = {
        "type": decoder.kind,
        "context_length": decoder.context,
        "vocab_size": decoder.vocabulary,
        **_special_tokens(said),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": filename,
            "head_size": decoder.head_dim,
            "hidden_size": decoder.hidden,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": past["key"],
                "past_value_names": past["value"],
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": present["key"],
                "present_value_names": present["value"],
            },
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "num_key_value_heads": decoder.kv_heads,
        },
    }
    cache: dict[str, Any] = {"max_length": decoder.context, "past_present_share_buffer": decoder.in_place}
    if decoder.in_pieces:
        cache["chunk_size"] = CHUNK_SIZE
    return {"model": model, "search": search | cache}


def _generation(folder: Path) -> dict[str, Any]:
    """What a folder says of generating: generation_config.json, on top of config.json."""
    files = (folder / name for name in ("config.json", "generation_config.json"))
    said: dict[str, Any] = {}
    for file in files:
        if file.is_file():
            said |= {name: value for name, value in load_json(file).items() if value is not None}
    return said


def _special_tokens(said: dict[str, Any]) -> dict[str, Any]:
    """Ids of special tokens; where a text is padded with nothing of its own, with its end."""
    found = {name: said[name] for name in _TOKENS if name in said}
    end = found.get("eos_token_id", 0)
    first = end[0] if isinstance(end, list) else end
    start = found.get("bos_token_id", first)
    return {
        "bos_token_id": start[0] if isinstance(start, list) else start,
        "eos_token_id": end,
        "pad_token_id": found.get("pad_token_id", first),
    }
