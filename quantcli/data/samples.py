"""Samples from a path: arrays, images, text, or a function of the user's own, as a model's inputs.

Everything is checked against the inputs before work starts, and read when it is iterated over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.core.ports import Port
from quantcli.data.not_finite import NotFinite
from quantcli.data.request import DataRequest
from quantcli.data.sources import kinds_of, source_kinds
from quantcli.data.sources.base import Labels, Sample, SampleSource, SourceKind, evenly
from quantcli.errors import InputError, UsageError
from quantcli.models.batch_size import least_batch_size
from quantcli.system import ranks
from quantcli.system.files import Unchanged

if TYPE_CHECKING:
    import numpy as np

    #: Samples stacked by the names of inputs, and their labels.
    Batch = tuple[dict[str, np.ndarray], list[int | str | None]]

__all__ = ["Sample", "Samples", "batches", "choose_samples", "load_samples", "open_source", "own_batches"]


class Samples:
    """Chosen samples; iterating over them reads them anew each time.

    ``source`` is DATA as it was given, ``labels`` says whether every sample has one.
    """

    def __init__(
        self, source: str, data: SampleSource, chosen: Sequence[int], watched: Unchanged | None = None
    ) -> None:
        self.source, self._data, self._chosen = source, data, chosen
        self._told = list(data.warnings)
        self._not_finite = NotFinite()
        #: Files as they were when samples were chosen; those that are all in memory already are none.
        self._watched = watched or Unchanged(_files_of(data, chosen))
        self._keep_whole_batches()

    def _some(self, chosen: Sequence[int]) -> Samples:
        """Others of the same source, which share what was found in it while it was read."""
        found = Samples(self.source, self._data, chosen, self._watched)
        found._told, found._not_finite = [], self._not_finite
        return found

    @property
    def warnings(self) -> list[str]:
        """What is to be said of the samples; that some hold no finite numbers once they were read."""
        return [*self._told, *self._not_finite.warnings()]

    def _keep_whole_batches(self) -> None:
        fixed, count = self.fixed_batch, len(self._chosen)
        if fixed and count % fixed:
            whole = count // fixed * fixed
            if not whole:
                raise InputError(f"{self.source} has {count} samples, and the model takes {fixed} at a time.")
            self._told.append(f"The model takes {fixed} samples at a time; the last {count - whole} are left.")
            self._chosen = self._chosen[:whole]

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Sample]:
        for index, sample in zip(self._chosen, self._data.iterate(self._chosen), strict=False):
            self._not_finite.look(index, sample, self.source)
            yield sample

    def require_unchanged(self) -> None:
        """Raise InputError where a file that samples are read from was written or replaced since they were chosen."""
        self._watched.require()

    def spread(self, most: int) -> Samples:
        """At most so many of the samples, evenly spread: one or more times as many as the model takes at a time."""
        most = max(most, self.fixed_batch or 1)
        return self._some([self._chosen[index] for index in evenly(len(self), most, self.fixed_batch or 1)])

    def part(self, numbers: range) -> Samples:
        """Some of the samples that follow each other."""
        return self._some(self._chosen[numbers.start : numbers.stop])

    def only(self, number: int) -> Samples:
        """One of the samples."""
        return self._some([self._chosen[number]])

    def without(self, others: Samples) -> Samples:
        """Those samples that are not among others of the same source. Raises InputError where none is left."""
        taken = set(others._chosen)
        left = [number for number in self._chosen if number not in taken]
        if not left:
            raise InputError(f"{self.source} has too few samples to hold some out: {len(self)}.", "Give more data.")
        return self._some(left)

    @property
    def labels(self) -> Labels:
        """What samples are labelled with."""
        return self._data.labels

    @property
    def fixed_batch(self) -> int | None:
        """The only number of samples that fits the model at a time, or None where any does."""
        return self._data.fixed_batch

    def settle_batch_size(self, run: Callable[[Mapping[str, np.ndarray]], object]) -> None:
        """Find the number of samples that a model runs on at a time, where its inputs leave that open.

        Where it runs on no number of them, whoever runs it next says why. ``run`` raises InputError where it does not.
        """
        if self.fixed_batch is None:
            size = least_batch_size(run, self._first, len(self))
            if size is not None and size > 1:
                self._data.fixed_batch = size
                self._keep_whole_batches()

    def _first(self, size: int) -> dict[str, np.ndarray] | None:
        """The first samples, so many of equal shapes; None where there are fewer."""
        arrays, labels = next(batches(self, size))
        return arrays if len(labels) == size else None

    @cached_property
    def sha256(self) -> str:
        """Hash of the samples chosen: of their arrays, or of the image files and their preprocessing."""
        return self._data.digest(self._chosen)


def _files_of(data: SampleSource, chosen: Sequence[int]) -> Iterable[Path]:
    """The files to be watched; a source of a user's own need not name any."""
    return data.files(chosen) if hasattr(data, "files") else ()


