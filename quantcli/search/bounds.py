"""How sure one can be of a difference between two models that were run on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, sqrt
from statistics import fmean, stdev

from scipy.special import betaincinv, stdtrit

#: A bound holds in 95 of 100 cases.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Drop:
    """What a metric loses: its mean over samples, and what it is at most, with `CONFIDENCE`."""

    mean: float
    bound: float
    samples: int
    deviation: float

    def samples_for(self, limit: float) -> int | None:
        """About how many samples would show that the loss is within a limit; None where it is not on average."""
        room = limit - self.mean
        if room <= 0:
            return None
        by_spread = (1.645 * self.deviation / room) ** 2
        # Where no sample differs, so many are needed to call differences rare (the rule of three).
        return ceil(max(by_spread, 3 / room, self.samples + 1))

    def share_of(self, limit: float) -> float:
        """How much of the loss that a limit allows on average is lost, so many samples being as sure as these."""
        room = limit - (self.bound - self.mean)
        return self.mean / room if room > 0 else inf

    def bound_with(self, samples: int) -> float:
        """About what the bound would be with so many samples, if they were like those that were seen."""
        return self.mean + (self.bound - self.mean) * sqrt(self.samples / samples)


def drop_of(losses: Sequence[float]) -> Drop:
    """The loss of a metric from what it lost on each sample (reference minus candidate), one value a sample.

    For values of -1, 0 and 1 (an answer that was right or wrong) the bound is the larger of Student's and of that of
    Clopper and Pearson (1934) for the samples that got worse, less those that got better: a handful of samples that
    are all equal show little. For others it is Student's; one sample shows nothing.
    """
    count = len(losses)
    mean = fmean(losses)
    deviation = stdev(losses) if count > 1 else inf
    bound = mean + float(stdtrit(count - 1, CONFIDENCE)) * deviation / sqrt(count) if count > 1 else inf
    if set(losses) <= {-1.0, 0.0, 1.0}:
        worse, better = sum(loss > 0 for loss in losses), sum(loss < 0 for loss in losses)
        most = float(betaincinv(worse + 1, count - worse, CONFIDENCE)) if worse < count else 1.0
        exact = most - better / count
        bound = exact if count == 1 else max(bound, exact)
    return Drop(mean, bound, count, deviation if count > 1 else 1.0)
