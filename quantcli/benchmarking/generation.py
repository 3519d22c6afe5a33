"""How fast language models read a prompt and generate, with their caches, taking turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quantcli.benchmarking.timing import Timing, speedup, time_interleaved
from quantcli.core.ports import Arrays, cache_ports
from quantcli.models.decoder import Decoder
from quantcli.models.runner import OnnxRunner, Runner, TorchRunner
from quantcli.models.source import ModelSource
from quantcli.reporting.metric_labels import GENERATION_METRICS, GENERATION_SPEEDUPS

#: Tokens generated in a turn.
NEW_TOKENS = 8


@dataclass
class Generating:
    """A model that reads a prompt ``[1, length]`` and says the likeliest tokens after it."""

    decoder: Decoder
    prompt: np.ndarray

    def read(self, _: int) -> None:
        """Read the prompt, up to the first new token."""
        self.decoder.rewind(0)
        self._first = _likeliest(self.decoder.read(self.prompt))

    def generate(self, _: int) -> None:
        """Say what follows."""
        self.decoder.rewind(self.prompt.shape[1])
        token = self._first
        for _ in range(NEW_TOKENS):
            token = _likeliest(self.decoder.read(token))


def _likeliest(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits[:, -1:].argmax(-1), np.int64)


def measure_generation(
    sources: Sequence[ModelSource],
    runners: Sequence[Runner],
    feeds: Sequence[Arrays],
    *,
    runs: int | None,
    seed: int,
) -> list[dict[str, float | None]]:
    """Figures of every model; none where no model is a decoder with a cache, or for one that has none.

    Args:
        sources: the models, the reference first.
        runners: the same, loaded.
        feeds: batches, of which the first text is the prompt.
        runs: rounds, by default as many as `quantcli.benchmarking.timing.time_interleaved` takes.
        seed: what the order in rounds is shuffled by.
    """
    ids = feeds[0].get("input_ids")
    if ids is None or not wants_generation(sources):
        return [{} for _ in sources]
    models = [generating(runner, ids) for runner in runners]
    reading = _timed([model.read if model else None for model in models], runs, seed)
    saying = _timed([model.generate if model else None for model in models], runs, seed)
    return [
        _figures(ids.shape[1], read, said, (reading[0], saying[0]) if index else (None, None), seed)
        for index, (read, said) in enumerate(zip(reading, saying, strict=True))
    ]


def wants_generation(sources: Sequence[ModelSource]) -> bool:
    """Whether one of several models is a decoder with a cache, so that all that have one are to generate."""
    return any(source.onnx is not None and cache_ports(source.onnx.inputs) for source in sources)


def generating(runner: Runner, ids: np.ndarray) -> Generating | None:
    """A model that generates after the first text of a batch of token ids; None where it has no cache."""
    prompt = np.ascontiguousarray(ids[:1], np.int64)
    decoder: Decoder | None = None
    if isinstance(runner, OnnxRunner):
        decoder = runner.decoder(prompt.shape[1] + NEW_TOKENS)
    elif isinstance(runner, TorchRunner):
        decoder = runner.decoder()
    return Generating(decoder, prompt) if decoder else None


def _timed(functions: Sequence[Callable[[int], None] | None], runs: int | None, seed: int) -> list[Timing | None]:
    timings = iter(time_interleaved([each for each in functions if each], rounds=runs, seed=seed))
    return [next(timings) if each else None for each in functions]


def _figures(
    length: int, read: Timing | None, said: Timing | None, reference: tuple[Timing | None, Timing | None], seed: int
) -> dict[str, float | None]:
    if read is None or said is None:
        return {}
    first = read.percentile_ms(50)
    values: list[float | None] = [length / first * 1e3, first, NEW_TOKENS / said.percentile_ms(50) * 1e3]
    found = dict(zip(GENERATION_METRICS, values, strict=True))
    if reference[0] is not None and reference[1] is not None:
        pairs = ((reference[0], read), (reference[1], said))
        gains = [speedup(theirs, ours, seed).ratio for theirs, ours in pairs]
        found |= dict(zip(GENERATION_SPEEDUPS, gains, strict=True))
    return found
