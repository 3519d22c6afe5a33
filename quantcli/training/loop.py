"""The training loop: batches, an optimizer, held-out samples. What is trained is a trainee's affair.

Everything that is drawn at random follows from the seed and the number of the epoch, so that a run that is continued
does what it would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf, isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from quantcli.algorithms.qat import Options as QatOptions
from quantcli.errors import InputError
from quantcli.training.objective import Batch, Objective, Outputs, Tally
from quantcli.training.optimization import NormalizedSGD, clamp_factors, rate_share
from quantcli.training.resume import CheckpointFile
from quantcli.training.run import Run
from quantcli.training.teacher import Teacher

#: Points of the training curve between two evaluations are means of several steps; so many in all.
_CURVE_POINTS = 200


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
    """The training of one trainee."""

    def __init__(
        self, trainee: Trainee, data: Data, objective: Objective, options: QatOptions, defaults: Defaults, run: Run
    ) -> None:
        """Get ready.

        Args:
            trainee: what learns. Its tensors are changed in place.
            data: what it learns from.
            objective: what is to become small.
            options: of the recipe.
            defaults: of this kind of model.
            run: its seed and checkpoint, and who is told how it goes.

        Raises:
            InputError: there are too few samples.
        """
        self.trainee, self.data, self.objective, self.options, self._run = trainee, data, objective, options, run
        self.batch_size = data.fixed_batch or options.batch_size or defaults.batch_size
        self.train_samples, self.held_out = self._split(
            defaults.held_out if options.held_out is None else options.held_out
        )
        self._samples_per_step = min(self.batch_size * options.accumulate, len(self.train_samples))
        self.steps_per_epoch = len(self.train_samples) // self._samples_per_step
        self.total_steps = options.steps or (options.epochs or defaults.epochs) * self.steps_per_epoch
        self.evaluate_every = options.evaluate_every or max(1, min(self.steps_per_epoch, -(-self.total_steps // 10)))
        self.learned = [*trainee.weights(), *trainee.factors(), *trainee.values()]
        self.optimizer = self._optimizer(
            options.learning_rate or defaults.learning_rate,
            options.scale_learning_rate or defaults.scale_learning_rate,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate_share(step, self.total_steps, options.warm_up)
        )
        self.history = History(objective.describe())
        self._best, self._best_loss, self._since_best = self._copies(), inf, 0
        self._teacher = Teacher(trainee.teacher)
        self._checkpoint = CheckpointFile(run.checkpoint)

    def _split(self, share: float) -> tuple[list[int], list[int]]:
        """Numbers of the samples that are trained on, and of those that are held out."""
        count = len(self.data)
        smallest = self.data.fixed_batch or 1
        held_out = max(1, round(share * count / smallest)) * smallest if share else 0
        if count - held_out < smallest:
            raise InputError(
                f"The data has {count} {'sample' if count == 1 else 'samples'}, and training needs some to learn from "
                "and some to be judged by.",
                "Use more data, or set held_out: 0 in the recipe.",
            )
        generator = torch.Generator().manual_seed(self._run.seed)
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
        """Train, from the checkpoint on if there is one, and leave the trainee in its best state.

        Raises:
            InputError: labels are out of range, or the loss is not finite before anything was learned.
        """
        resumed_step = self._resume()
        history = self.history
        if not resumed_step:
            history.models["original"] = self._evaluate(self.trainee.teacher)
            history.models["ptq"] = self._validate(0)
            self._log(0, None, history.models["ptq"])
        losses: list[float] = []
        log_every = max(1, self.total_steps // _CURVE_POINTS)
        for step in range(resumed_step + 1, self.total_steps + 1):
            loss = self._step(step)
            if loss is None:
                break
            losses.append(loss)
            metrics = None
            if step % self.evaluate_every == 0 or step == self.total_steps:
                metrics = self._validate(step)
            if metrics is not None or step % log_every == 0:
                self._log(step, sum(losses) / len(losses), metrics)
                losses = []
            history.steps, history.epochs = step, round(step / self.steps_per_epoch, 3)
            self._run.tick(step / self.total_steps)
            if self.options.patience and self._since_best >= self.options.patience:
                history.stopped = "early"
                break
            self._checkpoint.save_if_due(partial(self._state, step))
        self._set_learned(self._best)
        history.models["qat"] = self._evaluate(self.trainee.student)
        return history

    def _step(self, step: int) -> float | None:
        """One step of the optimizer; returns its loss, or None where that is not finite, and nothing was changed."""
        self.optimizer.zero_grad(set_to_none=True)
        numbers = self._sample_numbers(step)
        total = 0.0
        for batch in self._batches(numbers):
            share = len(batch) / len(numbers)
            teacher = self._teacher(batch)
            with torch.enable_grad():
                loss = self.objective(self.trainee.student(batch.inputs), teacher, batch) * share
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        gradients = [values.grad for values in self.learned if values.grad is not None]
        if not isfinite(total) or not all(bool(torch.isfinite(gradient.sum())) for gradient in gradients):
            self._give_up(step, total)
            return None
        self.optimizer.step()
        self.schedule.step()
        clamp_factors(self.trainee.factors())
        return total

    def _give_up(self, step: int, loss: float) -> None:
        reason = f"The loss became {loss}" if not isfinite(loss) else "A gradient was no longer finite"
        message = f"{reason} in step {step} of {self.total_steps}"
        hint = "Lower learning_rate under qat in the recipe."
        if not self.history.best_step:
            raise InputError(f"{message}, before the model was better than at the start.", hint)
        self.history.stopped = "not finite"
        self.history.warnings.append(f"{message}. The weights are those of step {self.history.best_step}. {hint}")

    def _sample_numbers(self, step: int) -> list[int]:
        """Samples of a step, all of them once in an epoch before any comes again."""
        epoch, step_of_epoch = divmod(step - 1, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self._run.seed * 1_000_003 + epoch + 1)
        order = torch.randperm(len(self.train_samples), generator=generator).tolist()
        start = step_of_epoch * self._samples_per_step
        return [self.train_samples[index] for index in order[start : start + self._samples_per_step]]

    def _batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """Samples, so many at a time as are held in memory at once."""
        for start in range(0, len(numbers), self.batch_size):
            yield from self.data.batches(numbers[start : start + self.batch_size])

    def _validate(self, step: int) -> dict[str, float | None]:
        """Metrics of the held-out samples; a state that does better than all before is kept."""
        metrics = self._evaluate(self.trainee.student)
        loss = metrics.get("loss")
        if not self.held_out or (loss is not None and loss < self._best_loss):
            self._best_loss = inf if loss is None else loss
            self._best, self._since_best, self.history.best_step = self._copies(), 0, step
        else:
            self._since_best += 1
        self._run.say(", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None))
        return metrics

    def _evaluate(self, model: Callable[[Mapping[str, Tensor]], Outputs]) -> dict[str, float | None]:
        """Mean loss and other metrics over the held-out samples; nothing where there are none."""
        tally = Tally(self.objective)
        with torch.no_grad():
            for batch in self._batches(self.held_out):
                tally.add(model(batch.inputs), self._teacher(batch), batch)
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
        return [values.detach().clone() for values in self.learned]

    @torch.no_grad()
    def _set_learned(self, state: Sequence[Tensor]) -> None:
        for values, saved in zip(self.learned, state, strict=True):
            values.copy_(saved)

    def _state(self, step: int) -> dict[str, Any]:
        """All that `_resume` needs to go on after this step."""
        return {
            "step": step,
            "learned": [values.detach() for values in self.learned],
            "best": self._best,
            "best_loss": self._best_loss,
            "since_best": self._since_best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.last_epoch,
            "history": asdict(self.history),
        }

    def _resume(self) -> int:
        """Take up the checkpoint, if there is one; returns the step that it was written after, or 0."""
        state = self._checkpoint.load()
        if state is None:
            return 0
        self._set_learned(state["learned"])
        self._best, self._best_loss, self._since_best = state["best"], state["best_loss"], state["since_best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]
        self.history = History(**state["history"])
        step = int(state["step"])
        # The teacher keeps what it would have kept: the last bits of an output depend on its batch.
        for numbers in (self.held_out, *map(self._sample_numbers, range(1, step + 1))):
            for batch in self._batches(numbers):
                if self._teacher.is_full:
                    return step
                self._teacher(batch)
        return step
