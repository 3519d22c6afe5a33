"""What `eval` measures: each task scores one model sample by sample, against labels, the reference, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite, prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.functions import load_function
from quantcli.metrics import Divergence, Fidelity, Mean, Perplexity, cosine, verdict
from quantcli.runners import Arrays, floats, paired

TASKS = ("auto", "classification", "language-modeling", "embedding", "fidelity")

#: Metrics that a model has by itself, and those that compare it with the reference, by task.
REFERENCE_METRICS = {
    "classification": ("top1", "top1_se", "top5", "top5_se"),
    "language-modeling": ("perplexity", "perplexity_se"),
    "embedding": (),
    "fidelity": (),
}
CANDIDATE_METRICS = {
    "classification": ("argmax_agreement", "argmax_agreement_se"),
    "language-modeling": ("kl_nats", "kl_nats_se", "top1_agreement", "top1_agreement_se"),
    "embedding": ("cosine", "cosine_se", "cosine_min"),
    "fidelity": ("sqnr_db", "cosine", "cosine_se", "kl_nats", "kl_nats_se", "argmax_agreement", "argmax_agreement_se"),
}

#: Names of outputs that hold one vector per text, and parts of names that no class scores have.
_EMBEDDINGS = ("sentence_embedding", "sentence_embeddings", "embeddings", "embedding")
_NOT_CLASSES = ("embed", "hidden", "pool", "feature")

#: Probabilities are not taken below this: a logarithm of zero compares with nothing.
_LEAST_PROBABILITY = 1e-12

Metrics = dict[str, float | None]


class Task(Protocol):
    """The metrics of one model in the making."""

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One sample's outputs, and the reference's where this is a candidate."""

    def metrics(self) -> Metrics:
        """All metrics that apply."""

    def details(self) -> dict[str, Any]:
        """What the report's row of the model holds beside its metrics."""


class Classification:
    """How often the label is the top class, or among the top five; with the reference, how often the top agrees."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._top1, self._top5, self._agreement = Mean(), Mean(), Mean()
        self._classes = 0

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """``label`` is the index of the true class."""
        scores = class_scores(outputs, self.name)
        self._classes = len(scores)
        if not 0 <= int(label) < len(scores):
            raise InputError(f"The data has the label {label}; {self.name} has {len(scores)} classes, from 0 on.")
        best = np.argsort(-scores, kind="stable")[:5]
        self._top1.add(float(best[0] == label))
        self._top5.add(float(label in best))
        if reference is not None:
            self._agreement.add(float(best[0] == np.argmax(class_scores(reference, "The reference"))))

    def metrics(self) -> Metrics:
        """Shares with standard errors; top5 only where there are more classes than that."""
        found = _mean("top1", self._top1)
        if self._classes > 5:
            found |= _mean("top5", self._top5)
        return found | (_mean("argmax_agreement", self._agreement) if self._agreement.values else {})

    def details(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class LanguageModeling:
    """Perplexity, and how the next-token distribution departs from the reference's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._perplexity, self._divergence = Perplexity(), Divergence()
        self._compared = False

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """Outputs hold ``logits`` ``[1, length, vocabulary]``."""
        if "input_ids" not in feeds:
            raise InputError(f"{self.name} takes no input_ids, so it is no language model.", "Use another --task.")
        ids = torch.from_numpy(feeds["input_ids"][0].astype(np.int64))
        logits = self._logits(outputs)
        self._perplexity.add(logits, ids)
        if reference is not None:
            self._compared = True
            self._divergence.add(self._logits(reference)[:-1], logits[:-1])

    def _logits(self, outputs: Arrays) -> Tensor:
        found = floats(outputs)
        logits = found.get("logits", next(iter(found.values())) if len(found) == 1 else None)
        if logits is None or logits.ndim != 3:
            raise InputError(
                f"{self.name} returns no logits [batch, length, vocabulary]: {_shapes(outputs)}.",
                "Use --task embedding or fidelity.",
            )
        return torch.from_numpy(logits[0])

    def metrics(self) -> Metrics:
        """Perplexity; for a candidate divergence and agreement too."""
        own = self._perplexity.metrics()
        return own | self._divergence.metrics("top1_agreement") if self._compared else own

    def details(self) -> dict[str, Any]:
        """For a candidate a verdict on its divergence, in words."""
        return {"verdict": verdict(self._divergence.kl_nats)} if self._compared else {}


