"""Samples of a user's function that yields dicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from quantcli.core.ports import Port
from quantcli.data.array_files import LABELS
from quantcli.data.fitting import Layout, converted, labels_of, layouts, mismatch
from quantcli.data.request import DataRequest
from quantcli.data.sources.base import Labels, Sample, batch_sizes, hash_samples
from quantcli.errors import InputError
from quantcli.system.user_functions import is_function, load_function

DESCRIPTION, IS_TEXT = "package.module:function", False
OPTIONS: tuple[str, ...] = ()


def accepts(data: str) -> bool:
    """Whether DATA names a function."""
    return is_function(data)


def open_source(request: DataRequest, ports: Sequence[Port], folder: Path | None) -> FunctionSource:
    """Call the function once."""
    return FunctionSource(request.data, ports, request.samples)


class FunctionSource:
    """What a function yields: a dict of arrays by input name, perhaps with ``labels``, or a pair of dict and labels.

    Each dict is one sample or a batch. The function is called once to count and check, and again for each pass.
    """

    fixed_batch: int | None
    warnings: list[str]

    def __init__(self, spec: str, ports: Sequence[Port], wanted: int | None) -> None:
        self._spec, self._ports = spec, ports
        self._function = load_function(spec)
        self.warnings = []
        self.fixed_batch = None
        self.labels: Labels = ""
        self._forms: dict[str, Layout] | None = None
        seen = list[bool]()

        def noted(sample: Sample) -> Sample:
            seen.append(sample.label is not None)
            return sample

        self._digest = hash_samples(map(noted, islice(self._samples(), wanted)))
        if not seen:
            raise InputError(f"{spec} yields no samples.")
        if len(set(seen)) > 1:
            raise InputError(f"{spec} yields labels for some samples only.")
        self.count, self.labels = len(seen), "classes" if seen[0] else ""

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """The first ones: there is no way to the others but through these."""
        return range(min(self.count, wanted or self.count))

    def files(self, chosen: Sequence[int]) -> Iterable[Path]:
        """None that are known."""
        return ()

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """The first samples."""
        return islice(self._samples(), len(chosen))

    def digest(self, chosen: Sequence[int]) -> str:
        """Hash of the arrays of the first pass, where these are all of them."""
        return self._digest if len(chosen) == self.count else hash_samples(self.iterate(chosen))

    def _samples(self) -> Iterator[Sample]:
        try:
            yield from self._split()
        except InputError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"{self._spec} failed: {type(error).__name__}: {error}".rstrip(".") + ".") from error

    def _split(self) -> Iterator[Sample]:
        import numpy as np

        for number, item in enumerate(self._function(), 1):
            where = f"Item {number} of {self._spec}"
            found, labels = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
            if not isinstance(found, Mapping):
                raise InputError(f"{where} is {type(item).__name__}; expected is a dict of arrays by input name.")
            arrays = {name: np.asarray(_plain(value)) for name, value in found.items()}
            if LABELS not in {port.name for port in self._ports} and LABELS in arrays:
                labels = arrays.pop(LABELS)
            forms = layouts(self._ports, arrays, where, single=True)
            if "entries" in forms.values() or len({form == "single" for form in forms.values()}) > 1:
                raise mismatch(self._ports, arrays, where)
            single = "single" in forms.values()
            whole = "whole" in forms.values()
            counts = {1 if single or not array.ndim else len(array) for array in arrays.values()}
            sizes = batch_sizes(self._ports)
            present = (port for port in self._ports if port.name in forms)
            inputs = {port.name: converted(arrays[port.name], port, where) for port in present}
            if whole or len(counts) > 1:
                # First axes that differ count no samples: this is one whole feed.
                self.fixed_batch = 1
                yield Sample(inputs, None if labels is None else int(labels_of(np.reshape(labels, -1), 1, where)[0]))
                continue
            if sizes:
                self.fixed_batch = sizes.pop()
            count = counts.pop()
            classes = None if labels is None else labels_of(np.asarray(_plain(labels)).reshape(-1), count, where)
            for index in range(count):
                entry = {name: value[None] if single else value[index : index + 1] for name, value in inputs.items()}
                yield Sample(entry, None if classes is None else int(classes[index]))


def _plain(value: Any) -> Any:
    """A torch tensor as an array."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
