"""Where samples come from: arrays in files, images in folders, a function of the user's own."""

from __future__ import annotations

import hashlib
import io
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.arrays import LABELS, ArrayFile, Layout, converted, labels_of, layouts, mismatch
from quantcli.data import spread
from quantcli.errors import InputError
from quantcli.functions import load_function
from quantcli.graph.model import Port
from quantcli.images import Preprocess, open_image
from quantcli.parallel import usable_cores

if TYPE_CHECKING:
    import numpy as np

#: Of the images chosen, the share that may be unreadable.
MAX_UNREADABLE = 0.01
_NAMED = 3


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


class ArraySource:
    """Samples in ``.npz`` and ``.npy`` files; in a folder each file is one sample, or a batch of them."""

    warnings: list[str]

    def __init__(self, files: Sequence[Path], ports: Sequence[Port], given: Path) -> None:
        self._ports, self._single = ports, given.is_dir()
        self.warnings = []
        self._starts = [0]
        self._files = list(files)
        labelled = []
        batch: int | None = None
        for file in files:
            opened = self._open(file)
            self._starts.append(self._starts[-1] + opened.count)
            labelled.append(opened.labels is not None)
            batch = fixed_batch_of(ports, opened.forms, str(file))
        if not self._starts[-1]:
            raise InputError(f"{given} holds no samples: its arrays are empty.")
        if len(set(labelled)) > 1:
            missing = files[labelled.index(False)]
            raise InputError(f"{missing} has no labels, and others in {given} do.")
        self.labels, self.fixed_batch = labelled[0], batch

    def _open(self, path: Path) -> _Opened:
        return _Opened(ArrayFile(path, self._ports), self._ports, single=self._single)

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """Spread evenly over all files."""
        return evenly(self._starts[-1], wanted)

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
    """One file's arrays, known to fit."""

    def __init__(self, file: ArrayFile, ports: Sequence[Port], *, single: bool) -> None:
        self._file, self._ports, where = file, ports, str(file.path)
        self.forms = layouts(ports, file.arrays, where, single=single)
        if len({form == "single" for form in self.forms.values()}) > 1:
            raise mismatch(ports, file.arrays, where)
        counts = {name: 1 if form == "single" else len(file.arrays[name]) for name, form in self.forms.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise InputError(f"{where} has different numbers of samples: {listed}.", "The first axis counts samples.")
        self.count = next(iter(counts.values()))
        self.labels = None
        if file.labels is not None:
            self.labels = labels_of(file.labels.reshape(-1) if self.count == 1 else file.labels, self.count, where)

    def sample(self, index: int) -> Sample:
        where = f"Sample {index} of {self._file.path}"
        inputs = {}
        for port in (port for port in self._ports if port.name in self.forms):
            array, form = self._file.arrays[port.name], self.forms[port.name]
            entry = {"rows": lambda a: a[index : index + 1], "entries": lambda a: a[index], "single": lambda a: a[None]}
            inputs[port.name] = converted(entry[form](array), port, where)
        self._file.release()
        return Sample(inputs, None if self.labels is None else int(self.labels[index]))


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
        self.fixed_batch, self.labels = None, False
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
        self.count, self.labels = len(seen), seen[0]

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """The first ones: there is no way to the others but through these."""
        return range(self.count)

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """The first samples."""
        return islice(self._samples(), len(chosen))

    def digest(self, chosen: Sequence[int]) -> str:
        """Hash of the arrays of the first pass."""
        return self._digest

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
            counts = {1 if single or not array.ndim else len(array) for array in arrays.values()}
            sizes = {port.shape[0] for port in self._ports if port.shape and isinstance(port.shape[0], int)}
            present = (port for port in self._ports if port.name in forms)
            inputs = {port.name: converted(arrays[port.name], port, where) for port in present}
            if len(counts) > 1:
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


class ImageSource:
    """Images, perhaps in a folder for each class; the classes are numbered in the order of ``groups``."""

    def __init__(
        self, groups: Sequence[Sequence[Path]], labels: bool, ports: Sequence[Port], preprocess: Preprocess, given: Path
    ) -> None:
        if len(ports) != 1:
            raise InputError(
                f"{given} holds images, and the model has {len(ports)} inputs: {', '.join(map(str, ports))}.",
                "Give arrays, or a function that yields them.",
            )
        self._files = [(file, number) for number, group in enumerate(groups) for file in group]
        self._port, self._preprocess, self.labels = ports[0], preprocess, labels
        self.warnings: list[str] = []
        self._given = given
        self.fixed_batch: int | None = None
        self._hashes: dict[int, str] = {}
        if self._port.dtype.kind in "iu" and not preprocess.is_integral:
            raise InputError(
                f"The input {self._port} takes integers, and the preprocessing makes fractions.",
                "State it with --preprocess: rescale: 1, no mean, no std.",
            )

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """As many of each class as there are, in turns, by the seed; of unlabelled ones spread evenly.

        Those that cannot be read are left out. Raises InputError where they are too many.
        """
        chosen = self._balanced(wanted, seed) if self.labels and wanted else evenly(len(self._files), wanted)
        with ThreadPoolExecutor(usable_cores()) as pool:
            found = dict(zip(chosen, pool.map(self._check, chosen), strict=True))
        bad = {index: error for index, (_, error) in found.items() if error}
        if bad:
            first = [f"{self._files[index][0]} ({error})" for index, error in list(bad.items())[:_NAMED]]
            more = f", and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            message = f"{len(bad)} of {len(chosen)} images cannot be read: {'; '.join(first)}{more}."
            if len(bad) > MAX_UNREADABLE * len(chosen):
                raise InputError(message, "Remove or repair them.")
            self.warnings.append(f"{message} They were left out.")
        self._hashes = {index: digest for index, (digest, _) in found.items()}
        good = [index for index in chosen if index not in bad]
        array = self._array(good[0])
        forms = layouts([self._port], {self._port.name: array}, f"{self._files[good[0]][0]}, preprocessed,")
        self.fixed_batch = fixed_batch_of([self._port], forms, str(self._given))
        return good

    def _balanced(self, wanted: int, seed: int) -> list[int]:
        numbered: dict[int, list[int]] = {}
        for index, (_, number) in enumerate(self._files):
            numbered.setdefault(number, []).append(index)
        classes = list(numbered.values())
        rng = random.Random(seed)
        rng.shuffle(classes)
        for members in classes:
            rng.shuffle(members)
        turns = (members[turn] for turn in range(max(map(len, classes))) for members in classes if turn < len(members))
        return list(islice(turns, wanted))

    def _check(self, index: int) -> tuple[str, str | None]:
        """Hash of a file, and why it cannot be read."""
        content = b""
        try:
            content = self._files[index][0].read_bytes()
            open_image(io.BytesIO(content), draft=True)
            problem = None
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            problem = " ".join(str(error).replace(repr(error), "").split()).rstrip(".") or type(error).__name__
            problem = "no known kind of image" if "cannot identify image" in problem else problem
        return hashlib.sha256(content).hexdigest(), problem

    @cached_property
    def _settings(self) -> str:
        return self._preprocess.model_dump_json()

    def _array(self, index: int) -> np.ndarray:
        file = self._files[index][0]
        try:
            return self._preprocess.apply(open_image(file)).astype(self._port.dtype)
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise InputError(f"{file} can no longer be read: {error}.") from error

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """Decode and preprocess, one image at a time."""
        for index in chosen:
            array = self._array(index)
            layouts([self._port], {self._port.name: array}, f"{self._files[index][0]}, preprocessed,")
            yield Sample({self._port.name: array}, self._files[index][1] if self.labels else None)

    def digest(self, chosen: Sequence[int]) -> str:
        """Hash of the files' hashes, their labels, and the preprocessing."""
        lines = [f"{self._hashes[index]} {self._files[index][1] if self.labels else None}" for index in chosen]
        return hashlib.sha256("\n".join([self._settings, *lines]).encode()).hexdigest()
