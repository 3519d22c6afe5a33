"""Small GGUF files, as the package gguf writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

COLUMNS = 256
SETTINGS = {
    "context_length": 64, "embedding_length": COLUMNS, "block_count": 1, "feed_forward_length": 256,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 8,
}  # fmt: skip


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **metadata: Any) -> Path:
    """A file of llama's architecture; tensors as bytes ``[rows, bytes of a row]`` and the type of each."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in SETTINGS.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list("abcdefgh"))
    writer.add_token_merges(["a b"])
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
