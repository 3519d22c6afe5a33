"""Samples for a decoder: each is a whole text, beside which the cache is empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from quantcli.core.ports import Arrays
from quantcli.data.sources.base import Sample, SampleSource

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np


class BesideCache:
    """Samples of a source with the same arrays beside each; see `quantcli.data.sources.base.SampleSource`."""

    def __init__(self, source: SampleSource, cache: Arrays) -> None:
        """Take the samples of ``source``; ``cache`` holds arrays with a batch axis of 1, by the names of inputs."""
        self._source, self._cache = source, cache
        self.fixed_batch, self.labels, self.warnings = source.fixed_batch, source.labels, source.warnings

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """At most so many samples, or all of them."""
        return self._source.choose(wanted, seed)

    def files(self, chosen: Sequence[int]) -> Iterable[Path]:
        """The files that these samples are read from."""
        return self._source.files(chosen)

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """These samples, in this order."""
        for sample in self._source.iterate(chosen):
            inputs: dict[str, np.ndarray] = {**sample.inputs, **self._cache}
            yield replace(sample, inputs=inputs)

    def digest(self, chosen: Sequence[int]) -> str:
        """A hash of these samples, which an empty cache is no part of."""
        return self._source.digest(chosen)
