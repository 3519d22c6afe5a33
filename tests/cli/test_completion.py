"""Completion in the shell."""

from __future__ import annotations

from pathlib import Path

import pytest
import shellingham

from quantcli.cli.app import main
from quantcli.cli.choices import CHOICES


def completed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash is offered for the last word of a line."""
    monkeypatch.setenv("_QUANTCLI_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quantcli ca", ["calibrate"]),
        ("quantcli convert m --scheme int8-", ["int8-dynamic", "int8-static"]),
        ("quantcli inspect m -s n", ["nf4", "nf4-double"]),
        ("quantcli convert m --algorithm ", CHOICES["algorithm"]()),
        ("quantcli convert m --format ", CHOICES["format"]()),
        ("quantcli convert m --target ", CHOICES["target"]()),
        ("quantcli eval m --task lang", ["language-modeling"]),
        ("quantcli calibrate m --me", ["--method"]),
        ("quantcli inspect ./mod", []),  # the shell itself completes files
    ],
)
def test_words_are_completed(
    line: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(line, monkeypatch, capsys) == words


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def in_shell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shellingham, "detect_shell", lambda: (name, f"/bin/{name}"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_for_the_shell_in_use(
    shell: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_shell(shell, monkeypatch)
    assert main(["--show-completion"]) == 0
    script = capsys.readouterr().out.strip()
    assert "_QUANTCLI_COMPLETE" in script
    assert main(["--install-completion"]) == 0
    said = capsys.readouterr().out
    (written,) = (path for path in home.rglob("*") if path.is_file() and "quantcli" in path.name)
    assert written.read_text().strip() == script
    assert f"Completion for {shell} is in {written}" in said


def test_what_cannot_be_installed_is_said_in_words(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_shell("csh", monkeypatch)
    assert main(["--install-completion"]) == 3
    assert "Error: There is no completion for csh. " in capsys.readouterr().err

    def unknown() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", unknown)
    assert main(["--show-completion"]) == 3
    assert "_QUANTCLI_COMPLETE=source_bash quantcli" in capsys.readouterr().err
    in_shell("bash", monkeypatch)
    (home / ".bash_completions").write_text("a file where a folder is to be")
    assert main(["--install-completion"]) == 3
    assert "cannot be written" in capsys.readouterr().err
