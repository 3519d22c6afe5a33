"""Where samples come from: arrays in files, images in folders, a function of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quantcli.core.ports import Port
from quantcli.data.fitting import Layout
from quantcli.data.text_files import spread
from quantcli.errors import InputError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample: an array for each input, with a batch axis of 1, and its class where that is known."""

    inputs: dict[str, np.ndarray]
    label: int | None = None


class Source(Protocol):
    """Where samples come from. ``fixed_batch``: the only number of samples that fits the model, or None."""

    fixed_batch: int | None
    labels: bool
    warnings: list[str]

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """At most so many samples, or all of them."""

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
            digest.update(array.tobytes())
        digest.update(f"{sample.label}\n".encode())
    return digest.hexdigest()


def evenly(available: int, wanted: int | None) -> Sequence[int]:
    """Indices of at most ``wanted`` of so many samples."""
    return range(available) if wanted is None or wanted >= available else spread(available, wanted)


def fixed_batch_of(ports: Sequence[Port], forms: Mapping[str, Layout], where: str) -> int | None:
    """How many samples a model takes at a time, as its inputs' first dimensions say; None: any number."""
    if "entries" in forms.values():
        return 1
    fixed = {port.shape[0] for port in ports if port.shape and isinstance(port.shape[0], int)}
    if len(fixed) > 1:
        raise InputError(
            f"The first dimensions of the model's inputs differ ({', '.join(map(str, ports))}), so they count no "
            f"samples, and the arrays of {where} must have one axis more than the inputs."
        )
    return fixed.pop() if fixed else None
