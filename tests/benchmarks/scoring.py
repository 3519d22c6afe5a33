"""How near and how fast a model is, measured with onnxruntime and numpy alone, without quantcli's own metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime as ort

Feeds = Mapping[str, np.ndarray]


def session(path: Path, *, threads: int = 2, exact: bool = False) -> ort.InferenceSession:
    """A model on the CPU; ``exact`` asks for kernels whose sums cannot saturate, which no file can ask for itself."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads of one model must not spin while another is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path: Path, samples: Iterable[Feeds], *, exact: bool = False) -> list[np.ndarray]:
    """The first output for every sample."""
    model = session(path, exact=exact)
    wanted = {each.name for each in model.get_inputs()}
    return [
        np.asarray(model.run(None, {name: value for name, value in feeds.items() if name in wanted})[0])
        for feeds in samples
    ]


def sqnr_db(reference: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> float:
    """Signal to quantization noise over all samples together, in dB."""
    signal = sum(float(np.square(each.astype(np.float64)).sum()) for each in reference)
    noise = sum(
        float(np.square(each.astype(np.float64) - other).sum()) for each, other in zip(reference, got, strict=True)
    )
    return float(10 * np.log10(signal / noise)) if noise else float("inf")


def cosine(reference: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> float:
    """Mean cosine similarity of vectors along the last axis."""
    found = []
    for each, other in zip(reference, got, strict=True):
        left, right = each.astype(np.float64), other.astype(np.float64)
        lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
        found.append(((left * right).sum(-1) / lengths).ravel())
    return float(np.concatenate(found).mean())


def agreement(reference: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> float:
    """Share of samples whose largest value is at the same place."""
    return float(np.mean([each.argmax() == other.argmax() for each, other in zip(reference, got, strict=True)]))


@dataclass(frozen=True)
class Latency:
    """Median time of a call of two models in ms, and how many times faster the first is, with a 95% interval."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float

    @property
    def not_slower(self) -> bool:
        """Whether the interval holds 1, or lies above it."""
        return self.high >= 1

    def __str__(self) -> str:
        return f"{self.ours:.2f} / {self.theirs:.2f} ms"


def latency(ours: Path, theirs: Path, samples: Sequence[Feeds], *, threads: int, rounds: int = 60) -> Latency:
    """Time two models in turns, so that what else the machine does falls on both.

    The ratio is the median over rounds of theirs by ours; its interval is that of the sign test.
    """
    models = [session(path, threads=threads) for path in (ours, theirs)]
    wanted = [{each.name for each in model.get_inputs()} for model in models]
    taken = np.empty((2, rounds))
    for number in range(-3, rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            feeds = {key: value for key, value in samples[number % len(samples)].items() if key in wanted[index]}
            models[index].run(None, feeds)
            start = perf_counter()
            models[index].run(None, feeds)
            if number >= 0:
                taken[index, number] = perf_counter() - start
    ratios = np.sort(taken[1] / taken[0])
    # Ranks between which the median lies with 95%: binomial with half a chance, normal approximation.
    spread = round(0.98 * rounds**0.5)
    low, high = ratios[max(0, rounds // 2 - spread)], ratios[min(rounds - 1, rounds // 2 + spread)]
    medians = np.median(taken, axis=1) * 1e3
    return Latency(*map(float, medians), float(np.median(ratios)), float(low), float(high))


def recognized(probabilities: np.ndarray, characters: Sequence[str]) -> str:
    """Greedy CTC decoding (Graves et al. 2006) of ``[1, steps, characters]``: repeats merged, then blanks dropped."""
    best = probabilities[0].argmax(-1)
    changed = np.insert(best[1:] != best[:-1], 0, True)
    return "".join(characters[index] for index in best[changed & (best != 0)])


@cache
def recognizer_characters(model: Path) -> list[str]:
    """What the recognizer's classes stand for, as its metadata says: a blank first, a space last."""
    listed = session(model).get_modelmeta().custom_metadata_map["character"].splitlines()
    return ["", *listed, " "]
