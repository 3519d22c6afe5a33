"""What two models' outputs have in common, accumulated sample by sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, fsum, inf, sqrt
from statistics import fmean, stdev

import torch
from torch import Tensor

from quantcli.core.numerics import decibels

#: What is said of a divergence of up to so many nats, see `verdict`.
VERDICTS = (
    (0.002, "no visible loss, like Q8_0"),
    (0.01, "very small loss, like Q6_K"),
    (0.04, "small loss, like Q4_K_M"),
    (0.1, "noticeable loss, like Q4_0"),
    (inf, "large loss: check outputs"),
)

#: Rows of logits turned into probabilities at a time.
_ROWS = 128


@dataclass
class Mean:
    """A mean over samples with its standard error."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """One sample."""
        self.values.append(value)

    def merge(self, other: Mean) -> None:
        """The samples that come after these."""
        self.values += other.values

    @property
    def mean(self) -> float:
        """The mean."""
        return fmean(self.values)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean, or None for a single sample."""
        return stdev(self.values) / sqrt(len(self.values)) if len(self.values) > 1 else None


@dataclass
class Ratio:
    """A sum over samples by another one, such as errors by words, with its standard error by the delta method."""

    parts: list[tuple[float, float]] = field(default_factory=list)

    def add(self, value: float, count: float) -> None:
        """One sample: its share of the sum, and of the sum that it is divided by."""
        self.parts.append((value, count))

    def merge(self, other: Ratio) -> None:
        """The samples that come after these."""
        self.parts += other.parts

    @property
    def ratio(self) -> float:
        """The quotient of the sums; 0 where there is nothing to divide by."""
        count = sum(count for _, count in self.parts)
        return sum(value for value, _ in self.parts) / count if count else 0.0

    @property
    def standard_error(self) -> float | None:
        """Standard error of the quotient, or None for a single sample."""
        count = sum(count for _, count in self.parts)
        if len(self.parts) < 2 or not count:
            return None
        left = (value - self.ratio * own for value, own in self.parts)
        return sqrt(len(self.parts) / (len(self.parts) - 1) * sum(each * each for each in left)) / count


class Perplexity:
    """``exp`` of the mean negative log-likelihood per token."""

    def __init__(self) -> None:
        self._nll = Ratio()

    def add(self, logits: Tensor, ids: Tensor, predicted: Tensor | None = None) -> None:
        """Logits float32 ``[length, vocabulary]`` of the sequence ``ids`` ``[length]``.

        ``predicted``, bool ``[length - 1]``, says which of the ids after the first count; by default all.
        """
        logits, targets = logits[:-1], ids[1:]
        if predicted is not None:
            logits, targets = logits[predicted], targets[predicted]
        total = 0.0
        for rows, wanted in zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS), strict=True):
            total += torch.nn.functional.cross_entropy(rows, wanted, reduction="sum").item()
        self._nll.add(total, len(targets))

    def merge(self, other: Perplexity) -> None:
        """The sequences that come after these."""
        self._nll.merge(other._nll)

    def metrics(self) -> dict[str, float | None]:
        """Perplexity, and its standard error by the delta method."""
        # Beyond 700 nats a token, the exponential is no float any more.
        perplexity, error = (exp(self._nll.ratio) if self._nll.ratio < 700 else inf), self._nll.standard_error
        return {"perplexity": perplexity, "perplexity_se": None if error is None else perplexity * error}


class Divergence:
    """KL divergence of a candidate's next-token distribution from the reference's, and how often the top agrees."""

    def __init__(self) -> None:
        self._kl, self._agreement = Mean(), Mean()

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        """Logits float32 ``[rows, classes]`` of both."""
        kl = agreement = 0.0
        for ours, theirs in zip(torch.split(reference, _ROWS), torch.split(candidate, _ROWS), strict=True):
            kl += kl_nats(ours, theirs).sum().item()
            agreement += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        self._kl.add(kl / len(reference))
        self._agreement.add(agreement / len(reference))

    def merge(self, other: Divergence) -> None:
        """The samples that come after these."""
        self._kl.merge(other._kl)
        self._agreement.merge(other._agreement)

    @property
    def kl_nats(self) -> float:
        """Mean divergence of the samples."""
        return self._kl.mean

    def metrics(self, agreement: str) -> dict[str, float | None]:
        """Means and standard errors; ``agreement`` names the second metric."""
        return {
            "kl_nats": self.kl_nats,
            "kl_nats_se": self._kl.standard_error,
            agreement: self._agreement.mean,
            f"{agreement}_se": self._agreement.standard_error,
        }


def kl_nats(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) in nats of two sets of logits ``[rows, classes]``: ``[rows]``, never negative."""
    ours, theirs = reference.log_softmax(-1), candidate.log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1).clamp(min=0)


def verdict(kl_nats: float) -> str:
    """What a mean KL divergence of next-token distributions means, in words.

    The bands hold the figures that llama.cpp publishes of its formats on Llama-3-8B (tools/perplexity/README.md, "LLaMA
    3 8b Scoreboard", mean over wikitext-2): Q8_0 0.0014, Q6_K 0.0055, Q4_K_M 0.031, Q4_0 0.072.
    """
    return next((words for most, words in VERDICTS if kl_nats <= most), VERDICTS[-1][1])


class Fidelity:
    """How much of a signal survived: signal to noise over all samples, and the cosine of each.

    Values are compared where both are finite. ``not_finite`` counts those of the candidate that are NaN or infinite
    where the reference's are something else: with one of them, no other figure means anything, and none is given.
    """

    def __init__(self) -> None:
        self._powers: list[tuple[float, float]] = []
        self._cosine = Mean()
        self.not_finite = 0

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        """The same output of both models."""
        ours, theirs = reference.double().flatten(), candidate.double().flatten()
        finite = ours.isfinite() & theirs.isfinite()
        if not finite.all():
            same = (ours == theirs) | (ours.isnan() & theirs.isnan())
            self.not_finite += int((~theirs.isfinite() & ~same).sum())
            ours, theirs = ours[finite], theirs[finite]
        self._powers.append((torch.dot(ours, ours).item(), torch.dot(ours - theirs, ours - theirs).item()))
        self._cosine.add(cosine(ours, theirs))

    def merge(self, other: Fidelity) -> None:
        """The samples that come after these."""
        self._powers += other._powers
        self._cosine.merge(other._cosine)
        self.not_finite += other.not_finite

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise; None where the outputs are equal, or the candidate's are not finite."""
        if self.not_finite:
            return None
        return decibels(fsum(signal for signal, _ in self._powers), fsum(noise for _, noise in self._powers))

    def metrics(self) -> dict[str, float | None]:
        """Signal to noise, mean cosine and its standard error, and how many values are not finite."""
        counted = {"not_finite": float(self.not_finite)}
        if self.not_finite:
            return {"sqnr_db": None, "cosine": None, "cosine_se": None} | counted
        own = {"sqnr_db": self.sqnr_db, "cosine": self._cosine.mean, "cosine_se": self._cosine.standard_error}
        return own | counted


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two vectors; 1 where both are zero."""
    norms = one.norm().item() * other.norm().item()
    if norms == 0:
        return 1.0 if torch.equal(one, other) else 0.0
    return min(1.0, float(torch.dot(one, other).item() / norms))