def load_samples(request: DataRequest, inputs: Sequence[Port], *, folder: Path | None) -> Samples:
    """Samples for a model.

    Args:
        request: where they come from, and how they are made.
        inputs: what the model asks for.
        folder: the model's folder, for its tokenizer and its preprocessor_config.json.

    Raises:
        UsageError: a wish that does not go with this data.
        InputError: the data is missing, empty, damaged, or does not fit the inputs.
    """
    return choose_samples(request, open_source(request, inputs, folder=folder))


def choose_samples(request: DataRequest, source: SampleSource) -> Samples:
    """As many samples of an open source as are asked for.

    Raises:
        InputError: they are fewer than the model takes at a time, or too many cannot be read.
    """
    wanted = request.samples
    if wanted is not None and request.limited:
        wanted = max(wanted, source.fixed_batch or 1)
    return Samples(request.data, source, source.choose(wanted, request.seed))


def open_source(
    request: DataRequest, inputs: Sequence[Port], *, folder: Path | None, tokenizer: Path | None = None
) -> SampleSource:
    """Where samples come from, before any is chosen. Arguments and errors are those of `load_samples`.

    ``tokenizer`` is its folder where the request names none.
    """
    data = request.data
    if request.samples is not None and request.samples < 1:
        raise UsageError(f"--samples {request.samples}: at least one is needed.")
    kinds = kinds_of(data)
    _require_options(request, kinds.values())
    if len(kinds) > 1:
        raise InputError(f"{data} holds both {' and '.join(kinds)}.", "Give them separately.")
    if not kinds:
        path, described = Path(data), [kind.DESCRIPTION for kind in source_kinds().values()]
        what = "holds no samples: neither arrays nor images" if path.is_dir() else "is of no known kind"
        raise InputError(
            f"{data} {what if path.exists() else 'does not exist'}.",
            f"DATA is {', '.join(described[:-1])}, or {described[-1]}.",
        )
    request = replace(request, tokenizer=request.tokenizer or tokenizer)
    return kinds.popitem()[1].open_source(request, inputs, folder)


def _require_options(request: DataRequest, kinds: Collection[SourceKind]) -> None:
    """Raise UsageError for an option that does nothing with data of these kinds."""
    wishes = {
        "--seq-len": (request.seq_len, "text"),
        "--tokenizer": (request.tokenizer, "text"),
        "--preprocess": (request.preprocess, "a folder of images"),
    }
    for option, (value, what) in wishes.items():
        if value is not None and kinds and not any(option in kind.OPTIONS for kind in kinds):
            raise UsageError(f"{option} is for {what}, and {request.data} is none.", "Leave the option out.")


def own_batches(samples: Samples, size: int) -> Iterator[Batch]:
    """This rank's share of `batches`: neighbours where that can be told beforehand."""
    if size == 1 or samples.fixed_batch:
        yield from batches(samples.part(ranks.part(len(samples), samples.fixed_batch or 1)), size)
        return
    # Where a batch ends is known once all samples before it are read.
    for number, batch in enumerate(batches(samples, size)):
        if number % ranks.world() == ranks.rank():
            yield batch


def batches(samples: Samples, size: int) -> Iterator[Batch]:
    """Samples stacked along the batch axis, at most ``size`` of them, neighbours of equal shape only; and labels.

    Raises:
        InputError: the model takes a fixed number of samples, and their shapes differ.
    """
    fixed = samples.fixed_batch
    size = fixed or size
    waiting: list[Sample] = []
    for sample in samples:
        if waiting and (len(waiting) == size or not _alike(waiting[0], sample)):
            yield _stacked(waiting, fixed)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _stacked(waiting, fixed)


def _alike(left: Sample, right: Sample) -> bool:
    return all(left.inputs[name].shape == array.shape for name, array in right.inputs.items())


def _stacked(group: list[Sample], fixed: int | None) -> tuple[dict[str, np.ndarray], list[int | str | None]]:
    import numpy as np

    if fixed and len(group) != fixed:
        raise InputError(f"The model takes {fixed} samples at a time, and their shapes differ.")
    if len(group) == 1:
        return group[0].inputs, [group[0].label]
    names = group[0].inputs
    return {name: np.concatenate([each.inputs[name] for each in group]) for name in names}, [g.label for g in group]
