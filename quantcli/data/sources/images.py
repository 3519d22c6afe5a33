"""Samples of a folder of images."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.core.ports import Port
from quantcli.data.fitting import layouts
from quantcli.data.image_preprocessing import IMAGE_SUFFIXES, Preprocess, load_preprocess, open_image
from quantcli.data.request import DataRequest
from quantcli.data.sources.base import (
    Labels,
    Sample,
    class_folders,
    evenly,
    files_of_kind,
    fixed_batch_of,
    readable,
)
from quantcli.errors import InputError
from quantcli.system.parallel import usable_cores

if TYPE_CHECKING:
    import numpy as np

DESCRIPTION, IS_TEXT = "a folder of images", False
OPTIONS: tuple[str, ...] = ("--preprocess",)


def accepts(data: str) -> bool:
    """Whether DATA is a folder with an image in it, or in a folder of a class."""
    path = Path(data)
    return path.is_dir() and any(any(files_of_kind(folder, IMAGE_SUFFIXES)) for folder in (*class_folders(path), path))


def open_source(request: DataRequest, ports: Sequence[Port], folder: Path | None) -> ImageSource:
    """Find the files. Folders in the folder are classes where one of them holds an image."""
    path = Path(request.data)
    groups = [sorted(files_of_kind(each, IMAGE_SUFFIXES)) for each in class_folders(path)]
    labelled = any(groups)
    preprocess = load_preprocess(request.preprocess, folder)
    return ImageSource(
        groups if labelled else [sorted(files_of_kind(path, IMAGE_SUFFIXES))], labelled, ports, preprocess, path
    )


class ImageSource:
    """Images, perhaps in a folder for each class; the classes are numbered in the order of ``groups``."""

    def __init__(
        self, groups: Sequence[Sequence[Path]], labels: bool, ports: Sequence[Port], preprocess: Preprocess, given: Path
    ) -> None:
        ports = [port for port in ports if not port.optional]
        if len(ports) != 1:
            raise InputError(
                f"{given} holds images, and the model has {len(ports)} inputs: {', '.join(map(str, ports))}.",
                "Give arrays, or a function that yields them.",
            )
        self._files = [(file, number) for number, group in enumerate(groups) for file in group]
        self._port, self._preprocess = ports[0], preprocess
        self.labels: Labels = "classes" if labels else ""
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
        problems = {str(self._files[index][0]): error for index, error in bad.items()}
        self.warnings += readable(problems, len(chosen), "images")
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

    def files(self, chosen: Sequence[int]) -> Iterable[Path]:
        """The images' files."""
        return [self._files[index][0] for index in chosen]

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """Decode and preprocess, one image at a time."""
        for index in chosen:
            array = self._array(index)
            file, label = self._files[index]
            layouts([self._port], {self._port.name: array}, f"{file}, preprocessed,")
            yield Sample({self._port.name: array}, label if self.labels else None, str(file))

    def digest(self, chosen: Sequence[int]) -> str:
        """Hash of the files' hashes, their labels, and the preprocessing."""
        lines = [f"{self._hashes[index]} {self._files[index][1] if self.labels else None}" for index in chosen]
        return hashlib.sha256("\n".join([self._settings, *lines]).encode()).hexdigest()
