"""Options that would do nothing are refused in one sentence, and outputs that are named as what they are not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.tiny_onnx import classifier, weights

from quantcli.cli.app import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph, a checkpoint, and arrays that fit the graph."""
    folder = tmp_path_factory.mktemp("needs")
    weight, bias = weights()
    classifier(folder / "net.onnx", weight, bias)
    save_file({"fc.weight": torch.randn(32, 128)}, folder / "checkpoint.safetensors")
    np.savez(folder / "data.npz", x=np.ones((4, weight.shape[1]), np.float32))
    return folder


def refused(home: Path, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command line, whose files are those of the home, and which writes nothing."""
    before = sorted(home.rglob("*"))
    words = [str(home / word) if word.startswith(("net.", "checkpoint.", "data.", "out")) else word
             for word in line.split()]  # fmt: skip
    assert main(words) == 2
    assert sorted(home.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.replace(f"{home}{os.sep}", "").strip()


@pytest.mark.parametrize("option", ["--samples 5", "--seq-len 8", "--tokenizer none", "--preprocess none"])
@pytest.mark.parametrize("model", ["net.onnx", "checkpoint.safetensors"])
def test_options_of_data_need_data(home: Path, model: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = option.split(maxsplit=1)[0]
    assert refused(home, f"convert {model} -o out --scheme int8 {option}", capsys) == (
        f"Error: {name} says how data is read, and none was named. Name it with --data, or leave the option out."
    )


@pytest.mark.parametrize("option", ["--tokenizer none", "--preprocess none"])
def test_bench_reads_data_where_it_is_named(home: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "says how data is read, and none was named" in refused(home, f"bench net.onnx {option}", capsys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("calibrate net.onnx -o out.safetensors --data data.npz --tokenizer none", "--tokenizer is for text, and data"),
        ("eval net.onnx --data data.npz --preprocess none", "--preprocess is for a folder of images, and data.npz"),
        ("eval net.onnx --data data.npz --seq-len 8", "--seq-len is for text, and data.npz is none."),
        ("bench net.onnx --data data.npz --tokenizer none", "--tokenizer is for text, and data.npz is none."),
        ("convert net.onnx -o out.onnx --scheme int8-static --data data.npz --tokenizer none", "--tokenizer is for t"),
    ],
)
def test_options_of_another_kind_of_data(home: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(home, line, capsys).startswith(f"Error: {said}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("convert net.onnx -o out.onnx --scheme int8 --weights x.pt", "--weights is for a model that is package"),
        ("calibrate net.onnx --data data.npz -o out.safetensors --weights x.pt", "--weights is for a model that is"),
        ("eval net.onnx net.onnx --data data.npz --weights x.pt", "--weights is for a model that is package"),
        ("inspect checkpoint.safetensors --custom-ops x.so", "--custom-ops is for models in ONNX, and checkpoint"),
        ("convert net.onnx -o out.onnx --scheme int8 --verify codes", "--verify codes is for checkpoints"),
        ("convert net.onnx -o out.onnx --scheme int8 --search-time 5m", "--search-time goes with a budget"),
        ("convert net.onnx -o out.onnx --max-size 1MB --metric top1", "--metric goes with --max-drop."),
    ],
)
def test_options_of_another_model_or_result(
    home: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(home, line, capsys).startswith(f"Error: {said}")


def test_a_model_that_is_missing_is_said_before_its_options(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(home / "typo.onnx"), "--custom-ops", str(home / "net.onnx")]) == 3


@pytest.mark.parametrize(
    ("line", "written", "example"),
    [
        ("convert net.onnx -o out.txt --scheme int8", "a folder, or a file that ends in .onnx", "out"),
        ("convert net.onnx -o out.ONNX --scheme int8", "a folder, or a file that ends in .onnx", "out"),
        ("convert net.onnx -o out.safetensors --scheme int8", "a folder, or a file that ends in .onnx", "out"),
        ("convert checkpoint.safetensors -o out.pt --scheme int8", "a folder, or a file that ends in .saf", "out"),
        ("calibrate net.onnx --data data.npz -o out.onnx", "a file that ends in .safetensors", "out.safetensors"),
    ],
)
def test_an_output_is_named_as_what_it_is(
    home: Path, line: str, written: str, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(home, line, capsys)
    assert f"file, and what is written is {written}" in said
    assert said.endswith(f"Name for example: -o {home / example}".replace(f"{home}{os.sep}", ""))


def test_a_folder_may_have_a_dot_in_its_name(home: Path, tmp_path: Path) -> None:
    assert (
        main(["convert", str(home / "checkpoint.safetensors"), "-o", str(tmp_path / "net-0.5"), "--scheme", "int8"])
        == 0
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / os.fsdecode(b"n\xff.onnx")
    odd.write_bytes((home / "net.onnx").read_bytes())
    for model, output in ((odd, tmp_path / "out.onnx"), (home / "net.onnx", tmp_path / os.fsdecode(b"o\xff.onnx"))):
        assert main(["convert", str(model), "-o", str(output), "--scheme", "int8"]) == 3
        assert "is not UTF-8, and onnxruntime opens no other. Rename the file" in capsys.readouterr().err
        assert not output.exists()


def test_an_option_without_its_value_names_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "net.onnx", "--samples"]) == 2
    assert capsys.readouterr().err.strip().endswith("See: quantcli eval --help")
