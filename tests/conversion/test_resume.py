"""Interrupted conversions: nothing half-made stands, and the same command continues to the same bytes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from support.artifacts import contents, tensors_of
from support.onnx_models import save_products

from quantcli import convert
from quantcli.conversion.checkpoint import stream
from quantcli.errors import InputError, UsageError
from quantcli.onnx.graph.operands import Operand
from quantcli.onnx.plan.evidence import Made
from quantcli.onnx.rewrite import nbits


@pytest.fixture
def llama(models: Path, no_runtime_check: None) -> Path:
    return models / "llama"


def stop_after(count: int) -> Callable[[int, int], None]:
    """A progress callback that interrupts."""
    calls = itertools.count()

    def progress(_done: int, _total: int) -> None:
        if next(calls) == count:
            raise KeyboardInterrupt

    return progress


def interrupt(source: Path, out: Path, count: int, **options: Any) -> Path:
    """Interrupt a conversion once ``count + 1`` tensors are done; returns its journal."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, threads=1, progress=stop_after(count), **options)
    assert not out.exists()
    return out.parent / f".{out.name}.partial" / "journal.jsonl"


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are converted, as they come."""
    names: list[str] = []

    class Job(stream.LayerJob):
        def run_slab(self, index: int) -> Any:
            names.append(self.layer.info.name)
            return super().run_slab(index)

    monkeypatch.setattr("quantcli.conversion.checkpoint.stream.LayerJob", Job)
    return names


@pytest.mark.parametrize("count", [0, 6, 19])
@pytest.mark.parametrize("torn", ["", '{"name": "model.norm.we'], ids=["clean", "half a line"])
def test_an_interrupted_conversion_continues(
    llama: Path, tmp_path: Path, converted: list[str], count: int, torn: str
) -> None:
    convert(llama, tmp_path / "wanted", scheme="nf4-double")
    everything = converted.copy()
    converted.clear()
    journal = interrupt(llama, tmp_path / "out", count, scheme="nf4-double")
    assert len(journal.read_text().splitlines()) == 1 + count + 1
    with journal.open("a") as stream:
        stream.write(torn)
    # Progress starts with the tensors that are there already; one more is converted.
    interrupt(llama, tmp_path / "out", count + 1, scheme="nf4-double")
    convert(llama, tmp_path / "out", scheme="nf4-double")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wanted"]
    assert converted == everything


def test_another_recipe_does_not_continue(llama: Path, tmp_path: Path) -> None:
    journal = interrupt(llama, tmp_path / "out", 5, scheme="int4")
    before = contents(journal.parent)
    for other in ({"scheme": "int8"}, {"scheme": "int4", "skip": ["lm_head"]}, {"scheme": "int4", "algorithm": "rtn"}):
        with pytest.raises(UsageError, match=r"begun with another recipe, input or version. Use --force"):
            convert(llama, tmp_path / "out", **other)
        assert contents(journal.parent) == before
    convert(llama, tmp_path / "out", scheme="int8", force=True)
    convert(llama, tmp_path / "wanted", scheme="int8")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert not journal.parent.exists()


def test_a_changed_input_does_not_continue(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    save_file(tensors_of(llama), source)
    interrupt(source, tmp_path / "out", 5, scheme="int4")
    save_file({name: part + 1 for name, part in tensors_of(llama).items()}, source)
    with pytest.raises(UsageError, match="another recipe, input or version"):
        convert(source, tmp_path / "out", scheme="int4")


def test_two_processes_do_not_write_one_output(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".out.partial"
    folder.mkdir()
    with FileLock(folder / "lock"), pytest.raises(InputError, match="Another process is writing"):
        convert(llama, tmp_path / "out", scheme="int4")
    assert folder.exists()


# The same with real processes, which are stopped from outside.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose conversion takes some seconds; no config.json, so no check by transformers."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i:02}.weight": torch.randn(512, 1024, generator=generator).bfloat16() for i in range(80)}
    save_file(weights, folder / "model.safetensors")
    return folder


def command(source: Path, out: Path) -> list[str]:
    arguments = ["convert", str(source), "-o", str(out), "--scheme", "int4", "--threads", "2"]
    return [sys.executable, "-m", "quantcli", *arguments]


def stop(arguments: list[str], journal: Path, lines: int, number: signal.Signals) -> tuple[int, str]:
    """Start a conversion and send it a signal once its journal has that many lines."""
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background has them ignore interrupts, and so would the child.
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(arguments, **options) as process:
        while not journal.exists() or journal.read_text().count("\n") < lines:
            assert process.poll() is None, "it ended before it could be stopped"
            time.sleep(0.002)
        os.kill(process.pid, number)
        _, talk = process.communicate()
        return process.returncode, talk


def test_kill_and_again(large: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    status, _ = stop(command(large, out), partial / "journal.jsonl", 6, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    for place in (out, tmp_path / "wanted"):
        convert(large, place, scheme="int4")
    assert contents(out) == contents(tmp_path / "wanted")
    assert not partial.exists()


def test_a_graph_is_continued_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made of weights is not made again, and the bytes are those of a conversion that nobody stopped."""
    source, partial = save_products(tmp_path / "m.onnx", layers=24, width=768), tmp_path / ".out.onnx.partial"
    arguments = ["convert", str(source), "-o", str(tmp_path / "out.onnx"), "--scheme", "int4"]
    status, _ = stop([sys.executable, "-m", "quantcli", *arguments], partial / "journal.jsonl", 6, signal.SIGKILL)
    assert status == -signal.SIGKILL and not (tmp_path / "out.onnx").exists()
    done = (partial / "journal.jsonl").read_text().count("\n") - 1
    with pytest.raises(UsageError, match="begun with another recipe, input or version"):
        convert(source, tmp_path / "out.onnx", scheme="int8")
    convert(source, tmp_path / "out.onnx", scheme="int4", dry_run=True)
    made: list[str] = []
    packed = nbits._packed

    def pack(operand: Operand, *more: Any) -> Made:
        made.append(operand.value.name or "")
        return packed(operand, *more)

    monkeypatch.setattr(nbits, "_packed", pack)
    # Codes that the disk did not keep are made again.
    with (partial / "scratch" / "codes").open("r+b") as codes:
        codes.write(b"damaged")
    convert(source, tmp_path / "out.onnx", scheme="int4")
    assert made[0] == "w0" and len(made) == 24 - done + 1
    convert(source, tmp_path / "wanted.onnx", scheme="int4")
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "wanted.onnx").read_bytes()
    assert not partial.exists()


@pytest.mark.slow
def test_interrupt_terminate_kill_and_again(large: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    lines = 3
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        status, talk = stop(command(large, out), partial / "journal.jsonl", lines, number)
        assert [path.name for path in tmp_path.iterdir()] == [partial.name]
        assert status == (-number if number == signal.SIGKILL else 130), talk
        lines = (partial / "journal.jsonl").read_text().count("\n") + 3
    subprocess.run(command(large, out), check=True, capture_output=True)
    convert(large, tmp_path / "wanted", scheme="int4")
    assert contents(out) == contents(tmp_path / "wanted")
