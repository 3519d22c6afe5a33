"""The training loop: batches, an optimizer, held-out samples, checkpoints. What is trained is somebody else's affair.

Everything that is drawn at random follows from the seed and the number of the epoch, so that a run that is continued
does what it would have done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantcli.algorithms.qat import Options as QatOptions
from quantcli.errors import InputError
from quantcli.training.objective import Batch, Objective, Outputs
from quantcli.training.optimization import NormalizedSGD, clamp_factors, rate_share

#: Seconds between two checkpoints.
CHECKPOINT_SECONDS = 30.0
#: Where writing one takes long, so many times as long is waited until the next.
_CHECKPOINT_SHARE = 20
#: Points of the training curve between two evaluations are means of several steps; so many in all.
_CURVE_POINTS = 200
#: Outputs of the original model that are kept, in bytes; where there are more of them, it runs anew in every step.
_KEPT_OUTPUT_BYTES = 256 << 20


@dataclass(frozen=True)
class Defaults:
    """What is right for a kind of model where nothing is said."""

    epochs: int
    batch_size: int
    learning_rate: float
    scale_learning_rate: float
    held_out: float = 0.1


class Data(Protocol):
    """Samples of one model, by number."""

    def __len__(self) -> int:
        """How many there are."""

    @property
    def fixed_batch(self) -> int | None:
        """The only number of samples that a batch can have, or None where any will do."""

    def batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """These samples, in as few batches as their shapes allow."""


class Trainee(Protocol):
    """A quantized model in training."""

    def weights(self) -> list[Tensor]:
        """What is learned in steps of a grid."""

    def factors(self) -> list[Tensor]:
        """What is learned as factors of scales."""

    def values(self) -> list[Tensor]:
        """What is learned in units of its own size: biases, norms."""

    def student(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Outputs of the quantized model as it is now, with gradients."""

    def teacher(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Outputs of the original model."""


@dataclass
class History:
    """What a training was. ``stopped``: ``finished``, ``early``, or ``not finite``; ``curve``: a point each few steps.

    ``models`` are held-out metrics of ``original``, ``ptq`` (where training began) and ``qat`` (what is kept).
    """

    loss: str
    steps: int = 0
    epochs: float = 0.0
    best_step: int = 0
    stopped: str = "finished"
    models: dict[str, dict[str, float | None]] = field(default_factory=dict)
    curve: list[dict[str, float | None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a report."""
        return asdict(self)


class Training:
    """One run."""

    def __init__(
        self,
        trainee: Trainee,
        data: Data,
        objective: Objective,
        options: QatOptions,
        defaults: Defaults,
        *,
        seed: int,
        checkpoint: Path,
        tick: Callable[[float], None],
        say: Callable[[str], None],
    ) -> None:
        """Get ready, and continue from the checkpoint if there is one.

        Args:
            trainee: what learns. Its tensors are changed in place.
            data: what it learns from.
            objective: what is to become small.
            options: of the recipe.
            defaults: of this kind of model.
            seed: what is held out and the order of samples are drawn by it.
            checkpoint: file to continue from, and to write to.
            tick: told the fraction that is done.
            say: told how it goes, in words.

        Raises:
            InputError: there are too few samples.
        """
        self.trainee, self.data, self.objective, self.options = trainee, data, objective, options
        self.seed, self.checkpoint, self.tick, self.say = seed, checkpoint, tick, say
        self.batch_size = data.fixed_batch or options.batch_size or defaults.batch_size
        self.kept, self.held_out = self._split(defaults.held_out if options.held_out is None else options.held_out)
        each = self.batch_size * options.accumulate
        self.steps_per_epoch = max(1, len(self.kept) // each)
        self.total = options.steps or (options.epochs or defaults.epochs) * self.steps_per_epoch
        self.every = options.evaluate_every or max(1, min(self.steps_per_epoch, -(-self.total // 10)))
        self.learned = [*trainee.weights(), *trainee.factors(), *trainee.values()]
        self.optimizer = self._optimizer(
            options.learning_rate or defaults.learning_rate,
            options.scale_learning_rate or defaults.scale_learning_rate,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate_share(step, self.total, options.warm_up)
        )
        self.history = History(objective.describe())
        self._best, self._best_loss, self._since_best = self._copies(), inf, 0
        self._taught: dict[tuple[int, str], Outputs] = {}
        self._taught_bytes, self._full = 0, False
        self._saved, self._pause = time.monotonic(), CHECKPOINT_SECONDS

    def _split(self, share: float) -> tuple[list[int], list[int]]:
        """Numbers of the samples that are trained on, and of those that are held out."""
        count = len(self.data)
        whole = self.data.fixed_batch or 1
        held_out = max(1, round(share * count / whole)) * whole if share else 0
        if count - held_out < whole:
            raise InputError(
                f"The data has {count} {'sample' if count == 1 else 'samples'}, and training needs some to learn from "
                "and some to be judged by.",
                "Use more data, or set held_out: 0 in the recipe.",
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(count, generator=generator).tolist()
        return order[held_out:], sorted(order[:held_out])

    def _optimizer(self, rate: float, scale_rate: float) -> torch.optim.Optimizer:
        trainee = self.trainee
        groups = [
            {"params": trainee.weights(), "lr": rate},
            {"params": trainee.factors(), "lr": scale_rate},
            {"params": trainee.values(), "lr": scale_rate},
        ]
        groups = [group for group in groups if group["params"]]
        if self.options.optimizer == "sgd":
            return NormalizedSGD(groups, lr=rate)
        return torch.optim.Adam(groups, betas=(0.9, 0.99), foreach=False)

    def run(self) -> History:
        """Train, and leave the trainee in its best state.

        Raises:
            InputError: labels are out of range, or the loss is not finite before anything was learned.
        """
        done = self._resume()
        history = self.history
        if not done:
            history.models["original"] = self._evaluated(self.trainee.teacher)
            history.models["ptq"] = self._judged(0)
            self._log(0, None, history.models["ptq"])
        recent: list[float] = []
        point = max(1, self.total // _CURVE_POINTS)
        for step in range(done + 1, self.total + 1):
            loss = self._step(step)
            if loss is None:
                break
            recent.append(loss)
            evaluated = None
            if step % self.every == 0 or step == self.total:
                evaluated = self._judged(step)
            if evaluated is not None or step % point == 0:
                self._log(step, sum(recent) / len(recent), evaluated)
                recent = []
            history.steps, history.epochs = step, round(step / self.steps_per_epoch, 3)
            self.tick(step / self.total)
            if self.options.patience and self._since_best >= self.options.patience:
                history.stopped = "early"
                break
            if time.monotonic() - self._saved > self._pause:
                self._save(step)
        self._restore_best()
        history.models["qat"] = self._evaluated(self.trainee.student)
        return history

    def _step(self, step: int) -> float | None:
        """One step of the optimizer; returns its loss, or None where that is not finite, and nothing was changed."""
        self.optimizer.zero_grad(set_to_none=True)
        numbers = self._numbers(step)
        total = 0.0
        for batch in self._batches(numbers):
            share = len(batch) / len(numbers)
            taught = self._teach(batch)
            with torch.enable_grad():
                loss = self.objective(self.trainee.student(batch.inputs), taught, batch) * share
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        if not isfinite(total) or not self._gradients_are_finite():
            self._give_up(step, total)
            return None
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for factor in self.trainee.factors():
                clamp_factors(factor)
        return total

    def _gradients_are_finite(self) -> bool:
        gradients = [each.grad for each in self.learned if each.grad is not None]
        return all(bool(torch.isfinite(gradient.sum())) for gradient in gradients)

    def _give_up(self, step: int, loss: float) -> None:
        found = f"The loss became {loss}" if not isfinite(loss) else "A gradient was no longer finite"
        what = f"{found} in step {step} of {self.total}"
        hint = "Lower learning_rate under qat in the recipe."
        if not self.history.best_step:
            raise InputError(f"{what}, before the model was better than at the start.", hint)
        self.history.stopped = "not finite"
        self.history.warnings.append(f"{what}. The weights are those of step {self.history.best_step}. {hint}")

    def _numbers(self, step: int) -> list[int]:
        """Samples of a step, all of them once in an epoch before any comes again."""
        each = min(self.batch_size * self.options.accumulate, len(self.kept))
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 1)
        order = torch.randperm(len(self.kept), generator=generator).tolist()
        return [self.kept[index] for index in order[place * each : (place + 1) * each]]

    def _batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """Samples, so many at a time as are held in memory at once."""
        for start in range(0, len(numbers), self.batch_size):
            yield from self.data.batches(numbers[start : start + self.batch_size])

    def _teach(self, batch: Batch) -> Outputs:
        """The original model's outputs, kept sample by sample until there is no room."""
        # Of a sequence that is padded otherwise the outputs have another shape.
        shapes = str([tuple(values.shape[1:]) for values in batch.inputs.values()])
        keys = [(number, shapes) for number in batch.numbers]
        known = [self._taught.get(key) for key in keys]
        if all(each is not None for each in known):
            return {name: torch.stack([each[name] for each in known if each]) for name in known[0] or {}}
        with torch.no_grad():
            taught = {name: values.detach() for name, values in self.trainee.teacher(batch.inputs).items()}
        if all(values.ndim and len(values) == len(batch) for values in taught.values()):
            for row, key in enumerate(keys):
                own = {name: values[row].clone() for name, values in taught.items()}
                nbytes = sum(values.nbytes for values in own.values())
                self._full = self._full or self._taught_bytes + nbytes > _KEPT_OUTPUT_BYTES
                if key not in self._taught and not self._full:
                    self._taught[key] = own
                    self._taught_bytes += nbytes
        else:
            self._full = True
        return taught

    def _judged(self, step: int) -> dict[str, float | None]:
        """Metrics of the held-out samples; a state that does better than all before is kept."""
        metrics = self._evaluated(self.trainee.student)
        loss = metrics.get("loss")
        if not self.held_out or (loss is not None and loss < self._best_loss):
            self._best_loss = inf if loss is None else loss
            self._best, self._since_best, self.history.best_step = self._copies(), 0, step
        else:
            self._since_best += 1
        self.say(", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None))
        return metrics

    def _evaluated(self, model: Callable[[Mapping[str, Tensor]], Outputs]) -> dict[str, float | None]:
        """Mean loss and other metrics over the held-out samples; nothing where there are none."""
        tally = self.objective.tally()
        with torch.no_grad():
            for batch in self._batches(self.held_out):
                tally.add(model(batch.inputs), self._teach(batch), batch)
        return tally.metrics()

    def _log(self, step: int, loss: float | None, held_out: Mapping[str, float | None] | None) -> None:
        point: dict[str, float | None] = {
            "step": step,
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "held_out_loss": None,
        }
        metrics = {"held_out_loss" if name == "loss" else name: value for name, value in (held_out or {}).items()}
        self.history.curve.append(point | metrics)

    def _copies(self) -> list[Tensor]:
        return [each.detach().clone() for each in self.learned]

    @torch.no_grad()
    def _restore_best(self) -> None:
        for each, best in zip(self.learned, self._best, strict=True):
            each.copy_(best)

    def _save(self, step: int) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "step": step,
            "learned": [each.detach() for each in self.learned],
            "best": self._best,
            "best_loss": self._best_loss,
            "since_best": self._since_best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.last_epoch,
            "history": asdict(self.history),
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        unfinished, started = self.checkpoint.with_suffix(".partial"), time.monotonic()
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)
        self._saved = time.monotonic()
        self._pause = CHECKPOINT_SECONDS * max(1.0, _CHECKPOINT_SHARE * (self._saved - started) / CHECKPOINT_SECONDS)

    def _resume(self) -> int:
        """Take up the checkpoint, if there is one; returns the step that it was written after."""
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        with torch.no_grad():
            for each, saved in zip(self.learned, state["learned"], strict=True):
                each.copy_(saved)
        self._best, self._best_loss, self._since_best = state["best"], state["best_loss"], state["since_best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]
        self.history = History(**state["history"])
        self._teach_again(int(state["step"]))
        return int(state["step"])

    def _teach_again(self, done: int) -> None:
        """Keep what a run that went on would have kept: the last bits of an output depend on its batch."""
        for numbers in (self.held_out, *map(self._numbers, range(1, done + 1))):
            for batch in self._batches(numbers):
                if self._full:
                    return
                self._teach(batch)
