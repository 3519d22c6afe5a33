"""Calibration data as batches: what goes through the blocks at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tokenizers import save_tokenizer

from quantcli import convert
from quantcli.blocks import batches
from quantcli.blocks.batches import CalibrationBatches, load_batches
from quantcli.blocks.model import hugging_face
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.data.request import DataRequest
from quantcli.errors import InputError


def load(folder: Path, data: Path, **options: object) -> CalibrationBatches:
    model = hugging_face(open_checkpoint(folder))
    return load_batches(model, DataRequest(str(data), **options))  # type: ignore[arg-type]


def shapes(found: CalibrationBatches, name: str = "input_ids") -> list[tuple[int, ...]]:
    return [tuple(batch[name].shape) for batch in found.batches]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_lines_of_equal_length_go_together(models: Path, tmp_path: Path, tokenizer: Path) -> None:
    lengths = [3, 7, 3, 5, 7, 3, 60]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(["w1"] * length) for length in lengths))
    found = load(models / "bert", tmp_path / "text.txt", tokenizer=tokenizer)
    assert sorted(shapes(found)) == [(1, 5), (1, 60), (2, 7), (3, 3)]
    assert found.tokens == sum(lengths) and len(found.samples) == 7
    # Nothing is padded, so that no mask is needed.
    assert all(batch.keys() == {"input_ids", "token_type_ids"} for batch in found.batches)


def test_windows_of_a_causal_model(
    models: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 60}" for number in range(200)))
    monkeypatch.setattr(batches, "BATCH_TOKENS", 50)
    found = load(models / "llama", tmp_path / "text.txt", tokenizer=tokenizer, samples=5, seq_len=16)
    assert shapes(found) == [(3, 16), (2, 16)] and found.tokens == 80
    monkeypatch.setattr(batches, "BATCH_TOKENS", 10)  # a sequence goes whole
    assert (
        shapes(load(models / "llama", tmp_path / "text.txt", tokenizer=tokenizer, samples=2, seq_len=16))
        == [(1, 16)] * 2
    )


def test_text_shorter_than_a_sequence(models: Path, tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3")
    with pytest.raises(InputError, match=r"text\.txt.* 3 tokens"):
        load(models / "llama", tmp_path / "text.txt", tokenizer=tokenizer, seq_len=16)


def test_padding_keeps_its_mask(models: Path, tmp_path: Path) -> None:
    ids, mask = np.arange(3, 27).reshape(4, 6), np.ones((4, 6), int)
    mask[3, 4:] = 0
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=mask)
    (batch,) = load(models / "llama", tmp_path / "data.npz").batches
    assert torch.equal(batch["attention_mask"], torch.from_numpy(mask))
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=np.ones_like(mask))
    assert load(models / "llama", tmp_path / "data.npz").batches[0].keys() == {"input_ids"}


@pytest.mark.parametrize(("name", "start"), [("t5", 0), ("bart", 2)])
def test_a_decoder_reads_the_same_one_token_behind(models: Path, tmp_path: Path, name: str, start: int) -> None:
    ids = np.arange(3, 27).reshape(4, 6)
    np.savez(tmp_path / "data.npz", input_ids=ids)
    (batch,) = load(models / name, tmp_path / "data.npz").batches
    expected = np.concatenate([np.full((4, 1), start), ids[:, :-1]], 1)
    assert torch.equal(batch["decoder_input_ids"], torch.from_numpy(expected))
    own = np.arange(30, 42).reshape(4, 3)
    np.savez(tmp_path / "pairs.npz", input_ids=ids, decoder_input_ids=own)
    (batch,) = load(models / name, tmp_path / "pairs.npz").batches
    assert torch.equal(batch["decoder_input_ids"], torch.from_numpy(own))


def test_pictures(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_PICTURES", 3)
    np.savez(tmp_path / "data.npz", pixel_values=np.zeros((7, 3, 32, 32), np.float32))
    found = load(models / "vit", tmp_path / "data.npz")
    assert shapes(found, "pixel_values") == [(3, 3, 32, 32)] * 2 + [(1, 3, 32, 32)]
    assert found.tokens is None


def test_tokens_that_the_model_does_not_know(models: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input_ids=np.full((2, 4), 96))
    with pytest.raises(InputError, match=r"token 96 of .* and the model knows 96"):
        load(models / "llama", tmp_path / "data.npz")


def test_warnings_of_the_data_are_reported(models: Path, tmp_path: Path, no_runtime_check: None) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(150):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"none")
    (tmp_path / "preprocess.yaml").write_text("resize: [32, 32]\n")
    report = convert(
        models / "vit", tmp_path / "out", data=pictures, preprocess=tmp_path / "preprocess.yaml", samples=151,
        scheme="int4", group_size=16, algorithm="gptq", threads=1,
    )  # fmt: skip
    assert any("broken.png" in warning and "left out" in warning for warning in report.warnings)
