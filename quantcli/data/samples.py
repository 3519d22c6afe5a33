"""Samples from a path: arrays, images, text, or a function of the user's own, as a model's inputs.

Everything is checked against the inputs before work starts, and read when it is iterated over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.core.ports import Port
from quantcli.data.array_files import ARRAY_SUFFIXES
from quantcli.data.image_preprocessing import IMAGE_SUFFIXES, load_preprocess
from quantcli.data.request import DataRequest
from quantcli.data.sources.arrays import ArraySource
from quantcli.data.sources.base import Sample, Source, evenly
from quantcli.data.sources.functions import FunctionSource
from quantcli.data.sources.images import ImageSource
from quantcli.data.text_files import TEXT_SUFFIXES
from quantcli.errors import InputError, UsageError
from quantcli.system.user_functions import is_function

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Sample", "Samples", "batches", "load_samples"]

KINDS = (
    f"DATA is a {' or '.join(ARRAY_SUFFIXES)} file, a folder of those, a folder of images, "
    f"a {', '.join(TEXT_SUFFIXES)} file, or package.module:function."
)


class Samples:
    """Chosen samples; iterating over them reads them anew each time.

    ``source`` is DATA as it was given, ``labels`` says whether every sample has one.
    """

    def __init__(self, source: str, data: Source, chosen: Sequence[int]) -> None:
        self.source, self._data, self._chosen = source, data, chosen
        self.warnings = list(data.warnings)
        fixed = data.fixed_batch
        if fixed and len(chosen) % fixed:
            whole = len(chosen) // fixed * fixed
            if not whole:
                raise InputError(f"{source} has {len(chosen)} samples, and the model takes {fixed} at a time.")
            self.warnings.append(f"The model takes {fixed} samples at a time; the last {len(chosen) - whole} are left.")
            self._chosen = chosen[:whole]

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Sample]:
        return self._data.iterate(self._chosen)

    def spread(self, most: int) -> Samples:
        """At most so many of the samples, evenly spread, as many as the model takes at a time or a multiple of that."""
        found = Samples(self.source, self._data, [self._chosen[index] for index in evenly(len(self), most)])
        found.warnings = []
        return found

    @property
    def labels(self) -> bool:
        """Whether samples are labelled."""
        return self._data.labels

    @property
    def fixed_batch(self) -> int | None:
        """The only number of samples that fits the model at a time, or None where any does."""
        return self._data.fixed_batch

    @cached_property
    def sha256(self) -> str:
        """Hash of the samples chosen: of their arrays, or of the image files and their preprocessing."""
        return self._data.digest(self._chosen)


def load_samples(
    request: DataRequest,
    inputs: Sequence[Port],
    *,
    folder: Path | None,
) -> Samples:
    """Samples for a model.

    Args:
        request: where they come from, and how they are made.
        inputs: what the model asks for.
        folder: the model's folder, for its tokenizer and its preprocessor_config.json.

    Raises:
        UsageError: a wish that does not go with this data.
        InputError: the data is missing, empty, damaged, or does not fit the inputs.
    """
    if request.samples is not None and request.samples < 1:
        raise UsageError(f"--samples {request.samples}: at least one is needed.")
    source = _source(request, inputs, folder)
    return Samples(request.data, source, source.choose(request.samples, request.seed))


def _source(request: DataRequest, inputs: Sequence[Port], folder: Path | None) -> Source:
    data, path = request.data, Path(request.data)
    if path.suffix in TEXT_SUFFIXES and not path.is_dir():
        from quantcli.data.sources.texts import TextSource  # brings torch and transformers

        return TextSource(request, inputs, folder)
    if request.seq_len is not None:
        raise UsageError(f"--seq-len is for text, and {data} is none.")
    if is_function(data):
        return FunctionSource(data, inputs, request.samples)
    if not path.exists():
        raise InputError(f"{data} does not exist.", KINDS)
    if path.suffix in ARRAY_SUFFIXES and path.is_file():
        return ArraySource([path], inputs, path)
    if not path.is_dir():
        raise InputError(f"{data} is of no known kind.", KINDS)
    return _folder_source(path, inputs, request.preprocess, folder)


def _folder_source(path: Path, inputs: Sequence[Port], preprocess: Path | None, folder: Path | None) -> Source:
    here = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    arrays = [entry for entry in here if entry.suffix in ARRAY_SUFFIXES]
    classes = [entry for entry in here if entry.is_dir()]
    groups = [_images(each) for each in classes] if any(map(_images, classes)) else [_images(path)]
    images = any(groups)
    if arrays and images:
        raise InputError(f"{path} holds both arrays and images.", "Give them separately.")
    if arrays:
        return ArraySource(arrays, inputs, path)
    if not images:
        raise InputError(f"{path} holds no samples: neither arrays nor images.", KINDS)
    labelled = groups if len(groups) > 1 or any(map(_images, classes)) else None
    return ImageSource(groups, labelled is not None, inputs, load_preprocess(preprocess, folder), path)


def _images(folder: Path) -> list[Path]:
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )


def batches(samples: Samples, size: int) -> Iterator[tuple[dict[str, np.ndarray], list[int | None]]]:
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


def _stacked(group: list[Sample], fixed: int | None) -> tuple[dict[str, np.ndarray], list[int | None]]:
    import numpy as np

    if fixed and len(group) != fixed:
        raise InputError(f"The model takes {fixed} samples at a time, and their shapes differ.")
    if len(group) == 1:
        return group[0].inputs, [group[0].label]
    names = group[0].inputs
    return {name: np.concatenate([each.inputs[name] for each in group]) for name in names}, [g.label for g in group]
