"""Tiny random language models of every architecture that GGUF is written for, with tokenizers that it has names for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = 320

_COMMON = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
#: By name: class of transformers, kind of tokenizer, and settings beside the common ones.
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "smollm", {"tie_word_embeddings": True}),
    "llama3": ("Llama", "llama-bpe", {"rope_parameters": _LLAMA3, "attention_bias": True}),
    "mistral": ("Mistral", "pieces", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", "qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", "qwen2", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("Phi3", "pieces", {"sliding_window": None}),
    "gemma2": ("Gemma2", "spaceless", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": (
        "Gemma3",
        "spaceless",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
    ),
}


def save_decoder(name: str, folder: Path) -> Path:
    """A random model, whose attention matters: its queries and keys are large enough."""
    import torch
    import transformers

    family, kind, settings = DECODERS[name]
    prefix = f"{family}Text" if family == "Gemma3" else family
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**_COMMON | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim == 1:
                value.normal_(0.0 if "bias" in key or family.startswith("Gemma") else 1.0, 0.2)
            else:
                value.mul_(4.0 if family == "Gemma2" and "embed" in key else 10.0)
    model.save_pretrained(folder)
    save_decoder_tokenizer(kind, folder)
    return folder


def save_decoder_tokenizer(kind: str, folder: Path) -> None:
    """A tokenizer of a kind: of bytes by a name of ``CUTTINGS``, or of sentencepiece's pieces."""
    from quantcli.checkpoint.gguf import tokenizer as known

    special = ["<unk>", "<s>", "</s>"]
    if kind in known.CUTTINGS:
        from tokenizers.pre_tokenizers import ByteLevel

        cutting = known.CUTTINGS[kind]
        letters, space = sorted(ByteLevel.alphabet()), "\u0120"
        parts = {"pre_tokenizer": cutting.pre_tokenizer, "normalizer": cutting.normalizer}
        model: dict[str, Any] = {"byte_fallback": False, "ignore_merges": cutting.ignores_merges}
    else:
        letters = [f"<0x{byte:02X}>" for byte in range(256)] + list("\u2581etaoinshrdlu")
        space = "\u2581"
        normalizer, cut, _ = next(each for each in known._SPACES if each[2] == (kind == "pieces"))
        parts = {"pre_tokenizer": cut, "normalizer": normalizer}
        model = {"byte_fallback": True, "ignore_merges": False, "unk_token": "<unk>"}
    tokens, merges = [*special, *letters], []
    for left, right in ((space, "t"), (space + "t", "h"), (space + "th", "e"), ("e", "r"), ("i", "n"), (space, "d")):
        merges.append([left, right])
        tokens.append(left + right)
    added = [
        {"id": index, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
         "single_word": False}
        for index, text in enumerate(special)
    ]  # fmt: skip
    told = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts, "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "unk_token": None, "fuse_unk": model["byte_fallback"], **model,
            "vocab": {text: index for index, text in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
