"""Files that are whole or not there, and targets that may be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from quantcli.errors import InputError, UsageError
from quantcli.system.files import check_target, explain, force_to_disk, whole_file


def test_a_file_appears_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_after_an_error_there_is_what_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyError), whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert [*tmp_path.iterdir()] == []


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "file")
    with whole_file(link) as unfinished:
        unfinished.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "new"


def test_what_is_no_file_is_written_straight() -> None:
    null = Path("/dev/null")
    with whole_file(null) as unfinished:
        assert unfinished == null
        unfinished.write_text("gone")
    assert null.is_char_device()


@pytest.mark.parametrize("name", ["no/file", "a-file/file", "folder"])
def test_an_error_names_what_was_asked_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=str(tmp_path / name)) as caught, whole_file(tmp_path / name) as unfinished:
        unfinished.write_text("new")
    assert caught.value.filename == str(tmp_path / name)


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "file"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")


def test_targets_that_hold_or_lie_in_the_input_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    check_target(tmp_path / "out", source, force=False)
    for target in (source, source / "out", tmp_path):
        with pytest.raises(UsageError, match="overlap"):
            check_target(target, source, force=True)
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="exists"):
        check_target(tmp_path / "out", source, force=False)
    check_target(tmp_path / "out", source, force=True)


def test_errors_of_the_system_in_words(tmp_path: Path) -> None:
    full = explain(OSError(28, "No space left on device"), tmp_path)
    assert isinstance(full, InputError)
    assert full.message.startswith("The disk is full")
    denied = explain(PermissionError(13, "Permission denied", "/x"), tmp_path)
    assert denied.message == "/x cannot be written: Permission denied."


def test_a_disk_that_fails_while_it_is_forced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"), whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("new")
    assert [*tmp_path.iterdir()] == []


def test_a_file_system_that_cannot_force_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", unable)
    with whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "file").read_text() == "new"


def test_copies_of_read_only_files_are_forced(tmp_path: Path) -> None:
    (tmp_path / "folder" / "within").mkdir(parents=True)
    file = tmp_path / "folder" / "within" / "file"
    file.write_text("new")
    file.chmod(0o400)
    force_to_disk(tmp_path / "folder")