class Embedding:
    """Cosine of every text's embedding with the reference's.

    Token vectors are pooled over the attention mask; a model without them gives its own embedding, or its
    first output as one vector. ``pooling`` is ``mean``, ``cls`` or ``last``.
    """

    def __init__(self, name: str, pooling: str) -> None:
        self.name, self.pooling = name, pooling
        self._cosine = Mean()

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One text."""
        if reference is None:
            return
        ours, theirs = (self._vector(each, feeds) for each in (reference, outputs))
        if ours.shape != theirs.shape:
            raise InputError(f"{self.name} embeds in {len(theirs)} dimensions, the reference in {len(ours)}.")
        self._cosine.add(cosine(ours, theirs))

    def _vector(self, outputs: Arrays, feeds: Arrays) -> Tensor:
        found = floats(outputs)
        mask = feeds.get("attention_mask")
        for name in ("last_hidden_state", "token_embeddings", *found):
            value = found.get(name)
            if mask is not None and value is not None and value.ndim == 3 and value.shape[:2] == mask.shape:
                kept = torch.from_numpy(value[0]).double()[torch.from_numpy(mask[0].astype(bool))]
                if self.pooling == "mean":
                    return kept.mean(0)
                return kept[0] if self.pooling == "cls" else kept[-1]
        if not found:
            raise InputError(f"{self.name} returns no floating-point output to embed with.")
        chosen = next((found[name] for name in _EMBEDDINGS if name in found), next(iter(found.values())))
        return torch.from_numpy(chosen).double().flatten()

    def metrics(self) -> Metrics:
        """Mean, standard error and minimum."""
        return _mean("cosine", self._cosine) | {"cosine_min": min(self._cosine.values)} if self._cosine.values else {}

    def details(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class FidelityTask:
    """Every floating-point output against the reference's, without labels.

    KL divergence and argmax agreement are taken of outputs that hold class scores: those named ``logits``,
    those whose rows are probabilities, and tables of one row per sample whose name does not say that they
    are features. A metric of the model is that of its worst output; all outputs are in the row's ``outputs``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._fidelity: dict[str, Fidelity] = {}
        self._divergence: dict[str, Divergence] = {}

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One sample."""
        if reference is None:
            return
        for name, (ours, theirs) in paired(reference, outputs, self.name).items():
            if not ours.size:
                continue
            self._fidelity.setdefault(name, Fidelity()).add(torch.from_numpy(ours), torch.from_numpy(theirs))
            if is_classes(name, ours):
                probable = is_distribution(ours)
                scores = (_logits(each, probable=probable) for each in (ours, theirs))
                self._divergence.setdefault(name, Divergence()).add(*scores)

    def _of(self, name: str) -> Metrics:
        found = self._fidelity[name].metrics()
        return found | (self._divergence[name].metrics("argmax_agreement") if name in self._divergence else {})

    def metrics(self) -> Metrics:
        """Of every metric the worst output's."""
        worst: Metrics = {}
        rows = [self._of(name) for name in self._fidelity]
        for metric, sign in (("sqnr_db", 1), ("cosine", 1), ("kl_nats", -1), ("argmax_agreement", 1)):
            having = [(sign * value, index) for index, row in enumerate(rows) if (value := row.get(metric)) is not None]
            if having:
                row = rows[min(having)[1]]
                worst |= {key: row[key] for key in (metric, f"{metric}_se") if key in row}
            elif any(metric in row for row in rows):
                worst[metric] = None
        return worst

    def details(self) -> dict[str, Any]:
        """Metrics of every output."""
        return {"outputs": {name: self._of(name) for name in self._fidelity}} if self._fidelity else {}


class Custom:
    """A user's metric, ``package.module:function``, called once per model.

    It is given all outputs, a list with one dictionary of arrays per sample (in float32 where they are
    floating-point, leading dimension 1), and the list of labels, or None where the data has none. It returns
    a number, or a dictionary of numbers by name. All outputs of a model are held in memory until then.
    """

    def __init__(self, name: str, spec: str) -> None:
        self.name, self.spec = name, spec
        self._function: Callable[..., Any] = load_function(spec)
        self._outputs: list[Arrays] = []
        self._labels: list[Any] = []

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One sample."""
        self._outputs.append(dict(outputs) | floats(outputs))
        self._labels.append(label)

    def metrics(self) -> Metrics:
        """What the function says. Raises InputError where it fails or returns something else."""
        labels = None if any(label is None for label in self._labels) else self._labels
        try:
            found = self._function(self._outputs, labels)
        except Exception as error:  # the user's code
            raise InputError(f"{self.spec} failed on {self.name}: {type(error).__name__}: {error}") from error
        if not isinstance(found, Mapping):
            found = {self.spec.rpartition(":")[2]: found}
        metrics: Metrics = {}
        for key, value in found.items():
            try:
                number = float(value)
            except (TypeError, ValueError) as error:
                raise InputError(f"{self.spec} returned {value!r} as {key}, which is not a number.") from error
            metrics[str(key)] = number if isfinite(number) else None
        return metrics

    def details(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def class_scores(outputs: Arrays, name: str) -> np.ndarray:
    """One score per class ``[classes]`` of a sample: the output ``logits``, or the first with one row per sample.

    Raises:
        InputError: there is no such output.
    """
    found = floats(outputs)
    for value in (found.get("logits"), *found.values()):
        if value is not None and value.shape[:1] == (1,) and value.size == max(value.shape) > 1:
            return value.reshape(-1)
    raise InputError(
        f"{name} returns no scores of classes [1, classes]: {_shapes(outputs)}.",
        "Use another --task, such as fidelity.",
    )


def is_classes(name: str, values: np.ndarray) -> bool:
    """Whether an output ``[samples, ..., classes]`` holds scores of classes, by its name and its values."""
    if values.ndim < 2 or values.shape[-1] < 2:
        return False
    if name == "logits" or is_distribution(values):
        return True
    return values.ndim == 2 and not any(part in name.lower() for part in _NOT_CLASSES)


def is_distribution(values: np.ndarray) -> bool:
    """Whether every row holds probabilities that sum to one."""
    return bool(values.min() >= 0 and np.allclose(values.sum(-1, dtype=np.float64), 1, atol=1e-2))


def _logits(values: np.ndarray, *, probable: bool) -> Tensor:
    """Logits ``[rows, classes]`` from what a model returns: these, or probabilities."""
    rows = torch.from_numpy(values.reshape(prod(values.shape[:-1]), values.shape[-1]))
    return rows.clamp(min=_LEAST_PROBABILITY).log() if probable else rows


def _mean(name: str, mean: Mean) -> Metrics:
    return {name: mean.mean, f"{name}_se": mean.standard_error}


def _shapes(outputs: Arrays) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in outputs.items())
