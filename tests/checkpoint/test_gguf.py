"""GGUF read: every type against the package gguf, names and rows, tokenizers, and files that nobody should trust."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.gguf_files import COLUMNS, SETTINGS, write_gguf
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import decoded_checkpoint
from quantcli.checkpoint.gguf import settings
from quantcli.checkpoint.gguf.architectures import architecture_of
from quantcli.checkpoint.gguf.checkpoint import open_gguf
from quantcli.checkpoint.gguf.header import TYPE_NUMBERS, read_gguf_header
from quantcli.checkpoint.gguf.tokenizer import tokenizer_files
from quantcli.errors import InputError

ROWS = 8
DECODED = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ2_XXS",
]
DECODED += ["IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "F32", "F16", "BF16"]


def blocks(kind: str, rows: int, columns: int = COLUMNS) -> np.ndarray:
    """Random blocks whose scales are numbers."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    while True:
        found = generator.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
        if kind in ("F32", "F16", "BF16") or kind.startswith(("Q4_0", "Q8_0")):
            values = generator.standard_normal((rows, columns)).astype(np.float32)
            found = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
            return found if kind in ("Q4_0", "Q8_0", "BF16") else found.view(np.uint8)
        found &= 0xBB  # no exponent of FP16 is full
        return found


def embedding() -> tuple[np.ndarray, str]:
    return np.ones((ROWS, COLUMNS), np.float32), "F32"


@pytest.mark.parametrize("kind", DECODED)
def test_every_type_is_decoded_as_gguf_does(tmp_path: Path, kind: str) -> None:
    stored = blocks(kind, 16)
    stored = stored.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    name = "model.layers.0.mlp.down_proj.weight"
    path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": embedding(), "blk.0.ffn_down.weight": (stored, kind)})
    decoded = decoded_checkpoint(open_checkpoint(path))
    expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])
    info = next(info for info in decoded.infos() if info.name == name)
    assert info.shape == (16, COLUMNS)
    for first, last in ((0, 16), (3, 9)):
        found = decoded.read_rows(info, first, last).float()
        assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(torch.from_numpy(expected[first:last].copy())))


def test_rows_of_heads_are_put_back_whichever_are_asked_for(tmp_path: Path) -> None:
    original = torch.arange(16.0)[:, None].repeat(1, COLUMNS)
    stored = original.reshape(2, 2, 4, COLUMNS).swapaxes(1, 2).reshape(16, COLUMNS).contiguous()
    tensors = {"token_embd.weight": embedding(), "blk.0.attn_q.weight": (stored.numpy(), "F32")}
    checkpoint = open_gguf(write_gguf(tmp_path / "a.gguf", tensors))
    info = next(info for info in checkpoint.infos() if "q_proj" in info.name)
    for first in range(16):
        for last in range(first + 1, 17):
            assert torch.equal(checkpoint.read_rows(info, first, last), original[first:last])


