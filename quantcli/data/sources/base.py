"""What every source of samples offers, and what several of them need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from quantcli.core.ports import Port
from quantcli.data.fingerprint import content
from quantcli.data.fitting import Layout
from quantcli.data.text_files import spread
from quantcli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from quantcli.data.request import DataRequest


#: What samples are labelled with: nothing, the numbers of classes, or what is said in a sound.
Labels = Literal["", "classes", "texts"]

#: Of the files chosen, the share that may be unreadable, and how many of them are named.
MAX_UNREADABLE, _NAMED = 0.01, 3


def class_folders(path: Path) -> list[Path]:
    """The folders in a folder, sorted; hidden ones are none."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def files_of_kind(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files of a folder that end in one of some suffixes; hidden ones do not count."""
    for entry in folder.iterdir():
        if entry.suffix.lower() in suffixes and not entry.name.startswith(".") and entry.is_file():
            yield entry


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample: an array for each input, with a batch axis of 1, and its class or its text where that is known.

    ``where`` is what messages call it, where it has a file of its own, or a place in one.
    """

    inputs: dict[str, np.ndarray]
    label: int | str | None = None
    where: str | None = None


class SourceKind(Protocol):
    """A module of this package: one kind of DATA."""

    #: How messages tell users of it.
    DESCRIPTION: str
    #: Whether it becomes tokens.
    IS_TEXT: bool
    #: Those of ``--seq-len``, ``--tokenizer`` and ``--preprocess`` that say how it is read.
    OPTIONS: tuple[str, ...]

    def accepts(self, data: str) -> bool:
        """Whether DATA, a path or a function's name, is of this kind."""

    def open_source(self, request: DataRequest, ports: Sequence[Port], folder: Path | None) -> SampleSource:
        """Open it for a model with these inputs; ``folder`` is the model's. Raises InputError, UsageError."""


class SampleSource(Protocol):
    """Samples that can be chosen from. ``fixed_batch``: the only number of samples that fits the model, or None."""

    fixed_batch: int | None
    labels: Labels
    warnings: list[str]

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """At most so many samples, or all of them."""

    def files(self, chosen: Sequence[int]) -> Iterable[Path]:
        """The files that these samples are read from each time they are iterated over."""

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """These samples, in this order."""

    def digest(self, chosen: Sequence[int]) -> str:
        """A hash of these samples."""


def hash_samples(samples: Iterable[Sample]) -> str:
    """Hash of arrays and labels."""
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample.inputs):
            array = sample.inputs[name]
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(content(array))
        digest.update(f"{sample.label}\n".encode())
    return digest.hexdigest()


def readable(problems: Mapping[str, str], chosen: int, what: str) -> list[str]:
    """What is to be said of files that cannot be read, and why, by name; nothing where all can.

    Raises:
        InputError: they are more than `MAX_UNREADABLE` of those that were ``chosen``.
    """
    if not problems:
        return []
    first = [f"{name} ({problem})" for name, problem in list(problems.items())[:_NAMED]]
    more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    message = f"{len(problems)} of {chosen} {what} cannot be read: {'; '.join(first)}{more}."
    if len(problems) > MAX_UNREADABLE * chosen:
        raise InputError(message, "Remove or repair them.")
    return [f"{message} They were left out."]


def evenly(available: int, wanted: int | None, together: int = 1) -> Sequence[int]:
    """Indices of at most ``wanted`` of so many samples, or of all; ``together`` neighbours each time."""
    if wanted is None or wanted >= available:
        return range(available)
    if together == 1 or wanted < together:
        return spread(available, wanted)
    groups = evenly(available // together, wanted // together)
    return [group * together + index for group in groups for index in range(together)]


def fixed_batch_of(ports: Sequence[Port], forms: Mapping[str, Layout], where: str) -> int | None:
    """How many samples a model takes at a time, as its inputs' first dimensions say; None: any number."""
    if "entries" in forms.values() or "whole" in forms.values():
        return 1
    fixed = batch_sizes(ports)
    if len(fixed) > 1:
        raise InputError(
            f"The first dimensions of the model's inputs differ ({', '.join(map(str, ports))}), so they count no "
            f"samples, and the arrays of {where} must have one axis more than the inputs."
        )
    return fixed.pop() if fixed else None


def batch_sizes(ports: Sequence[Port]) -> set[int]:
    """The numbers of samples that inputs take: those they have for a first dimension, where none of these is free.

    Where one is free, it is that one which counts samples: a fixed one beside it is a state's layers, or the like.
    """
    firsts = [port.shape[0] for port in ports if port.shape]
    fixed = {first for first in firsts if isinstance(first, int)}
    # A single one is the same for any number of samples only where the model is fed one.
    return fixed if all(isinstance(first, int) for first in firsts) or fixed == {1} else set()
