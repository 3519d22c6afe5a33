"""Help and reference pages say what the code does, and the examples in them run."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from support.tiny_onnx import classifier
from support.tokenizers import tokenizer

from docs import generate
from quantcli.cli import help as grouped_help
from quantcli.cli.app import main
from quantcli.cli.choices import CHOICES
from quantcli.cli.commands import app

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
EXAMPLES = [line for command in COMMANDS.values() for line in command.epilog.splitlines()]


def test_pages_are_what_the_code_says() -> None:
    stored = {path.name: path.read_text(encoding="utf-8") for path in generate.FOLDER.iterdir()}
    assert stored == generate.pages(), "run: python docs/generate.py"


def test_every_command_option_and_name_is_in_the_reference() -> None:
    for name, command in COMMANDS.items():
        page = (generate.FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert all(option in page for parameter in command.params for option in parameter.opts if option[0] == "-")
    overview = (generate.FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in overview for choices in CHOICES.values() for name in choices())


@pytest.mark.parametrize("family", ["scheme", "algorithm", "format", "target", "task"])
def test_every_name_is_explained_by_people(family: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    words = set(text.replace("`", " ").replace(",", " ").replace("==", " ").split())
    assert not set(CHOICES[family]()) - {"auto"} - words


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_help_fits_and_is_whole(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert "..." not in overview.replace("[ARGS]...", "")
    assert all(f"{command.help.partition('.')[0]}." in " ".join(overview.split()) for command in COMMANDS.values())
    for name, command in COMMANDS.items():
        assert main([name, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns
        assert "{" not in "".join(lines)
        groups = [line[:-1] for line in lines if line in {f"{group}:" for group in grouped_help.GROUPS}]
        assert len(groups) >= 3
        assert groups == sorted(groups, key=grouped_help.GROUPS.index)
        assert lines[lines.index("Examples:") + 1 :] == [f"  {example}" for example in command.epilog.splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_the_choices(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--help"])
    words = {word.strip(".,;") for word in capsys.readouterr().out.split()}
    for parameter in COMMANDS[name].params:
        assert set(CHOICES.get(parameter.name, list)()) <= words


@pytest.fixture(scope="module")
def place(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: a language model, a classifier, and data for both."""
    folder = tmp_path_factory.mktemp("examples")
    tokenizer(folder / "model", causal=True)
    shutil.copytree(models / "llama", folder / "model", dirs_exist_ok=True)
    generator = np.random.default_rng(0)
    for name in ("text", "held-out"):
        words = generator.choice([*"abcdefghij"], (40, 30))
        (folder / f"{name}.txt").write_text("\n".join(map(" ".join, words)))
    matrix, bias = (generator.standard_normal(shape).astype(np.float32) for shape in ((64, 32), 32))
    classifier(folder / "net.onnx", matrix, bias)
    inputs = generator.standard_normal((400, 64)).astype(np.float32)
    ranked = np.sort(inputs @ matrix + bias, axis=1)
    clear = inputs[ranked[:, -1] - ranked[:, -2] > 1]  # so that rounding does not change the answer
    np.savez(folder / "train.npz", x=clear)
    np.savez(folder / "test.npz", x=clear, labels=(clear @ matrix + bias).argmax(1))
    return folder


def test_examples_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_runtime_check: None
) -> None:
    monkeypatch.chdir(place)
    for example in EXAMPLES:
        program, *arguments = shlex.split(example)
        assert program == "quantcli"
        quick = ["--runs", "3"] if arguments[0] == "bench" else []
        assert main([*arguments, *quick]) == 0, (example, capsys.readouterr().err)