def test_a_folder_stands_for_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": embedding()}, tokenizer__chat_template="hello")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == path and checkpoint.folder is not None
    assert open_checkpoint(checkpoint.folder) is checkpoint
    config = json.loads((checkpoint.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["head_dim"] == 8 and config["vocab_size"] == ROWS
    told = json.loads((checkpoint.folder / "tokenizer_config.json").read_text())
    assert told["chat_template"] == "hello"


def test_a_tokenizer_that_is_not_known_is_refused() -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "deepseek-llm", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(InputError, match="deepseek-llm"):
        tokenizer_files(metadata, "a.gguf")
    with pytest.raises(InputError, match="'t5'"):
        tokenizer_files({**metadata, "tokenizer.ggml.model": "t5"}, "a.gguf")


def text(value: str, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if claimed is None else claimed) + value.encode()


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "x") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


def header(tensors: int, entries: int, rest: bytes = b"", version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + rest


HUGE = 1 << 62
HOSTILE = {
    "empty": (b"", "magic number"),
    "other": (b"PK" * 20, "does not begin with GGUF"),
    "cut": (b"GGUF\3\0", "its version"),
    "big-endian": (header(0, 0, version=3 << 24), "big-endian"),
    "version": (header(0, 0, version=1), "version 1"),
    "a terabyte of tensors": (header(1 << 40, 0), "claims 1,099,511,627,776 tensors"),
    "entries": (header(0, HUGE), "metadata entries"),
    "key": (header(0, 1, text("a", HUGE) + bytes(40)), "a key takes"),
    "string": (header(0, 1, text("a") + struct.pack("<I", 8) + text("b", 1 << 40) + bytes(20)), "a takes"),
    "array": (header(0, 1, text("a") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(20)), "values of a"),
    "nested": (header(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(20)), "type 9"),
    "type of value": (header(0, 1, text("a") + struct.pack("<I", 77) + bytes(20)), "type 77"),
    "twice": (header(0, 2, (text("a") + struct.pack("<II", 4, 1)) * 2), "twice"),
    "not utf-8": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20)), "header is not"),
    "dimensions": (header(1, 0, text("x") + struct.pack("<I", 1 << 31) + bytes(40)), "dimensions"),
    "overflow": (header(1, 0, tensor((1 << 63, 1 << 63))), "ends at byte"),
    "zero": (header(1, 0, tensor((0, 4))), "does not divide"),
    "blocks": (header(1, 0, tensor((33, 2), 2)), "blocks of 32"),
    "type of tensor": (header(1, 0, tensor((32,), 99)), "type 99"),
    "behind the end": (header(1, 0, tensor((4,), 0, 1 << 40) + bytes(64)), "ends at byte"),
    "overlap": (header(2, 0, tensor((8,)) + tensor((8,), 0, 16, "y") + bytes(96)), "overlap"),
    "one name": (header(2, 0, tensor((8,)) + tensor((8,), 0, 32) + bytes(128)), "one name"),
    "name": (header(1, 0, tensor((4,), name="n" * 5000) + bytes(64)), "5000 characters"),
    "alignment": (header(0, 1, text("general.alignment") + struct.pack("<II", 4, 3) + bytes(32)), "alignment is 3"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_nothing_is_believed(tmp_path: Path, fault: str) -> None:
    data, said = HOSTILE[fault]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said):
        read_gguf_header(path)
    with pytest.raises(InputError):
        open_checkpoint(path)


def test_a_header_may_be_cut_anywhere(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", {"token_embd.weight": embedding()}).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"llama__attention__head_count": "two"}, "head_count"),
        ({"general__architecture": "mamba"}, "architecture mamba"),
    ],
)
def test_settings_are_checked(tmp_path: Path, metadata: dict[str, str], said: str) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, metadata.get("general__architecture", "llama"))
    for key, value in SETTINGS.items():
        own = metadata.get(f"llama__{key.replace('.', '__')}")
        writer.add_string(f"llama.{key}", own) if own else writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", embedding()[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=said):
        open_checkpoint(path)


def test_a_tensor_of_another_kind_of_model_is_named(tmp_path: Path) -> None:
    for name in ("blk.0.ffn_gate_exps.weight", "../../etc/passwd", "v.blk.0.x.weight"):
        path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": embedding(), name: embedding()})
        with pytest.raises(InputError, match="is known to have"):
            open_checkpoint(path)


def test_types_have_numbers() -> None:
    assert all(gguf.GGMLQuantizationType(number).name == name for name, number in TYPE_NUMBERS.items())


@pytest.mark.parametrize(
    ("length", "high", "factor"), [(8192, 4.0, 8.0), (8192, 4.0, 32.0), (4096, 8.0, 2.0), (32, 4.0, 8.0)]
)
def test_how_llama_3_scales_frequencies_is_told_from_what_divides_them(length: int, high: float, factor: float) -> None:
    """Beside what transformers makes of the settings that were told; a file holds the numbers in float32."""
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=8 * length,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": high, "original_max_position_embeddings": length,
        },
    )  # fmt: skip
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    given = config.to_dict()
    llama = architecture_of(given, "a test")
    given["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    config.rope_parameters = settings.rope_of_factors(llama, given, (plain / expected).tolist())
    assert config.rope_parameters["original_max_position_embeddings"] == length
    told, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=0)
    assert settings.rope_of_factors(llama, given, [1.0, 8.0, 2.0, 1.0]) is None
