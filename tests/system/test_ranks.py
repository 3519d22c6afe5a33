"""Several ranks write what one process writes: statistics, sums, codes, figures; and one that fails ends all."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.artifacts import contents
from support.golden import build
from support.ranks import as_ranks, free_port
from torch import Tensor, nn

import quantcli
from quantcli.algorithms.base import LinearStats
from quantcli.blocks.calls import Call
from quantcli.errors import InputError, QuantcliError
from quantcli.planning.recipe import Recipe
from quantcli.ptq.observe import observe
from quantcli.search.budget import Budget
from quantcli.system import ranks

WORLDS = (2, 3, 4)
WIDTH = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data of the golden artifacts."""
    folder = tmp_path_factory.mktemp("ranks")
    build(folder)
    return folder


@pytest.fixture
def without_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for failures of others between messages: here all have one main thread."""
    monkeypatch.setattr(ranks, "_LOOK_EVERY", 60)


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ranks.rank(), ranks.world(), ranks.started(), ranks.on_this_machine()) == (0, 1, (0, 1), 1)
    assert ranks.gather("mine") == ["mine"] and ranks.first(lambda: 3) == 3
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    assert (ranks.started(), ranks.on_this_machine()) == ((1, 4), 2)

    def cores_before_and_after(_: int) -> tuple[int, int]:
        before = ranks.on_this_machine()
        ranks.go_on_alone("It")
        return before, ranks.on_this_machine()

    assert as_ranks(2, cores_before_and_after) == [(2, 1), None]


@pytest.mark.parametrize("world", [1, *WORLDS, 20])
@pytest.mark.parametrize("count", [0, 1, 7, 16, 41])
def test_parts_and_runs_cover_everything_once(world: int, count: int) -> None:
    def taken(_: int) -> tuple[list[int], list[int], list[int], set[str]]:
        shared = ranks.share({str(number): number % 5 for number in range(count)})
        return list(ranks.part(count)), list(ranks.part(count, 3)), ranks.own_batches(count), shared

    found = as_ranks(world, taken, ends=False)
    for parts in ([parts[0] for parts in found], [parts[1] for parts in found]):
        assert [number for part in parts for number in part] == list(range(count))
    assert all(part[0] % 3 == 0 for _, part, *_ in found if part)
    assert sorted(number for _, _, own, _ in found for number in own) == list(range(count))
    assert sorted(key for *_, shared in found for key in shared) == sorted(map(str, range(count)))


class Block(nn.Module):
    """Two layers of one input, one behind them, and one that some batches do not reach."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "out", "few"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, values: Tensor) -> Tensor:
        values = self.out(torch.tanh(self.q(values)) * self.k(values))
        return values + self.few(values[:1]) if float(values.detach().sum()) > 0 else values


def observed(block: Block, count: int) -> dict[str, LinearStats]:
    """What one rank learns of the layers over all ranks' calls."""
    generator = torch.Generator().manual_seed(1)
    calls = [Call(torch.randn(2, 40, WIDTH, generator=generator)) for _ in range(count)]
    runs = ((number, len(batches)) for number, batches in ranks.runs(count))
    own = (calls[number] for number in ranks.own_batches(count))
    return observe(block, own, ("q", "k", "out", "few"), {"gram", "absmax", "mean_abs", "sample"}, runs)


@pytest.mark.parametrize("count", [1, 5, 37])
@pytest.mark.parametrize("world", WORLDS)
def test_sums_of_layers_inputs_are_the_same_to_the_bit_on_every_rank(world: int, count: int) -> None:
    torch.manual_seed(0)
    block = Block()
    alone = observed(block, count)
    for found in as_ranks(world, lambda _: observed(copy.deepcopy(block), count), ends=False):
        assert found["q"] is found["k"]
        for name, stats in alone.items():
            assert found[name].tokens == stats.tokens
            for field in ("gram", "absmax", "mean_abs", "sample"):
                ours, theirs = getattr(stats, field), getattr(found[name], field)
                assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [1, 5])
