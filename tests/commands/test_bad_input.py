"""Bad input: one clear paragraph, the right exit status, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantcli import convert
from quantcli.checkpoint.positional import PositionalFile
from quantcli.cli.app import main

WEIGHTS = {"up.weight": torch.linspace(-1, 1, 64 * 128).reshape(64, 128), "up.bias": torch.zeros(64)}
Run = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `convert` (or another command), which must fail cleanly, and returns what it said."""

    def run(model: Path, *options: str, status: int = 3, command: str = "convert") -> str:
        # Where an option is given twice, the last one counts.
        defaults = ["-o", str(tmp_path / "out"), "--scheme", "int4"] if command == "convert" else []
        before = sorted(tmp_path.rglob("*"))
        assert main([command, str(model), *defaults, *options]) == status
        talk = capsys.readouterr()
        assert talk.out == ""
        assert talk.err.startswith("Error: ") and talk.err.count("Error") == 1
        assert "\n\n" not in talk.err and "Traceback" not in talk.err
        assert sorted(tmp_path.rglob("*")) == before
        return " ".join(talk.err.split())

    return run


def plain(path: Path, **changed: torch.Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(WEIGHTS | {name.replace("__", "."): tensor for name, tensor in changed.items()}, path)
    return path


def handmade(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def truncated(folder: Path) -> Path:
    path = plain(folder / "model.safetensors")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    return path


def sharded(folder: Path) -> Path:
    """A folder of two shards and an index."""
    save_file({"a.weight": WEIGHTS["up.weight"]}, folder / "one.safetensors")
    save_file({"b.weight": WEIGHTS["up.weight"]}, folder / "two.safetensors")
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def missing_shard(folder: Path) -> Path:
    (sharded(folder) / "two.safetensors").unlink()
    return folder


def absent_tensor(folder: Path) -> Path:
    index = sharded(folder) / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("a.weight", "c.weight"))
    return folder


def cut_torch_file(folder: Path) -> Path:
    torch.save(WEIGHTS, folder / "model.pt")
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[: len(data) // 2])
    return folder / "model.pt"


class Exploit:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def pickle_with_code(folder: Path) -> Path:
    torch.save(WEIGHTS | {"extra": Exploit(folder / "marker")}, folder / "model.bin")
    return folder / "model.bin"


def bare_pickle_with_code(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(pickle.dumps(Exploit(folder / "marker")))
    return folder / "model.pt"


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def header(content: Any, data: bytes = b"") -> Callable[[Path], Path]:
    return lambda folder: handmade(folder / "model.safetensors", content, data)


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, "it is truncated"),
    "cut inside the header": (written("m.safetensors", b"\x40\0\0\0\0\0\0\0{"), "claims 64 bytes, and 1 follow"),
    "empty file": (written("m.safetensors", b""), "it has 0 bytes"),
    "huge header": (written("m.safetensors", b"\xff" * 9), "its header claims 18446744073709551615 bytes"),
    "not JSON": (header(b"{nonsense}"), "its header is not JSON"),
    "wrong size": (header({"a": entry(0, 12)}, bytes(12)), "tensor 'a' spans 12 bytes, but F32 [4] needs 16"),
    "beyond the end": (header({"a": entry(0, 16), "b": entry(16, 32)}, bytes(16)), "it is truncated"),
    "overlap": (header({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)), "tensor 'b' at bytes 8 to 24 overlaps"),
    "gap": (header({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)), "leaves a gap before it"),
    "negative": (header({"a": entry(-16, 0)}, bytes(16)), "impossible offsets [-16, 0]"),
    "unknown dtype": (header({"a": entry(0, 16, "F42")}, bytes(16)), "tensor 'a' has the unknown dtype 'F42'"),
    "no tensor": (header({}), "holds no tensor"),
    "missing shard": (missing_shard, "names the shard two.safetensors, which is not there"),
    "absent tensor": (absent_tensor, "says that 'c.weight' is in one.safetensors, which does not hold it"),
    "truncated torch file": (cut_torch_file, "is a truncated or corrupt torch file"),
    "pickle with code": (pickle_with_code, "quantcli reads tensors only and never runs code from a file"),
    "bare pickle with code": (bare_pickle_with_code, "never runs code from a file"),
    "absent": (lambda folder: folder / "absent", "does not exist. A MODEL is a folder"),
    "empty folder": (lambda folder: folder, "is not a model: it holds no safetensors or pytorch_model.bin file"),
    "text file": (written("notes.txt", b"hello"), "is not a kind of model that quantcli knows"),
    "gguf": (written("model.gguf", b"GGUF"), "is damaged: its version takes 4 bytes, and 0 are left"),
    "damaged index": (written("model.safetensors.index.json", b"{"), "is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["convert", "inspect"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_a_model_that_cannot_be_read(tmp_path: Path, refused: Run, case: str, command: str) -> None:
    build, said = UNREADABLE[case]
    model = build(tmp_path)
    message = refused(model, command=command)
    assert said in message and str(model.parent) in message
    assert not (tmp_path / "marker").exists()


def test_the_exploit_would_work(tmp_path: Path) -> None:
    torch.load(pickle_with_code(tmp_path), weights_only=False)
    assert (tmp_path / "marker").exists()


def with_value(value: float, row: int = 63) -> torch.Tensor:
    weight = WEIGHTS["up.weight"].clone()
    weight[row, 5] = value
    return weight


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-dynamic", "nf4", "nf4-double", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite(tmp_path: Path, refused: Run, scheme: str, value: float) -> None:
    model = plain(tmp_path / "model.safetensors", up__weight=with_value(value))
    message = refused(model, "--scheme", scheme)
    assert f"up.weight holds {value} at row 63, column 5: the model is damaged or diverged." in message


def test_a_value_that_is_not_finite_among_what_is_left(tmp_path: Path, refused: Run) -> None:
    model = plain(tmp_path / "model.safetensors", up__bias=torch.full((64,), float("nan")))
    assert "up.bias holds nan at row 0" in refused(model)


def test_the_row_is_counted_from_the_start_of_the_tensor(
    tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcli.conversion.checkpoint.writer.SLAB_ELEMENTS", 1000)
    model = plain(tmp_path / "model.safetensors", up__weight=with_value(float("nan"), row=40))
    for scheme in ("int4", "fp16"):
        assert "up.weight holds nan at row 40, column 5" in refused(model, "--scheme", scheme)


@pytest.mark.parametrize("options", [["--scheme", "fp16"], ["--scheme", "int4", "--rest", "fp16"]])
def test_a_value_too_large_for_fp16(tmp_path: Path, refused: Run, options: list[str]) -> None:
    large = torch.full((64,), 70000.0)
    model = plain(tmp_path / "model.safetensors", up__bias=large)
    message = refused(model, *options)
    assert "up.bias has values too large for F16: they would become infinite. Use bf16" in message


@pytest.mark.parametrize("scheme", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("value", [70000.0, -1e6, 1e30])
def test_a_weight_that_would_decode_to_infinity(tmp_path: Path, refused: Run, scheme: str, value: float) -> None:
    model = plain(tmp_path / "model.safetensors", up__weight=with_value(value))
    assert "up.weight has values too large for F16" in refused(model, "--scheme", scheme, "--rest", "fp16")


def test_an_already_quantized_model(tmp_path: Path, refused: Run) -> None:
    quantized = tmp_path / "quantized.safetensors"
    convert(plain(tmp_path / "m.safetensors"), quantized, scheme="int4")
    message = refused(quantized, "--scheme", "int8")
    assert "already quantized (compressed-tensors). Convert the original weights instead." in message


def test_nothing_to_quantize(tmp_path: Path, refused: Run) -> None:
    save_file({"norm.weight": torch.ones(8)}, tmp_path / "m.safetensors")
    assert "Nothing in this model can be quantized with int4" in refused(tmp_path / "m.safetensors")


# The output.


def test_an_output_that_exists(tmp_path: Path, refused: Run) -> None:
    model = plain(tmp_path / "m.safetensors")
    (tmp_path / "out").write_text("precious")
    assert "exists. Use --force to replace it." in refused(model, status=2)
    assert (tmp_path / "out").read_text() == "precious"


def test_an_output_that_is_the_input(tmp_path: Path, refused: Run) -> None:
    model = plain(tmp_path / "m.safetensors")
    before = model.read_bytes()
    assert "overlap. Choose another place for -o." in refused(model, "-o", str(model), "--force", status=2)
    assert model.read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path: Path, refused: Run) -> None:
    model = plain(tmp_path / "m.safetensors")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", Path("/proc/quantcli/out")):
        message = refused(model, "-o", str(place))
        assert "cannot be written: " in message and message.endswith("Choose another -o.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path, refused: Run) -> None:
    model = plain(tmp_path / "m.safetensors")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written: Permission denied" in refused(model, "-o", str(tmp_path / "locked" / "out"))


def test_too_little_space_is_refused_before_work_starts(
    tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    message = refused(plain(tmp_path / "m.safetensors"))
    assert "The disk is full: " in message and "and 1,000 are free. Free some space" in message


@pytest.mark.parametrize("nth", range(5))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way(
    tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch, nth: int, code: int
) -> None:
    model = plain(tmp_path / "m.safetensors")
    write, clean = PositionalFile.write, iter(range(nth))

    def fill(self: PositionalFile, offset: int, data: bytes | memoryview) -> None:
        if next(clean, None) is None:
            raise OSError(code, os.strerror(code))
        write(self, offset, data)

    monkeypatch.setattr(PositionalFile, "write", fill)
    assert "The disk is full: " in refused(model, "--threads", "1")


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_a_file_that_may_not_grow(tmp_path: Path, refused: Run, output: str) -> None:
    model = plain(tmp_path / "m.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        message = refused(model, "-o", str(tmp_path / output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "The disk is full: " in message


# The command line.


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--scheme", "int5"], 2, "unknown scheme 'int5'"),
        (
            ["--format", "ggml"],
            2,
            "Unknown format 'ggml'. Known: compressed-tensors, gptq, awq, bitsandbytes, safetensors, gguf, onnx.",
        ),
        (["--algorithm", "quip"], 2, "Unknown algorithm 'quip'"),
        (["--rest", "fp8"], 2, "rest: "),
        (["--group-size", "100"], 2, "The group size 100 does not divide the columns of 1 layers: up."),
        (["--skip", "down"], 2, "'down' matches no layer."),
        (["--max-memory", "lots"], 2, "--max-memory: 'lots' is not a size such as 80MB"),
        (["--max-memory", "1MB"], 2, "--max-memory 1 MB is too little: up.weight needs"),
        (["--threads", "0"], 2, "--threads"),
        (["--recipe", "absent.yaml"], 3, "The recipe absent.yaml cannot be read"),
        (["--shceme", "int4"], 2, "No such option: --shceme"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_meant(tmp_path: Path, refused: Run, options: list[str], status: int, said: str) -> None:
    assert said in refused(plain(tmp_path / "m.safetensors"), *options, status=status)


def test_no_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(plain(tmp_path / "m.safetensors")), "-o", str(tmp_path / "out")]) == 2
    assert "No scheme is given. Choose one with --scheme: fp16" in " ".join(capsys.readouterr().err.split())


def test_an_attention_mask_may_be_infinite_and_a_nan_may_not(tmp_path: Path, refused: Run) -> None:
    mask = torch.zeros(4, 4).masked_fill_(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    convert(plain(tmp_path / "mask.safetensors", attn_mask=mask), tmp_path / "fine", scheme="int4")
    mask[0, 0] = float("nan")
    assert "attn_mask holds nan at row 0" in refused(plain(tmp_path / "damaged.safetensors", attn_mask=mask))
