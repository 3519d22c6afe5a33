"""The command line's manners: streams, exit statuses, help, and the JSON contract."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quantcli.cli.app import main
from quantcli.cli.terminal import Ui
from quantcli.reporting.report import ModelRow, Report, Table


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    layers = {f"layers.{i}.fc.weight": torch.randn(32, 128) for i in range(3)}
    save_file(layers | {"norm.weight": torch.ones(128)}, path)
    return path


def test_help_lists_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 0
    for command, options in {
        "inspect": ["--scheme", "--layers", "--json"],
        "convert": ["--output", "--scheme", "--format", "--algorithm", "--recipe", "--group-size", "--skip", "--rest",
                    "--target", "--threads", "--max-memory", "--dry-run", "--force"],
        "eval": ["--data", "--task", "--samples", "--seq-len", "--by-layer", "--require"],
    }.items():  # fmt: skip
        capsys.readouterr()
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in options)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "quantcli 0.1.0\n"


@pytest.mark.parametrize(
    "argv", [["inspect"], ["nonsense"], ["inspect", "x", "--bogus"], ["convert", "x"], ["eval", "x"]]
)
def test_usage_errors_are_one_paragraph_and_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert "Traceback" not in captured.err
    assert "\n\n" not in captured.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shceme", "int8"], "No such option: --shceme. Did you mean --scheme"),
        (["--threads", "0"], "Invalid value for '--threads': "),
        (["--scheme", "int9"], "Error: --scheme: unknown scheme 'int9'. Did you mean 'int8'?"),
        (["--scheme", "int8", "--group-size", "x"], "Invalid value for '--group-size': "),
        (["--scheme", "int8", "--device", "tpu"], "Error: --device tpu is not known. Use cpu or cuda."),
        (["--scheme", "int8", "--rest", "fp8"], "Error: --rest: "),
        (["--scheme", "int8", "--target", "vlm"], "Error: --target: unknown target 'vlm'. Did you mean 'vllm'?"),
    ],
)
def test_a_wrong_option_is_named_in_sentences(
    weights: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["convert", str(weights), "-o", str(output), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "unable to parse" not in error
    assert error.partition(" See: ")[0].endswith((".", "?"))
    assert not output.exists()


def test_an_output_inside_the_input_is_refused_in_a_dry_run_too(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["convert", str(weights.parent), "-o", str(weights.parent / "out"), "--scheme", "int8", "--dry-run"]
    (weights.parent / "config.json").write_text("{}")
    weights.rename(weights.parent / "model.safetensors")
    assert main(argv) == 2
    assert "overlap" in capsys.readouterr().err


def test_json_is_the_whole_of_stdout(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(weights), "--scheme", "int8", "--scheme", "nf4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["command"], document["quantcli"]) == (1, "inspect", "0.1.0")
    assert set(document) >= {"models", "layers", "gates", "warnings"}
    (model,) = document["models"]
    assert set(model) >= {"path", "sha256", "role", "format", "scheme", "size_bytes", "metrics"}
    assert model["path"] == str(weights)
    assert [entry["scheme"] for entry in document["schemes"]] == ["int8", "nf4"]
    assert {row["name"] for row in document["layers"]} == {*(f"layers.{i}.fc.weight" for i in range(3)), "norm.weight"}
    assert set(document["layers"][0]) >= {"name", "scheme", "sqnr_db", "bytes_before", "bytes_after"}


def test_inspect_predicts_the_size_that_convert_writes(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(weights), "--scheme", "int4", "--json"])
    (predicted,) = json.loads(capsys.readouterr().out)["schemes"]
    assert main(["convert", str(weights), "-o", str(tmp_path / "out"), "--scheme", "int4", "--json", "-q"]) == 0
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert predicted["size_bytes"] == written == json.loads(capsys.readouterr().out)["models"][1]["size_bytes"]


def test_quiet_says_nothing_but_errors(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(weights), "-o", str(tmp_path / "out"), "--scheme", "int8", "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["convert", str(weights), "-o", str(tmp_path / "out"), "--scheme", "int8", "-q"]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(("wishes", "said"), [([], True), (["--algorithm", "gptq"], False)])
def test_after_the_default_with_data_a_closer_algorithm_is_named_with_its_time(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wishes: list[str], said: bool
) -> None:
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(64).reshape(4, 16))
    given = ["convert", str(models / "tied"), "-o", str(tmp_path / "out"), "--data", str(tmp_path / "ids.npz")]
    assert main([*given, "--scheme", "int4", "--verify", "codes", *wishes]) == 0
    shown = capsys.readouterr().err
    assert "Next: quantcli eval" in shown
    assert bool(re.search(r"--algorithm tune .* takes about [\d.]+ (s|min)", shown)) is said


def test_a_defect_is_status_4_and_its_traceback_is_for_debug(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quantcli.cli.terminal.Ui.show", lambda *_: 1 / 0)
    assert main(["inspect", str(weights)]) == 4
    assert "Traceback" not in capsys.readouterr().err
    assert main(["inspect", str(weights), "--debug"]) == 4
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "There is not enough memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "There is not enough memory."),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "The GPU has not enough memory."),
    ],
)
def test_memory_that_is_not_to_be_had_is_no_defect(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("quantcli.cli.terminal.Ui.show", fail)
    assert main(["inspect", str(weights)]) == 3
    assert said in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(weights: Path) -> None:
    command = f"{sys.executable} -m quantcli inspect {weights} --layers | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr.count("Traceback") == 0


def test_markdown_goes_to_a_file_and_to_a_github_step(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert main(["inspect", str(weights), "--markdown", str(tmp_path / "report.md")]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "| linear | 3 |" in report
    assert summary.read_text() == f"before\n{report}"
    assert main(["inspect", str(weights), "--markdown", str(tmp_path / "no" / "report.md")]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_no_color_and_no_terminal_mean_plain_text(weights: Path) -> None:
    environment = os.environ | {"NO_COLOR": "1"}
    command = [sys.executable, "-m", "quantcli", "inspect", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("width", [120, 80, 40, 10])
def test_tables_fit_and_break_words_last(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [("int8.onnx", "99.50% +- 0.29%", "1 QGemm, 3 QLinearConv, 1 QLinearGlobalAveragePool")]
    table = Table("A title that is longer than the table is wide", ("Model", "Top-1", "Kernels"), rows, note="a note")
    Ui().show(Report("eval", [ModelRow("a", "reference")]), [table])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    if width >= 80:
        assert lines[0] == table.title
        assert "QLinearGlobalAveragePool" in "".join(lines)