def test_statistics_have_the_same_bytes(files: Path, tmp_path: Path, size: int) -> None:
    def run(name: str) -> None:
        data, model = str(files / "pictures.npz"), files / "cnn.onnx"
        quantcli.calibrate(model, data=data, output=tmp_path / name, batch_size=size, samples=23)

    run("1")
    for world in WORLDS:
        as_ranks(world, lambda _, world=world: run(str(world)))
    assert len({(tmp_path / str(world)).read_bytes() for world in (1, *WORLDS)}) == 1


def test_figures_are_the_same(files: Path, tmp_path: Path) -> None:
    data = str(files / "pictures.npz")
    quantcli.convert(files / "cnn.onnx", tmp_path / "int8.onnx", scheme="int8-static", data=data, threads=1)

    def run(_: int) -> str:
        report = quantcli.evaluate(files / "cnn.onnx", [tmp_path / "int8.onnx"], data=data, by_layer=True)
        return report.to_json()

    alone = run(0)
    assert "sqnr_db" in alone
    assert all(as_ranks(world, run) == [alone, *[None] * (world - 1)] for world in (2, 4))


def graph(model: str, data: str, **wishes: object) -> Callable[[Path, Path], object]:
    def run(files: Path, place: Path) -> object:
        return quantcli.convert(files / model, place / "out.onnx", data=files / data, threads=1, **wishes)  # type: ignore[arg-type]

    return run


def folder(model: str, **wishes: object) -> Callable[[Path, Path], object]:
    def run(files: Path, place: Path) -> object:
        given = {key: files / str(value) if key == "data" else value for key, value in wishes.items()}
        return quantcli.convert(files / model, place / "out", threads=1, **given)  # type: ignore[arg-type]

    return run


CALIBRATED = {"scheme": "int4", "group_size": 32, "data": "tokens.npz"}
CASES = {
    "streamed": folder("llama-untyped", scheme="int4", group_size=16),
    "nf4": folder("llama-untyped", scheme="nf4-double"),
    "static graph": graph("cnn.onnx", "pictures.npz", scheme="int8-static"),
    "Hessians of a graph": graph("cnn.onnx", "pictures.npz", scheme="int8-static", algorithm="gptq"),
    "gptq": folder("llama", **CALIBRATED, algorithm="gptq"),
    "awq": folder("llama", **CALIBRATED, algorithm="awq"),
}
SLOW = ("gptq", "awq")


