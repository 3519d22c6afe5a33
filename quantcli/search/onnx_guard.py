"""`int8-static` that protects itself: the few layers that ruin the outputs are found, and keep out of fixed ranges.

Layers are searched by halves: a set of them is quantized alone, and the set that leaves most noise is split, until
what is left over leaves little. A handful of culprits among a hundred layers takes some twenty runs.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from quantcli.benchmarking.timing import Timing, speedup, time_interleaved
from quantcli.conversion.onnx.advice import GOOD_OUTPUT_SQNR_DB
from quantcli.conversion.onnx.guard import Attempt, Protection
from quantcli.core.ports import Arrays
from quantcli.errors import InputError
from quantcli.models.session import Session, session_of
from quantcli.planning.recipe import Recipe
from quantcli.search.choices import SKIP, Rule
from quantcli.search.onnx_runs import GraphRuns
from quantcli.system.text import format_seconds, listed

#: Runs of a graph that a search may take; a number, not a time, so that equal inputs give equal artifacts.
_MOST_RUNS = 32
#: More than this share of the layers is not a few: then another scheme is the answer.
_FEW = 0.34
#: Outputs that get better by so much are worth it even where they do not get good.
_BETTER_BY_DB = 6.0
#: What becomes of a culprit, in the order that is tried: what is quantized still, and what is not.
_WAYS: tuple[tuple[str, Rule], ...] = (
    ("quantized without fixed ranges", (("scheme", "int8-dynamic"),)),
    ("in floating point", SKIP),
)

#: An artifact slower than this share of its model's speed, with 95% confidence, is not written unasked.
_SLOWER = 0.95
#: A model that runs faster than this is not timed: what it takes is hardly its own.
_LEAST_MS = 1.0
_ROUNDS = 20


class StaticGuard:
    """See `quantcli.conversion.onnx.guard`."""

    def protect(self, attempt: Attempt) -> Protection | None:
        """A recipe with the layers that ruin the outputs out of fixed ranges; None where none, or too many, do."""
        before = attempt.compared.sqnr_db
        plain = attempt.recipe.scheme == "int8-static" and not attempt.recipe.rules
        if not plain or before is None or before >= GOOD_OUTPUT_SQNR_DB:
            return None
        started = time.monotonic()
        runs = GraphRuns(attempt.graph, attempt.model, attempt.evidence, attempt.outputs, attempt.outputs.folder)
        plan = runs.planned(attempt.recipe)
        layers = list(dict.fromkeys(node.name for node in plan.nodes if node.form == "static"))
        culprits = _Halving(runs, layers).culprits()
        if not culprits:
            return None
        best: tuple[float, str, Recipe] | None = None
        for said, rule in _WAYS:
            recipe = protected(attempt.recipe, culprits, rule)
            after = runs.sqnr_db(recipe)
            if best is None or after >= GOOD_OUTPUT_SQNR_DB or after > best[0] + _BETTER_BY_DB:
                best = after, said, recipe
            if after >= GOOD_OUTPUT_SQNR_DB:
                break
        assert best is not None
        after, said, recipe = best
        if after < min(before + _BETTER_BY_DB, max(GOOD_OUTPUT_SQNR_DB, before + 1)):
            return None
        ratio = self._time_by(runs, recipe, attempt)
        seconds = time.monotonic() - started
        share = "as long as before" if abs(ratio - 1) < 0.02 else f"{ratio:.2f} times as long as before"
        one = len(culprits) == 1
        warning = (
            f"{len(culprits)} of {len(layers)} layers {'ruins' if one else 'ruin'} the outputs with fixed ranges and "
            f"{'is' if one else 'are'} {said}: {listed(culprits)}. That leaves {after:.1f} dB in place of "
            f"{before:.1f}; a run takes {share}. To find them took {format_seconds(seconds)}."
        )
        details = {
            "layers": culprits, "rule": dict(recipe.rules[-1].model_dump(exclude_unset=True, exclude={"match"})),
            "sqnr_db_before": before, "sqnr_db": after, "time_ratio": ratio, "search_seconds": round(seconds, 3),
        }  # fmt: skip
        return Protection(recipe, (warning,), details)

    @staticmethod
    def _time_by(runs: GraphRuns, recipe: Recipe, attempt: Attempt) -> float:
        """The time of a run with the culprits out, by that of the artifact that they ruin."""
        _, file = runs.carried_out(recipe)
        feeds, _ = next(iter(attempt.outputs.feeds()))
        plain, protecting = _timed([Session(path, shared=True) for path in (attempt.artifact, file)], dict(feeds))
        return 1 / speedup(plain, protecting).ratio

    def require_speed(self, attempt: Attempt) -> None:
        """Raise InputError where an artifact of ``int8-static`` is slower than its model, clearly beyond noise."""
        hint = attempt.compared.speed
        if attempt.recipe.scheme != "int8-static" or hint is None or hint >= _SLOWER:
            return
        feeds, _ = next(iter(attempt.outputs.feeds()))
        sessions = [session_of(attempt.model, shared=True), Session(attempt.artifact, shared=True)]
        reference, candidate = _timed(sessions, dict(feeds))
        found = speedup(reference, candidate)
        if reference.percentile_ms(50) >= _LEAST_MS and found.high < _SLOWER:
            raise InputError(
                f"The artifact would be slower than its model: a run takes {candidate.percentile_ms(50):.3g} ms in "
                f"place of {reference.percentile_ms(50):.3g} (measured in turns on this machine). Nothing was written.",
                "Take --scheme int8-dynamic or int8, or write it all the same with --force.",
            )


def protected(recipe: Recipe, layers: Sequence[str], rule: Rule) -> Recipe:
    """A recipe with another rule for some layers."""
    return recipe.with_flags(rules=[{"match": [glob.escape(name) for name in layers], **dict(rule)}])


@dataclass(frozen=True)
class _Part:
    """A set of neighbouring layers, and the noise that they leave where they alone are quantized."""

    layers: Sequence[str]
    noise: float


class _Halving:
    """Finds the layers that leave most of the noise."""

    def __init__(self, runs: GraphRuns, layers: Sequence[str]) -> None:
        self.runs, self.layers, self._left = runs, layers, _MOST_RUNS

    def culprits(self) -> list[str]:
        """Layers without which the outputs would be good, in the graph's order; none where those are not a few."""
        most = int(_FEW * len(self.layers))
        parts = self._halves(self.layers) if most else []
        while parts and self._left > 0:
            single = [part for part in parts if len(part.layers) == 1]
            several = [part for part in parts if len(part.layers) > 1]
            worst = max(several, key=lambda part: part.noise, default=None)
            chosen = self._needed(single, sum(part.noise for part in several))
            if chosen is not None or worst is None:
                found = chosen if chosen is not None else []
                return [name for name in self.layers if name in found] if len(found) <= most else []
            parts.remove(worst)
            parts += self._halves(worst.layers)
        # What is known by now: the worst of those that are told apart.
        single = sorted((part for part in parts if len(part.layers) == 1), key=lambda part: -part.noise)
        worst_ones = [part.layers[0] for part in single[:most] if part.noise > _target()]
        return [name for name in self.layers if name in worst_ones]

    @staticmethod
    def _needed(single: Sequence[_Part], rest: float) -> list[str] | None:
        """The fewest layers without which the noise is as little as it should be; None where others leave more."""
        left, found = rest + sum(part.noise for part in single), []
        for part in sorted(single, key=lambda part: -part.noise):
            if left <= _target():
                break
            left -= part.noise
            found.append(part.layers[0])
        return found if left <= _target() else None

    def _halves(self, layers: Sequence[str]) -> list[_Part]:
        middle = (len(layers) + 1) // 2
        return [self._part(half) for half in (layers[:middle], layers[middle:]) if half]

    def _part(self, layers: Sequence[str]) -> _Part:
        self._left -= 1
        return _Part(layers, self.runs.noise_of_layers(dict.fromkeys(layers, (("scheme", "int8-static"),))))


def _target() -> float:
    """Noise that good outputs have, less a little for what adds up otherwise."""
    return float(10 ** (-(GOOD_OUTPUT_SQNR_DB + 1) / 10))


def _timed(sessions: Sequence[Session], feeds: Arrays) -> list[Timing]:
    functions: list[Callable[[int], object]] = [partial(_run, session, feeds) for session in sessions]
    return time_interleaved(functions, rounds=_ROUNDS)


def _run(session: Session, feeds: Arrays, number: int) -> None:
    session.run(feeds)
