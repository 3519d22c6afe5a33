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
    target, predicted = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return torch.nn.functional.kl_div(predicted, target, reduction="none", log_target=True).sum(-1).mean()


def relative_error(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared error of ``[..., channels]`` relative to the teacher's power, a scalar: for outputs without classes."""
    teacher, student = teacher.float(), student.float()
    return (teacher - student).square().sum() / teacher.square().sum()


def without_padding(teacher: Tensor, student: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of outputs ``[samples, tokens, ...]`` those of tokens that a mask among the inputs does not call padding."""
    mask = inputs.get("attention_mask")
    if mask is None or teacher.ndim < 3 or mask.shape != teacher.shape[:2]:
        return teacher, student
    return teacher[mask.bool()], student[mask.bool()]


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
        self._custom_loss = load_function(options.loss) if options.loss else None
        self._custom_name = options.loss
        if self._custom_loss is None and not self.distillation and not self.labels:
            reason = "the data has no labels" if not labelled else "the model has no output with scores of classes"
            raise UsageError(f"qat: distillation is 0, and {reason}.", "Set distillation: 1 in the recipe.")

    def describe(self) -> str:
        """In words."""
        if self._custom_name:
            return self._custom_name
        return " + ".join(name for name in ("distillation", "labels") if getattr(self, name))

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar.

        Raises:
            InputError: a label is none of the classes, or the user's own loss fails.
        """
        if self._custom_loss is not None:
            return self._custom(self._custom_loss, student, teacher, batch)
        parts = []
        if self.distillation and teacher:
            distances = [self._distance(name, teacher[name], values, batch) for name, values in student.items()]
            parts.append(self.distillation * torch.stack(distances).mean())
        if self.labels and batch.labels is not None and self.scores:
            scores = student[self.scores].float()
            labels = self._checked(batch, scores)
            parts.append(self.labels * torch.nn.functional.nll_loss(log_scores(scores), labels))
        return torch.stack(parts).sum()

    def _distance(self, name: str, teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
        teacher, student = without_padding(teacher, student, batch.inputs)
        if name == self.scores:
            return divergence(log_scores(teacher.float()), log_scores(student.float()))
        return relative_error(teacher, student)

    def _checked(self, batch: Batch, scores: Tensor) -> Tensor:
        """The labels. Raises InputError where one is none of the model's classes, or there is not one for each row."""
        assert batch.labels is not None
        if scores.ndim != 2:
            raise InputError(
                f"The data has one label per sample, and the output {self.scores} has scores {list(scores.shape)}.",
                "Set labels: 0 in the recipe to learn from the original's outputs alone.",
            )
        classes = scores.shape[-1]
        out_of_range = (batch.labels < 0) | (batch.labels >= classes)
        if bool(out_of_range.any()):
            row = int(out_of_range.nonzero()[0])
            raise InputError(
                f"Sample {batch.numbers[row] + 1} has the label {int(batch.labels[row])}, and the model has {classes} "
                f"classes, 0 to {classes - 1}.",
                "Repair the labels, or set labels: 0 in the recipe to learn from the original's outputs alone.",
            )
        return batch.labels

    def _custom(self, custom: Callable[..., Any], student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The user's own loss."""
        original, inputs = dict(teacher or {}), dict(batch.inputs)
        try:
            loss = custom(outputs=dict(student), original=original, labels=batch.labels, inputs=inputs)
        except Exception as error:  # whatever the user's code raises
            reason = f"{type(error).__name__}: {error}".rstrip(".")
            raise InputError(f"{self._custom_name} failed: {reason}.") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not (loss.requires_grad or not torch.is_grad_enabled()):
            raise InputError(
                f"{self._custom_name} returned {_described(loss)}; expected is a scalar that depends on the outputs."
            )
        return loss.reshape(())


class Tally:
    """Metrics of an objective over batches."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self._loss, self._samples = objective, 0.0, 0
        self._labelled, self._correct, self._predictions = False, 0, 0

    def add(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Count a batch."""
        objective = self._objective
        self._loss += float(objective(student, teacher, batch)) * len(batch)
        self._samples += len(batch)
        if objective.scores is None:
            return
        predictions = student[objective.scores].argmax(-1)
        self._labelled = bool(objective.labels) and predictions.ndim == 1
        targets = batch.labels if self._labelled else None
        if targets is None and teacher:
            targets = teacher[objective.scores].argmax(-1)
        if targets is not None:
            mask = batch.inputs.get("attention_mask")
            correct = predictions == targets
            if mask is not None and mask.shape == correct.shape:
                correct = correct[mask.bool()]
            self._correct += int(correct.sum())
            self._predictions += correct.numel()

    def metrics(self) -> dict[str, float | None]:
        """``loss``, and where there are classes ``top1`` (by labels) or ``top1_agreement`` (with the original)."""
        if not self._samples:
            return {"loss": None}
        metrics: dict[str, float | None] = {"loss": self._loss / self._samples}
        if self._predictions:
            metrics["top1" if self._labelled else "top1_agreement"] = self._correct / self._predictions
        return metrics


def log_scores(scores: Tensor) -> Tensor:
    """Logarithms of probabilities ``[..., classes]``, from these or from logits."""
    return scores.clamp(min=_LEAST_PROBABILITY).log() if is_distribution(scores) else scores.log_softmax(-1)


def _described(loss: Any) -> str:
    if isinstance(loss, Tensor):
        return f"a tensor of shape {list(loss.shape)}" + ("" if loss.requires_grad else " without gradient")
    return type(loss).__name__
