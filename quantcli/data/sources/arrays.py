"""Samples of ``.npz`` and ``.npy`` files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from quantcli.core.ports import Port
from quantcli.data.array_files import ARRAY_SUFFIXES, ArrayFile
from quantcli.data.fitting import converted, labels_of, layouts, mismatch
from quantcli.data.request import DataRequest
from quantcli.data.sources.base import Labels, Sample, evenly, fixed_batch_of, hash_samples
from quantcli.errors import InputError

DESCRIPTION, IS_TEXT = f"a {' or '.join(ARRAY_SUFFIXES)} file, a folder of those", False
OPTIONS: tuple[str, ...] = ()


def accepts(data: str) -> bool:
    """Whether DATA is such a file or folder."""
    return bool(_array_files(Path(data)))


def open_source(request: DataRequest, ports: Sequence[Port], folder: Path | None) -> ArraySource:
    """Open every file once."""
    path = Path(request.data)
    return ArraySource(_array_files(path), ports, path)


def _array_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(e for e in path.iterdir() if e.suffix in ARRAY_SUFFIXES and not e.name.startswith("."))
    return [path] if path.suffix in ARRAY_SUFFIXES and path.is_file() else []


class ArraySource:
    """Samples in ``.npz`` and ``.npy`` files; in a folder each file is one sample, or a batch of them."""

    warnings: list[str]

    def __init__(self, files: Sequence[Path], ports: Sequence[Port], given: Path) -> None:
        from quantcli.models.inputs import following

        self._following = following(ports)
        self._ports = [replace(port, optional=port.optional or port.name in self._following) for port in ports]
        self._single = given.is_dir()
        self.warnings = []
        self._starts = [0]
        self._files = list(files)
        labelled = []
        batches = set[int | None]()
        for file in files:
            opened = self._open(file)
            self._starts.append(self._starts[-1] + opened.count)
            labelled.append(opened.labels is not None)
            batches.add(fixed_batch_of(ports, opened.forms, str(file)))
        if not self._starts[-1]:
            raise InputError(f"{given} holds no samples: its arrays are empty.")
        if len(set(labelled)) > 1:
            missing = files[labelled.index(False)]
            raise InputError(f"{missing} has no labels, and others in {given} do.")
        # Files that are fed as they are cannot be stacked with others.
        self.labels: Labels = "classes" if labelled[0] else ""
        self.fixed_batch = 1 if 1 in batches else batches.pop()

    def _open(self, path: Path) -> _Opened:
        return _Opened(ArrayFile(path, self._ports), self._ports, self._following, single=self._single)

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """Spread evenly over all files.

        Where files hold what the model takes at a time, that stays together: it may be one sequence or vector.
        """
        fixed = self.fixed_batch or 1
        whole = all(start % fixed == 0 for start in self._starts)
        return evenly(self._starts[-1], wanted, fixed if whole else 1)

    def files(self, chosen: Sequence[int]) -> Iterable[Path]:
        """All files: each is opened anew."""
        return self._files

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """Samples by index, one file open at a time."""
        number, opened = -1, None
        for index in chosen:
            holder = bisect_right(self._starts, index) - 1
            if opened is None or holder != number:
                number, opened = holder, self._open(self._files[holder])
            yield opened.sample(index - self._starts[number])

    def digest(self, chosen: Sequence[int]) -> str:
        """Hash of the arrays."""
        return hash_samples(self.iterate(chosen))


class _Opened:
    """One file's arrays, known to fit; ``following`` names inputs that are made of token ids where it lacks them."""

    def __init__(self, file: ArrayFile, ports: Sequence[Port], following: set[str], *, single: bool) -> None:
        self._file, self._ports, where = file, ports, str(file.path)
        self._made = [port for port in ports if port.name in following and port.name not in file.arrays]
        self.forms = layouts(ports, file.arrays, where, single=single)
        if len({form == "single" for form in self.forms.values()}) > 1:
            raise mismatch(ports, file.arrays, where)
        counts = {
            name: 1 if form in ("single", "whole") else len(file.arrays[name]) for name, form in self.forms.items()
        }
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise InputError(f"{where} has different numbers of samples: {listed}.", "The first axis counts samples.")
        # What a model without inputs is fed is nothing, once.
        self.count = next(iter(counts.values()), 1)
        self.labels = None
        if file.labels is not None:
            self.labels = labels_of(file.labels.reshape(-1) if self.count == 1 else file.labels, self.count, where)

    def sample(self, index: int) -> Sample:
        where = f"Sample {index} of {self._file.path}"
        inputs = {}
        for port in (port for port in self._ports if port.name in self.forms):
            array, form = self._file.arrays[port.name], self.forms[port.name]
            entry = {
                "rows": lambda a: a[index : index + 1],
                "entries": lambda a: a[index],
                "single": lambda a: a[None],
                "whole": lambda a: a,
            }
            inputs[port.name] = converted(entry[form](array), port, where)
        self._file.release()
        if self._made:
            from quantcli.models.inputs import derived_inputs

            derived = derived_inputs(inputs["input_ids"])
            inputs |= {port.name: converted(derived[port.name], port, where) for port in self._made}
        return Sample(inputs, None if self.labels is None else int(self.labels[index]), where)