@pytest.mark.parametrize("case", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_artifacts_have_the_same_bytes(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("quantcli.blocks.batches.BATCH_TOKENS", 48)  # four batches
    monkeypatch.setattr("quantcli.conversion.checkpoint.transformers_check._reason_to_skip", skipped)
    written = []
    for world in (1, 2) if case in SLOW else (1, 3):
        place = tmp_path / str(world)
        place.mkdir()
        as_ranks(world, lambda _, place=place: CASES[case](files, place))
        written.append(contents(place))
        assert not [path for path in place.iterdir() if path.name.startswith(".")]
    assert all(each == written[0] for each in written)


def skipped(*_: object) -> object:
    """transformers is not asked."""
    from quantcli.conversion.checkpoint.proof import Skipped

    return Skipped("it is a test")


@pytest.mark.usefixtures("without_looks")
def test_what_fails_on_one_rank_is_told_by_the_first() -> None:
    def run(number: int) -> None:
        if number == 1:
            raise InputError("A sample is damaged.", "Repair it.")
        ranks.gather(None)

    with pytest.raises(InputError, match=r"A sample is damaged \(on rank 1\)\. Repair it\."):
        as_ranks(3, run)


@pytest.mark.usefixtures("without_looks")
def test_a_defect_on_one_rank_is_told_with_its_trace() -> None:
    def run(number: int) -> None:
        if number == 1:
            raise ZeroDivisionError
        ranks.gather(None)

    with pytest.raises(QuantcliError, match="defect of quantcli: ZeroDivisionError") as caught:
        as_ranks(2, run)
    assert caught.value.exit_code == 4
    assert "in run" in caught.value.__notes__[0]


UNSHARED: dict[str, Callable[[Path, Path], object]] = {
    "learns": lambda files, out: quantcli.convert(
        files / "llama", out, data=files / "tokens.npz", samples=4, recipe=LEARNING
    ),
    "budget": lambda files, out: quantcli.convert(files / "llama-untyped", out, budget=Budget(max_size=1 << 20)),
    "container": lambda files, out: quantcli.convert(files / "int4", out, format="gptq"),
}
LEARNING = Recipe(scheme="int4", group_size=16, steps=[{"autoround": {"iterations": 2}}, "tune"])


@pytest.mark.parametrize("work", UNSHARED.values(), ids=UNSHARED)
def test_what_is_not_shared_the_first_rank_does_alone(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_runtime_check: None,
    work: Callable[[Path, Path], object],
) -> None:
    monkeypatch.setattr(ranks, "_LOOK_EVERY", 60)
    if not (files / "int4").exists():
        quantcli.convert(files / "llama", files / "int4", scheme="int4", group_size=32)
    work(files, tmp_path / "one")

    def shared(_: int) -> list[str]:
        work(files, tmp_path / "several")
        return ranks.unshared()

    told, *others = as_ranks(3, shared)
    assert len(told) == 1 and "not shared among the processes of torchrun: the first one did it" in told[0]
    assert others == [None, None]
    assert contents(tmp_path / "one") == contents(tmp_path / "several")
    assert ranks.unshared() == []


#: A command line as one of several processes; what stands before it may change what they do.
RUN = "import os, sys; {before}\nfrom quantcli.cli.app import main; sys.exit(main(sys.argv[1:]))"


def processes(world: int, arguments: list[str], before: str = "pass") -> Iterator[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each of so many processes."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN.format(before=before), *arguments],
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(world)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        yield process.returncode, out, err


@pytest.mark.slow
def test_processes_write_the_bytes_of_one_and_the_first_alone_talks(files: Path, tmp_path: Path) -> None:
    command = ["calibrate", str(files / "cnn.onnx"), "--data", str(files / "pictures.npz"), "--json"]
    quantcli.calibrate(files / "cnn.onnx", data=files / "pictures.npz", output=tmp_path / "1")
    first, second = processes(2, [*command, "-o", str(tmp_path / "2")])
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert first[0] == second[0] == 0
    assert json.loads(first[1])["samples"] == 24
    assert second[1:] == ("", "")


@pytest.mark.slow
def test_the_death_of_a_rank_ends_all_and_the_same_command_continues(files: Path, tmp_path: Path) -> None:
    CASES["streamed"](files, tmp_path)
    clean = contents(tmp_path / "out")
    command = ["convert", str(files / "llama-untyped"), "-o", str(tmp_path / "again"), "--scheme", "int4"]
    command += ["--group-size", "16", "--threads", "1"]
    dies = (
        "from quantcli.conversion.checkpoint.pipeline import Conversion\n"
        "if os.environ['RANK'] == '1': Conversion._verify = lambda *_: os._exit(9)"
    )
    began = time.monotonic()
    first, second = processes(2, command, dies)
    assert second[0] == 9
    assert first[0] == 130
    assert "Rank 1 (process" in first[2] or "Another rank ended without a word" in first[2]
    assert "The same command continues where it stopped." in first[2]
    assert time.monotonic() - began < 60
    journal = (tmp_path / ".again.partial" / "journal-1.jsonl").read_text()
    assert journal.count('"name"') > 1
    assert quantcli.convert(
        files / "llama-untyped", tmp_path / "again", scheme="int4", group_size=16, threads=1
    ).details["verified"]
    assert contents(tmp_path / "again") == clean
