"""The training loop on a model that is easily computed by hand: order, schedule, what is kept, interruptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, inf, isnan, nan, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trained_graphs import checkpoints_in_every_step
from torch import Tensor

from quantcli.algorithms.qat import Options as QatOptions
from quantcli.errors import InputError
from quantcli.training.loop import Defaults, History, Training
from quantcli.training.objective import Batch, Objective
from quantcli.training.run import Run

CLASSES, WIDTH, COUNT = 5, 8, 40
DEFAULTS = Defaults(epochs=3, batch_size=4, learning_rate=0.05, scale_learning_rate=0.01, held_out=0.2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rows:
    """Samples ``x`` of one or more lengths; what was asked for is noted."""

    def __init__(self, count: int = COUNT, *, fixed_batch: int | None = None, ragged: bool = False) -> None:
        self.fixed_batch = fixed_batch
        self.samples = [random(1 + (number % 3 if ragged else 0), WIDTH, seed=number) for number in range(count)]
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        self.asked.append(list(numbers))
        for length in sorted({len(self.samples[number]) for number in numbers}):
            alike = sorted(number for number in numbers if len(self.samples[number]) == length)
            x = torch.stack([self.samples[number] for number in alike]).mean(1)
            yield Batch(alike, {"x": x, "numbers": torch.tensor(alike)})


class Toy:
    """A linear layer that starts beside the one it learns from."""

    def __init__(self, away: float = 0.5, width: int = WIDTH) -> None:
        self.wanted = random(CLASSES, width)
        self.weight = (self.wanted + away * random(CLASSES, width, seed=1)).requires_grad_()
        self.factor = torch.ones(CLASSES, 1, requires_grad=True)
        self.bias = torch.zeros(CLASSES, requires_grad=True)
        self.seen: list[list[int]] = []
        self.spoil: Callable[[int, Tensor], Tensor] = lambda _, logits: logits

    def weights(self) -> list[Tensor]:
        return [self.weight]

    def factors(self) -> list[Tensor]:
        return [self.factor]

    def values(self) -> list[Tensor]:
        return [self.bias]

    def student(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = inputs["x"] @ (self.weight * self.factor).T + self.bias
        if torch.is_grad_enabled():
            self.seen.append(inputs["numbers"].tolist())
            logits = self.spoil(len(self.seen), logits)
        return {"logits": logits}

    def teacher(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": inputs["x"] @ self.wanted.T}

    def learned(self) -> list[Tensor]:
        return [each.detach().clone() for each in (self.weight, self.factor, self.bias)]


@dataclass
class Case:
    """A training and all that belongs to it."""

    place: Path
    toy: Toy = field(default_factory=Toy)
    data: Rows = field(default_factory=Rows)
    seed: int = 0
    tick: Callable[[float], None] = lambda _: None
    said: list[str] = field(default_factory=list)

    def prepare(self, **options: Any) -> Training:
        wishes = QatOptions.model_validate(options)
        objective = Objective(wishes, labelled=False, scores="logits")
        run = Run(self.seed, "cpu", self.place / "state.pt", self._ticked, self.said.append)
        return Training(self.toy, self.data, objective, wishes, DEFAULTS, run)

    def _ticked(self, done: float) -> None:
        self.tick(done)

    def run(self, **options: Any) -> History:
        return self.prepare(**options).run()

    def loss(self) -> float:
        """Divergence of the held-out samples as it is now, in float64."""
        held_out = self.prepare().held_out
        x = torch.stack([self.data.samples[number].mean(0) for number in held_out]).double()
        p = (x @ self.toy.wanted.double().T).softmax(-1)
        weight, factor, bias = (each.double() for each in self.toy.learned())
        q = (x @ (weight * factor).T + bias).softmax(-1)
        return float((p * (p / q).log()).sum(-1).mean())


def test_rates_rise_in_a_line_and_fall_in_a_cosine(tmp_path: Path) -> None:
    run = Case(tmp_path)
    prepared = run.prepare(steps=20, warm_up=0.25, learning_rate=0.4, scale_learning_rate=0.1)
    rates: list[list[float]] = []

    def noted(_: int, logits: Tensor) -> Tensor:
        rates.append([group["lr"] for group in prepared.optimizer.param_groups])
        return logits

    run.toy.spoil = noted
    prepared.run()
    shares = [(step + 1) / 5 for step in range(5)] + [0.5 * (1 + cos(pi * step / 15)) for step in range(15)]
    assert len(rates) == 20
    for share, found in zip(shares, rates, strict=True):
        assert found == pytest.approx([0.4 * share, 0.1 * share, 0.1 * share])


def test_every_sample_comes_once_in_an_epoch_and_those_held_out_never(tmp_path: Path) -> None:
    run = Case(tmp_path)
    prepared = run.prepare(epochs=3)
    history = prepared.run()
    assert len(prepared.held_out) == 8 and sorted(prepared.train_samples + prepared.held_out) == list(range(COUNT))
    assert history.steps == 24 and history.epochs == 3 and history.stopped == "finished"
    seen = [number for step in run.toy.seen for number in step]
    epochs = [seen[start : start + 32] for start in range(0, 96, 32)]
    assert all(sorted(epoch) == sorted(prepared.train_samples) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other, same = Case(tmp_path, seed=1), Case(tmp_path)
    assert other.prepare().held_out != prepared.held_out == same.prepare().held_out
    other.run(epochs=3)
    same.run(epochs=3)
    assert other.toy.seen != run.toy.seen == same.toy.seen


def test_accumulated_batches_are_as_one_and_no_more_is_held_at_once(tmp_path: Path) -> None:
    whole, parts = Case(tmp_path), Case(tmp_path)
    first = whole.run(epochs=2, batch_size=8)
    second = parts.run(epochs=2, batch_size=2, accumulate=4)
    assert first.steps == second.steps == 8
    assert max(len(numbers) for numbers in parts.data.asked) == 2
    assert max(len(numbers) for numbers in parts.toy.seen) == 2
    for one, other in zip(whole.toy.learned(), parts.toy.learned(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    # Lengths that differ leave the mean of a step what it is.
    ragged, apart = (Case(tmp_path, data=Rows(ragged=True)) for _ in range(2))
    ragged.run(steps=3, batch_size=9)
    apart.run(steps=3, batch_size=3, accumulate=3)
    torch.testing.assert_close(ragged.toy.weight, apart.toy.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_learns_and_keeps_what_did_best(tmp_path: Path, optimizer: str) -> None:
    run = Case(tmp_path)
    before = run.loss()
    history = run.run(epochs=12, optimizer=optimizer)
    after = run.loss()
    assert history.models["ptq"]["loss"] == pytest.approx(before, rel=1e-4)
    assert history.models["qat"]["loss"] == pytest.approx(after, rel=1e-4)
    assert after < 0.3 * before
    assert history.models["original"]["loss"] == pytest.approx(0, abs=1e-6)
    judged = {point["step"]: point["held_out_loss"] for point in history.curve if point["held_out_loss"] is not None}
    assert judged[history.best_step] == min(judged.values()) == history.models["qat"]["loss"]  # type: ignore[type-var]
    assert len(run.said) == len(judged) and all(text.startswith("loss ") for text in run.said)
    assert history.loss == "distillation" and set(history.models["qat"]) == {"loss", "top1_agreement"}


def test_what_only_does_worse_leaves_the_start(tmp_path: Path) -> None:
    run = Case(tmp_path, Toy(away=0.0))
    start = run.toy.learned()
    history = run.run(epochs=2, learning_rate=5.0, scale_learning_rate=2.0)
    assert history.best_step == 0 and history.models["qat"] == history.models["ptq"]
    assert all(torch.equal(one, other) for one, other in zip(start, run.toy.learned(), strict=True))


def test_factors_stay_within_their_limits(tmp_path: Path) -> None:
    run = Case(tmp_path)
    run.run(steps=30, scale_learning_rate=3.0, held_out=0)
    assert float(run.toy.factor.detach().min()) >= 0.5 and float(run.toy.factor.detach().max()) <= 2.0


def test_without_samples_held_out_the_last_state_is_kept(tmp_path: Path) -> None:
    run = Case(tmp_path)
    history = run.run(epochs=2, held_out=0)
    assert history.best_step == history.steps == 20
    assert history.models["qat"] == {"loss": None}
    assert not torch.equal(run.toy.weight, Toy().weight)


def test_patience_ends_it(tmp_path: Path) -> None:
    run = Case(tmp_path, Toy(away=0.0))
    history = run.run(epochs=50, learning_rate=1.0, patience=3, evaluate_every=2)
    assert (history.stopped, history.steps, history.best_step) == ("early", 6, 0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_longer_finite_ends_it_and_the_best_state_is_kept(tmp_path: Path, what: str) -> None:
    """A loss that becomes NaN, or a slope that does while the loss is fine."""

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * inf

    def spoiled(step: int, logits: Tensor) -> Tensor:
        if step != 14:
            return logits
        return logits * nan if what == "loss" else Slope.apply(logits)  # type: ignore[no-any-return,no-untyped-call]

    run, clean = Case(tmp_path), Case(tmp_path)
    run.toy.spoil = spoiled
    history = run.run(steps=20, evaluate_every=3)
    assert (history.stopped, history.steps, history.best_step) == ("not finite", 13, 12)
    (warning,) = history.warnings
    assert "in step 14 of 20" in warning and "step 12" in warning and "learning_rate" in warning
    assert ("became nan" in warning) == (what == "loss")

    def stop(done: float) -> None:
        if done == pytest.approx(12 / 20):
            raise KeyboardInterrupt

    clean.tick = stop
    with pytest.raises(KeyboardInterrupt):
        clean.run(steps=20, evaluate_every=3)
    assert all(torch.equal(one, other) for one, other in zip(run.toy.learned(), clean.toy.learned(), strict=True))
    assert not isnan(history.models["qat"]["loss"] or nan)


def test_what_is_never_finite_is_an_error(tmp_path: Path) -> None:
    run = Case(tmp_path)
    run.toy.spoil = lambda _, logits: logits * nan
    with pytest.raises(InputError, match="became nan in step 1 of 24, before the model was better") as caught:
        run.run()
    assert "learning_rate" in (caught.value.hint or "")


@pytest.mark.parametrize("stop", [1, 7, 8, 17, 23])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_that_is_continued_does_what_it_would_have_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, stop: int
) -> None:
    options: dict[str, Any] = {"epochs": 3, "optimizer": optimizer, "evaluate_every": 3}
    whole = Case(tmp_path / "whole")
    expected = whole.run(**options)
    checkpoints_in_every_step(monkeypatch)
    interrupted(Case(tmp_path), stop, options)
    assert (tmp_path / "state.pt").exists() == (stop > 1) and not list(tmp_path.glob("*.partial"))
    again = Case(tmp_path)
    assert again.run(**options) == expected
    assert all(torch.equal(one, other) for one, other in zip(whole.toy.learned(), again.toy.learned(), strict=True))
    assert len(again.toy.seen) == 24 - (stop - 1)


def interrupted(run: Case, stop: int, options: dict[str, Any]) -> None:
    """Interrupt a training of 24 steps in a step, before its checkpoint."""

    def tick(done: float) -> None:
        if round(done * 24) == stop:
            raise KeyboardInterrupt

    run.tick = tick
    with pytest.raises(KeyboardInterrupt):
        run.run(**options)


class Wide(Toy):
    """Its products are so wide that their last bits depend on how many rows are taken at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = random(1000, WIDTH, seed=9)

    def teacher(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wide = torch.nn.functional.gelu(inputs["x"] @ self.mixing.T)
        return {"logits": wide @ (self.mixing @ self.wanted.T) / 1000}


def test_lengths_that_differ_change_nothing_about_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the original returns depends, in its last bits, on the batch that a sample was in."""
    whole = Case(tmp_path / "whole", Wide(), Rows(ragged=True))
    expected = whole.run(epochs=3)
    checkpoints_in_every_step(monkeypatch)
    interrupted(Case(tmp_path, Wide(), Rows(ragged=True)), 14, {"epochs": 3})
    again = Case(tmp_path, Wide(), Rows(ragged=True))
    assert again.run(epochs=3) == expected
    assert all(torch.equal(one, other) for one, other in zip(whole.toy.learned(), again.toy.learned(), strict=True))


@pytest.mark.parametrize("room", [0, 200, 1 << 20])
def test_the_original_runs_once_for_a_sample_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr("quantcli.training.teacher._KEPT_BYTES", room)
    run, taught = Case(tmp_path), Counter[int]()
    original = run.toy.teacher

    def noted(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        taught.update(inputs["numbers"].tolist())
        return original(inputs)

    monkeypatch.setattr(run.toy, "teacher", noted)
    prepared = run.prepare(epochs=3)
    prepared.run()
    counts = {taught[number] for number in prepared.train_samples}
    assert counts == ({1} if room > 200 else {3})


def test_one_run_is_like_another(tmp_path: Path) -> None:
    first, second = Case(tmp_path), Case(tmp_path)
    assert first.run(epochs=2) == second.run(epochs=2)
    assert all(torch.equal(one, other) for one, other in zip(first.toy.learned(), second.toy.learned(), strict=True))


def test_a_model_that_takes_a_fixed_number_of_samples(tmp_path: Path) -> None:
    run = Case(tmp_path, data=Rows(30, fixed_batch=6))
    prepared = run.prepare(epochs=2, batch_size=4)
    assert (len(prepared.held_out), len(prepared.train_samples), prepared.batch_size) == (6, 24, 6)
    prepared.run()
    assert {len(numbers) for numbers in run.toy.seen} == {6} and len(run.toy.seen) == 8


@pytest.mark.parametrize(("count", "fixed", "says"), [(1, None, "1 sample"), (6, 6, "6 samples"), (1, 1, "1 sample")])
def test_too_few_samples(tmp_path: Path, count: int, fixed: int | None, says: str) -> None:
    with pytest.raises(InputError, match=f"The data has {says}, and training needs some to learn from") as caught:
        Case(tmp_path, data=Rows(count, fixed_batch=fixed)).prepare()
    assert "held_out: 0" in (caught.value.hint or "")
    assert Case(tmp_path, data=Rows(count, fixed_batch=fixed)).prepare(held_out=0).train_samples


def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    run = Case(tmp_path, data=Rows(6))
    history = run.run(epochs=4, batch_size=64)
    assert history.steps == 4 and {len(numbers) for numbers in run.toy.seen} == {5}
