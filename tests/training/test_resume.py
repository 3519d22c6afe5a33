"""What an interrupted training leaves and finds: its checkpoint, what was learned, and who is told how far it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trained_graphs import checkpoints_in_every_step

from quantcli.algorithms import rtn
from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo
from quantcli.planning.plan import LayerPlan
from quantcli.training import resume
from quantcli.training.checkpoint import load_trained, save_trained
from quantcli.training.loop import History
from quantcli.training.parameters import Parameters
from quantcli.training.resume import CheckpointFile
from quantcli.training.run import Run


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints_in_every_step(monkeypatch)
    file = CheckpointFile(tmp_path / "new" / "training.pt")
    assert file.load() is None
    for step in (1, 2):
        file.save_if_due(lambda step=step: {"step": step, "best": [torch.ones(3)]})  # type: ignore[misc]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["training.pt"]
    state = CheckpointFile(tmp_path / "new" / "training.pt").load()
    assert state is not None and state["step"] == 2 and torch.equal(state["best"][0], torch.ones(3))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints_in_every_step(monkeypatch)
    file = CheckpointFile(tmp_path / "training.pt")
    file.save_if_due(lambda: {"step": 1})

    def full(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        file.save_if_due(lambda: {"step": 2})
    assert file.load() == {"step": 1} and [path.name for path in tmp_path.iterdir()] == ["training.pt"]


def test_checkpoints_are_rare_and_the_rarer_the_longer_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = [0.0], []
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    file = CheckpointFile(tmp_path / "training.pt")

    def save_at(second: float, takes: float) -> None:
        now[0] = second

        def state() -> dict[str, Any]:
            saved.append(second)
            now[0] += takes
            return {}

        file.save_if_due(state)

    for second, takes in ((30.0, 0), (30.5, 1.0), (61.0, 0), (62.0, 10.0), (271.0, 0), (272.5, 0)):
        save_at(second, takes)
    # 30 seconds after 0 and after 31.5; 20 times 10 seconds after 72.
    assert saved == [30.5, 62.0, 272.5]


def test_a_run_tells_a_command_how_far_it_is(tmp_path: Path) -> None:
    class Told:
        def __init__(self) -> None:
            self.calls: list[tuple[int, int]] = []
            self.words: list[str] = []

        def __call__(self, done: int, total: int) -> None:
            self.calls.append((done, total))

        def say(self, text: str) -> None:
            self.words.append(text)

    told = Told()
    run = Run.followed_by(told, 3, "cpu", tmp_path / "training.pt")
    for fraction in (0.25, 0.25001, 1.0):
        run.tick(fraction)
    run.say("loss 1")
    assert told.calls == [(2500, 10_000), (10_000, 10_000)] and told.words == ["loss 1"]
    assert (run.seed, run.device, run.checkpoint) == (3, "cpu", tmp_path / "training.pt")
    silent = Run.followed_by(None, 0, "cpu", tmp_path)
    silent.tick(0.5)
    silent.say("nobody hears it")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("input_scale", [None, torch.tensor(0.25)], ids=["weights alone", "inputs, too"])
def test_what_was_learned_comes_back_as_it_was(
    tmp_path: Path, symmetric: bool, input_scale: torch.Tensor | None
) -> None:
    number_format = NumberFormat("int4", Granularity("group", 16), symmetric=symmetric)
    tensor = rtn.run(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), number_format, torch.float16)
    tensor.input_scale = input_scale
    info = TensorInfo("a.weight", (8, 32), "F32", 8 * 32 * 4, tmp_path / "m")
    layer = LayerPlan(info, "linear", "F32", Scheme(number_format), "int4", "rtn")
    history = History("distillation", steps=3, models={"qat": {"loss": 0.5}}, curve=[{"step": 1.0, "loss": None}])
    trained = Parameters({"a.weight": tensor}, {"norm.weight": torch.arange(4.0)})
    save_trained(tmp_path / "scratch" / "trained.safetensors", trained, history)
    again, same = load_trained(tmp_path / "scratch" / "trained.safetensors", {"a.weight": layer})
    assert same == history and again.plain.keys() == {"norm.weight"} and again.quantized.keys() == {"a.weight"}
    assert torch.equal(again.plain["norm.weight"], torch.arange(4.0))
    found = again.quantized["a.weight"]
    assert (found.shape, found.number_format) == (tensor.shape, number_format)
    for part in ("codes", "scale", "zero_point", "input_scale"):
        equal(found, tensor, part)


def equal(found: QuantizedTensor, expected: QuantizedTensor, part: str) -> None:
    one, other = getattr(found, part), getattr(expected, part)
    assert (one is None) == (other is None), part
    assert one is None or (torch.equal(one, other) and one.dtype == other.dtype), part
