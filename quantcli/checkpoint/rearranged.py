"""A checkpoint whose tensors are joined and split by rows, as the library that runs the model holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint, CheckpointView
from quantcli.core.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Run:
    """``count`` rows of a stored tensor, from ``first`` on, ``step`` apart."""

    source: TensorInfo
    first: int
    step: int
    count: int

    def between(self, start: int, stop: int) -> Run:
        """Some of these rows."""
        return replace(self, first=self.first + start * self.step, count=stop - start)


class RearrangedCheckpoint(CheckpointView):
    """A checkpoint seen with other tensors in the place of some, made of their rows; these are read as asked for."""

    def __init__(self, original: Checkpoint, made: Mapping[str, Mapping[str, Any]]) -> None:
        """See ``original`` with the tensors of ``made`` in place of those that they are made of.

        Each has the names of its ``sources``, and as ``runs`` what its rows are, one run after the other: the number of
        the source, the first row, the step between rows, and how many there are.
        """
        stored = {info.name: info for info in original.infos()}
        self._runs: dict[str, list[Run]] = {}
        by_source: dict[str, list[TensorInfo]] = {}
        for name, how in made.items():
            sources = [stored[source] for source in how["sources"]]
            runs = [Run(sources[number], first, step, count) for number, first, step, count in how["runs"]]
            rows = sum(run.count for run in runs)
            nbytes = sources[0].nbytes // sources[0].rows * rows
            info = replace(sources[0], name=name, shape=(rows, *sources[0].shape[1:]), nbytes=nbytes, shares=None)
            self._runs[name] = runs
            by_source.setdefault(sources[0].name, []).append(info)
        gone = {source for how in made.values() for source in how["sources"]}
        infos: list[TensorInfo] = []
        for info in original.infos():
            infos += [info] if info.name not in gone else by_source.get(info.name, [])
        super().__init__(original, infos)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype."""
        import torch

        if info.name not in self._runs:
            return self.original.read_rows(info, start, stop)
        parts = [self._read(run) for run in self._between(info.name, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _between(self, name: str, start: int, stop: int) -> Iterator[Run]:
        begin = 0
        for run in self._runs[name]:
            first, last = max(start - begin, 0), min(stop - begin, run.count)
            if first < last:
                yield run.between(first, last)
            begin += run.count

    def _read(self, run: Run) -> Tensor:
        end = run.first + run.step * (run.count - 1) + 1
        return self.original.read_rows(run.source, run.first, end)[:: run.step]
