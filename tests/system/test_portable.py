"""On systems that lack what Linux has, conversions work, clear up and write the same bytes."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.onnx_models import save_products
from support.portable import lacking_what_linux_has, open_files_are_kept
from support.stages import STAGES

from quantcli import convert
from quantcli.checkpoint import positional
from quantcli.checkpoint.positional import PositionalFile
from quantcli.cli.app import main
from quantcli.system import files, hardware, ranks
from quantcli.system.child import Child, ChildFailedError

#: A checkpoint, one with calibration, a single file of another kind, graphs with and without data, and statistics.
COMMANDS = ("checkpoint", "gptq", "gguf", "graph", "graph in a folder", "static graph", "statistics")
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="open files are known by /proc")


def held(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@needs_proc
@pytest.mark.usefixtures("no_runtime_check")
@pytest.mark.parametrize("name", COMMANDS)
def test_without_what_only_linux_has(name: str, inputs: Path, tmp_path: Path) -> None:
    places = tmp_path / "usual", tmp_path / "elsewhere"
    for place in places:
        place.mkdir()
    STAGES[name].run(inputs, places[0])
    with lacking_what_linux_has(), open_files_are_kept() as refused:
        for _ in range(2):  # the second takes the place of the first
            STAGES[name].run(inputs, places[1])
    assert held(places[1]) == held(places[0])
    assert {path.name for path in places[1].iterdir()} == {path.name for path in places[0].iterdir()}
    assert {path.name for path in refused} <= {"lock"}


@needs_proc
def test_an_interrupted_conversion_is_continued_elsewhere(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_runtime_check: None
) -> None:
    wishes: dict[str, Any] = {"scheme": "int4", "group_size": 32, "threads": 1}
    convert(str(inputs / "llama"), output=tmp_path / "whole", **wishes)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with lacking_what_linux_has(), open_files_are_kept():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("quantcli.conversion.checkpoint.pipeline.Conversion._verify", interrupted)
            convert(str(inputs / "llama"), output=tmp_path / "out", **wishes)
        convert(str(inputs / "llama"), output=tmp_path / "out", **wishes)
    assert held(tmp_path / "out") == held(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("has_positional_io", [True, False])
def test_no_read_or_write_is_larger_than_macos_takes(
    has_positional_io: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def watched(name: str, size: Callable[..., int]) -> None:
        call = getattr(os, name)

        def limited(*arguments: Any) -> Any:
            sizes.append(size(*arguments))
            if sizes[-1] > 7:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return call(*arguments)

        monkeypatch.setattr(os, name, limited)

    watched("preadv", lambda _, views, __: len(views[0]))
    watched("pwrite", lambda _, view, __: len(view))
    watched("read", lambda _, size: size)
    watched("write", lambda _, view: len(view))
    monkeypatch.setattr(positional, "_PIECE", 7)
    monkeypatch.setattr(positional, "_HAS_POSITIONAL_IO", has_positional_io)
    file = PositionalFile(tmp_path / "file", write=True)
    file.write(3, bytes(range(40)))
    assert file.read_tensor(3, 40).tolist() == list(range(40))
    assert sizes == [7, 7, 7, 7, 7, 5] * 2
    file.close()


def test_memory_is_counted_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(hardware, "_STATUS", Path("/no such file"))
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3000))
    assert hardware.peak_rss_bytes() == 3000 * 1024
    monkeypatch.setattr(hardware, "sys", SimpleNamespace(platform="darwin"))
    assert hardware.peak_rss_bytes() == 3000
    with lacking_what_linux_has():
        assert hardware.peak_rss_bytes() == 5 << 20
        assert hardware.cpu_name() and hardware.cpu_features() == []
        hardware.release_freed()


def test_a_process_of_this_machine_is_known_to_have_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    host = ranks._machine()
    assert not ranks._is_dead(host, os.getpid())
    child.wait()
    assert ranks._is_dead(host, child.pid)
    assert not ranks._is_dead(f"not {host}", child.pid)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (-11, "it crashed (SIGSEGV)"),
        (-40, "it crashed (signal 40)"),
        (-9, "it was killed, as systems do where memory is short"),
        (0xC0000005, "it crashed (0xC0000005)"),
        (1, "ValueError: no"),
        (None, "ValueError: no"),
    ],
)
def test_how_a_child_ended_is_told_on_every_system(status: int | None, said: str) -> None:
    error = ChildFailedError(status, "ValueError: no")
    assert error.end == said
    assert error.crashed is (said != "ValueError: no")


def test_what_a_child_says_is_read_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    child = Child("support.portable:unlucky", {})
    with pytest.raises(ChildFailedError) as caught:
        child.result(60)
    child.stop()
    assert caught.value.last_line == "ValueError: größer"


def test_texts_of_an_output_have_the_same_bytes_on_every_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open
    asked: list[str | None] = []

    def watched(path: Path, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        asked.append(options.get("newline", rest[2] if len(rest) > 2 else None))
        return opened(path, mode, buffering, *rest, **options)

    monkeypatch.setattr(Path, "open", watched)
    files.write_json(tmp_path / "x.json", {"ö": 1})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "ö": 1\n}\n'.encode()
    assert asked[0] == ""  # else Windows makes two characters of each line end


def test_a_temporary_folder_whose_files_are_in_use_is_no_failure() -> None:
    with open_files_are_kept() as refused:
        folder = files.temporary_folder()
        path = Path(folder.name) / "array.bin"
        np.zeros(8).tofile(path)
        mapped = np.memmap(path)
        folder.cleanup()
        assert set(refused) == {path} and path.exists()
        del mapped
    path.unlink()
    path.parent.rmdir()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_that_the_terminal_cannot_show(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_products(tmp_path / "模型.onnx", layers=1, width=32)
    for arguments in ([], ["--json"]):
        out, talk = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", talk)
        assert main(["inspect", str(model), *arguments]) == 0
    out.flush()
    assert json.loads(out.buffer.getvalue().decode("utf-8"))["models"][0]["path"] == str(model)  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", talk)
    assert main(["inspect", str(tmp_path / "没有.onnx")]) == 3
    talk.flush()
    assert "\\u6ca1\\u6709.onnx" in talk.buffer.getvalue().decode()  # type: ignore[attr-defined]
