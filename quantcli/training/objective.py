"""What training makes small: distance from the original model's outputs, from labels, or a loss of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcli.algorithms.qat import Options as QatOptions
from quantcli.errors import InputError, UsageError
from quantcli.models.outputs import is_distribution
from quantcli.system.user_functions import load_function


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence in nats of logits ``[..., classes]``, a scalar."""
    ours, theirs = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return torch.nn.functional.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1).mean()


def relative_error(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared error of ``[..., channels]`` relative to the teacher's power, a scalar: for outputs without classes."""
    teacher, student = teacher.float(), student.float()
    return (teacher - student).square().sum() / teacher.square().sum()


Outputs = Mapping[str, Tensor]

#: What the logarithm of a probability is taken of at the least.
_LEAST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class Batch:
    """Samples with their numbers; ``labels`` int64 ``[samples]`` where there are some."""

    numbers: list[int]
    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.numbers)


class Objective:
    """A loss of a batch, and metrics of many."""

    def __init__(self, options: QatOptions, *, labelled: bool, scores: str | None) -> None:
        """Decide what is learned from.

        Args:
            options: how much outputs and labels count.
            labelled: whether every sample has a label.
            scores: the output that holds scores of classes ``[samples, ..., classes]``, or None.

        Raises:
            UsageError: the recipe asks for labels alone, and there are none, or no output to compare them with.
            InputError: the user's own loss cannot be loaded.
        """
        self.scores = scores
        self.distillation = options.distillation
        self.labels = options.labels if labelled and scores else 0.0
        self.own = load_function(options.loss) if options.loss else None
        self._own_name = options.loss
        if self.own is None and not self.distillation and not self.labels:
            why = "the data has no labels" if not labelled else "the model has no output with scores of classes"
            raise UsageError(f"qat: distillation is 0, and {why}.", "Set distillation: 1 in the recipe.")

    def describe(self) -> str:
        """In words."""
        if self._own_name:
            return self._own_name
        return " + ".join(name for name in ("distillation", "labels") if getattr(self, name))

    def __call__(self, found: Outputs, wanted: Outputs | None, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar.

        Raises:
            InputError: a label is none of the classes, or the user's own loss fails.
        """
        if self.own is not None:
            return self._own_loss(self.own, found, wanted, batch)
        parts = []
        if self.distillation and wanted:
            distances = [self._distance(name, wanted[name], values, batch) for name, values in found.items()]
            parts.append(self.distillation * torch.stack(distances).mean())
        if self.labels and batch.labels is not None and self.scores:
            scores = found[self.scores].float()
            labels = self._checked(batch, scores)
            parts.append(self.labels * torch.nn.functional.nll_loss(log_scores(scores), labels))
        return torch.stack(parts).sum()

    def _distance(self, name: str, wanted: Tensor, found: Tensor, batch: Batch) -> Tensor:
        mask = batch.inputs.get("attention_mask")
        if mask is not None and wanted.ndim > 2 and mask.shape == wanted.shape[:2]:
            wanted, found = wanted[mask.bool()], found[mask.bool()]
        if name == self.scores:
            return divergence(log_scores(wanted.float()), log_scores(found.float()))
        return relative_error(wanted, found)

    def _checked(self, batch: Batch, scores: Tensor) -> Tensor:
        """The labels. Raises InputError where one is none of the model's classes, or there is not one for each row."""
        assert batch.labels is not None
        if scores.ndim != 2:
            raise InputError(
                f"The data has one label per sample, and the output {self.scores} has scores {list(scores.shape)}.",
                "Set labels: 0 in the recipe to learn from the original's outputs alone.",
            )
        classes = scores.shape[-1]
        wrong = (batch.labels < 0) | (batch.labels >= classes)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise InputError(
                f"Sample {batch.numbers[row] + 1} has the label {int(batch.labels[row])}, and the model has {classes} "
                f"classes, 0 to {classes - 1}.",
                "Repair the labels, or set labels: 0 in the recipe to learn from the original's outputs alone.",
            )
        return batch.labels

    def _own_loss(self, own: Callable[..., Any], found: Outputs, wanted: Outputs | None, batch: Batch) -> Tensor:
        try:
            loss = own(outputs=dict(found), original=dict(wanted or {}), labels=batch.labels, inputs=dict(batch.inputs))
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"{self._own_name} failed: {type(error).__name__}: {error}".rstrip(".") + ".") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not (loss.requires_grad or not torch.is_grad_enabled()):
            what = _described(loss)
            raise InputError(f"{self._own_name} returned {what}; expected is a scalar that depends on the outputs.")
        return loss.reshape(())

    def tally(self) -> Tally:
        """To sum up many batches."""
        return Tally(self)


class Tally:
    """Sums over batches."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self._loss, self._right, self._count, self._places = objective, 0.0, 0, 0, 0
        self._labelled = False

    def add(self, found: Outputs, wanted: Outputs | None, batch: Batch) -> None:
        """Count a batch."""
        objective = self._objective
        self._loss += float(objective(found, wanted, batch)) * len(batch)
        self._count += len(batch)
        if objective.scores is None:
            return
        best = found[objective.scores].argmax(-1)
        self._labelled = bool(objective.labels) and best.ndim == 1
        right = batch.labels if self._labelled else None
        if right is None and wanted:
            right = wanted[objective.scores].argmax(-1)
        if right is not None:
            mask = batch.inputs.get("attention_mask")
            same = best == right
            if mask is not None and mask.shape == same.shape:
                same = same[mask.bool()]
            self._right, self._places = self._right + int(same.sum()), self._places + same.numel()

    def metrics(self) -> dict[str, float | None]:
        """``loss``, and where there are classes ``top1`` (by labels) or ``top1_agreement`` (with the original)."""
        if not self._count:
            return {"loss": None}
        found: dict[str, float | None] = {"loss": self._loss / self._count}
        if self._places:
            name = "top1" if self._labelled else "top1_agreement"
            found[name] = self._right / self._places
        return found


def log_scores(scores: Tensor) -> Tensor:
    """Logarithms of probabilities ``[..., classes]``, from these or from logits."""
    return scores.clamp(min=_LEAST_PROBABILITY).log() if is_distribution(scores) else scores.log_softmax(-1)


def _described(loss: Any) -> str:
    if isinstance(loss, Tensor):
        return f"a tensor of shape {list(loss.shape)}" + ("" if loss.requires_grad else " without gradient")
    return type(loss).__name__
