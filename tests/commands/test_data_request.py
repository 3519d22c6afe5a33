"""What a user says of DATA reaches everything that reads it, the exporter of a function's module included."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tokenizers import save_tokenizer

from quantcli.cli.app import main

CODE = """
import torch

class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(64, 64), torch.nn.Linear(64, 32)

    def forward(self, input_ids):
        return self.head(self.words(input_ids).relu())

class Pictures(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 64, 3)

    def forward(self, image):
        return self.head(self.body(image).relu())

def words():
    torch.manual_seed(0)
    return Words()

def pictures():
    torch.manual_seed(0)
    return Pictures()
"""


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    (tmp_path / "images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "p.yaml").write_text("resize: 8\ncrop: 8\nmean: 0.5\nstd: 0.5\n")
    return ["--data", "images", "--preprocess", "p.yaml"]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(["w1", "w2"] * length) for length in (2, 3, 5, 4)))
    return ["--data", "text.txt", "--tokenizer", "tokenizer"]


@pytest.mark.parametrize(("function", "kind"), [("pictures", "images"), ("words", "texts")])
@pytest.mark.parametrize("command", ["calibrate", "convert"])
def test_a_functions_module_is_exported_with_the_data(
    command: str, function: str, kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = request.getfixturevalue(kind)
    arguments = ["-o", "s.safetensors"] if command == "calibrate" else ["-o", "o.onnx", "--scheme", "int8-static"]
    assert main([command, f"own_nets:{function}", *arguments, *flags, "--json"]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    if command == "convert":
        assert "int8-static" in {row["scheme"] for row in report["layers"]}
        assert report["verified"]["compared"]["sqnr_db"] > 20
    else:
        assert report["samples"] == 4
