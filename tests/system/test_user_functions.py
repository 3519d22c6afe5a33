"""``package.module:function``: told from paths, loaded from the current folder, refused clearly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quantcli.errors import InputError
from quantcli.system.user_functions import is_function, load_function


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a module of functions, in the current folder."""
    name = f"users_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "code.py").write_text("from os.path import join\nlimit = 3\ndef double(x):\n    return 2 * x\n")
    (tmp_path / name / "broken.py").write_text("raise RuntimeError('no licence\\nline two')\n")
    (tmp_path / name / "needy.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("package.module:function", True),
        ("module:function", True),
        ("module.onnx", False),
        ("C:\\models\\net.onnx", False),
        ("C:/models/net", False),
        ("C:net.onnx", False),
        ("folder/module:function", False),
        ("module:", False),
        (":function", False),
        ("1module:function", False),
    ],
)
def test_functions_are_told_from_paths(spec: str, expected: bool) -> None:
    assert is_function(spec) is expected


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:name").touch()
    assert not is_function("odd:name")
    assert is_function("odd:names")


def test_drive_letters_are_drives_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_function("m:build")
    monkeypatch.setattr("quantcli.system.user_functions._HAS_DRIVES", True)
    assert not is_function("m:build")
    assert is_function("my:build")


def test_the_current_folder_is_importable_and_the_path_is_left_as_it_was(module: str) -> None:
    before = list(sys.path)
    assert load_function(f"{module}.code:double")(4) == 8
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}.absent:double", "There is no module {}.absent"),
        ("no_such_package.code:double", "There is no module no_such_package,"),
        ("{}.code:treble", r"has no treble\. Its own functions: double\."),
        ("{}.code:limit", "is not a function: it is int"),
        ("{}.broken:double", r"cannot be imported: RuntimeError: no licence\."),
        ("{}.needy:double", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("{}.code", "does not name a function"),
    ],
)
def test_failures_say_what_is_wrong(module: str, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message.format(module)):
        load_function(spec.format(module))
