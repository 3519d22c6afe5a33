"""Sounds as a model's inputs: files of a folder, or those that records name, with what is said in them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.core.ports import Port
from quantcli.data.fitting import converted, layouts
from quantcli.data.media_records import file_named, medium_of, records_of, sound_of, transcript_of
from quantcli.data.request import DataRequest
from quantcli.data.sound_files import LONGEST_SECONDS, SOUND_SUFFIXES, read_sound
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

    from quantcli.core.ports import Arrays

DESCRIPTION, IS_TEXT = f"a folder of sounds ({', '.join(SOUND_SUFFIXES)}) or a .jsonl that names them", False
OPTIONS: tuple[str, ...] = ("--tokenizer",)

#: Beside a sound, a file of the same name with this ending holds what is said.
_TRANSCRIPT_SUFFIX = ".txt"
_DECODER_IDS = "decoder_input_ids"


@dataclass(frozen=True)
class _Sound:
    """A file, where it is named, and its label: what is said in it, or the number of its class."""

    file: Path
    where: str
    label: str | int | None = None


def accepts(data: str) -> bool:
    """Whether DATA is a folder with a sound in it, or in a folder of a class, or records that name sounds."""
    path = Path(data)
    if path.is_dir():
        return any(any(files_of_kind(folder, SOUND_SUFFIXES)) for folder in (path, *class_folders(path)))
    return medium_of(data) == "sound"


def open_source(request: DataRequest, ports: Sequence[Port], folder: Path | None) -> SoundSource:
    """Find the files, and what turns them into inputs."""
    path = Path(request.data)
    if folder is None or not (folder / "config.json").is_file():
        raise InputError(
            f"{path} holds sounds, and the model has no folder with a feature extractor for them.", "Give arrays."
        )
    needed = [port for port in ports if not port.optional]
    if len(needed) != 1 or needed[0].dtype.kind != "f":
        raise InputError(
            f"{path} holds sounds, and the model takes {'; '.join(map(str, needed))}.",
            "Sounds are for models that hear alone, such as Whisper or Wav2Vec2; give others arrays (.npz).",
        )
    sounds = _in_folder(path) if path.is_dir() else _in_records(path)
    return SoundSource(sounds, ports, folder, request.tokenizer or folder, path)


def _in_folder(path: Path) -> list[_Sound]:
    """Sounds of a folder, each with the text beside it; without sounds of its own, those of a folder for each class."""
    files = sorted(files_of_kind(path, SOUND_SUFFIXES))
    if not files:
        numbered = enumerate(sorted(files_of_kind(folder, SOUND_SUFFIXES)) for folder in class_folders(path))
        return [_Sound(file, str(file), number) for number, group in numbered for file in group]
    texts = {file: file.with_suffix(_TRANSCRIPT_SUFFIX) for file in files}
    lacking = [file for file, text in texts.items() if not text.is_file()]
    if len(lacking) == len(files):
        return [_Sound(file, str(file)) for file in files]
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(files)} sounds in {path} have no text beside them, such as {lacking[0].name}.",
            f"What is said in x.wav is the file x{_TRANSCRIPT_SUFFIX}; give one to all, or to none.",
        )
    return [_Sound(file, str(file), _text(text)) for file, text in texts.items()]


def _text(file: Path) -> str:
    try:
        return " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}.") from error


def _in_records(path: Path) -> list[_Sound]:
    found = [
        _Sound(file_named(sound_of(record, where), path.parent, where), where, transcript_of(record))
        for where, record in records_of(path)
    ]
    lacking = [each for each in found if each.label is None]
    if lacking and len(lacking) < len(found):
        raise InputError(
            f"{lacking[0].where} has no text, and {len(found) - len(lacking)} of {len(found)} records have one.",
            "Give one to all of them, or to none.",
        )
    return found


class SoundSource:
    """Sounds by the model's own feature extractor; with texts, what a decoder reads of these."""

    def __init__(
        self, sounds: Sequence[_Sound], ports: Sequence[Port], folder: Path, tokenizer: Path, given: Path
    ) -> None:
        from quantcli.models import processors

        self._sounds, self._ports, self._folder, self._given = sounds, ports, folder, given
        self._extractor = processors.load_feature_extractor(folder)
        first = sounds[0].label
        self.labels: Labels = "" if first is None else "texts" if isinstance(first, str) else "classes"
        self.warnings: list[str] = []
        self.fixed_batch: int | None = None
        self._hashes: dict[int, str] = {}
        self._words: _DecoderWords | None = None
        if any(port.name == _DECODER_IDS for port in ports):
            if self.labels == "texts":
                self._words = _DecoderWords(folder, tokenizer)
            else:
                self.warnings.append(
                    "No text is given of what is said, so that the model's decoder reads its first token alone."
                )

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """Spread evenly. Those that cannot be read are left out. Raises InputError where they are too many."""
        chosen = evenly(len(self._sounds), wanted)
        with ThreadPoolExecutor(usable_cores()) as pool:
            found = dict(zip(chosen, pool.map(self._check, chosen), strict=True))
        problems = {self._sounds[index].where: problem for index, (_, _, problem) in found.items() if problem}
        self.warnings += readable(problems, len(chosen), "sounds")
        good = [index for index in chosen if not found[index][2]]
        long = [index for index in good if found[index][1] > LONGEST_SECONDS]
        if long and self.labels == "texts":
            # Their texts say more than a model that hears the beginning can tell.
            good = [index for index in good if index not in set(long)]
            if not good:
                raise InputError(f"All sounds of {self._given} last over {LONGEST_SECONDS} s.", "Cut them.")
        if long:
            done = "they are left out" if self.labels == "texts" else "the rest of them is not read"
            self.warnings.append(f"{len(long)} of {len(chosen)} sounds last over {LONGEST_SECONDS} s; {done}.")
        self._hashes = {index: digest for index, (digest, _, _) in found.items()}
        arrays = self._arrays(good[0])
        forms = layouts(self._ports, arrays, f"{self._sounds[good[0]].where}, as features,")
        self.fixed_batch = fixed_batch_of([port for port in self._ports if port.name in forms], forms, str(self._given))
        return good

    def _check(self, index: int) -> tuple[str, float, str | None]:
        """Hash of a file, how many seconds it lasts, and why it cannot be read."""
        content = b""
        try:
            content = self._sounds[index].file.read_bytes()
            seconds, problem = read_sound(io.BytesIO(content), self._extractor.sampling_rate)[1], None
        except (OSError, ValueError) as error:
            seconds, problem = 0.0, " ".join(str(error).split()).rstrip(".") or type(error).__name__
        return hashlib.sha256(content).hexdigest(), seconds, problem

    def _arrays(self, index: int) -> Arrays:
        from quantcli.models import processors

        sound = self._sounds[index]
        try:
            values, _ = read_sound(sound.file, self._extractor.sampling_rate)
        except (OSError, ValueError) as error:
            raise InputError(f"{sound.where} can no longer be read: {error}.") from error
        made = processors.features_of(self._extractor, values, sound.where)
        if self._words is not None:
            made[_DECODER_IDS] = self._words.of(str(sound.label))
        known = {port.name: port for port in self._ports}
        processors.require_taken(self._folder, list(made), list(known))
        return {name: converted(made[name], port, sound.where) for name, port in known.items() if name in made}

    def files(self, chosen: Sequence[int]) -> Iterable[Path]:
        """The sounds' files."""
        return [self._sounds[index].file for index in chosen]

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """Decode one sound after the other."""
        for index in chosen:
            yield Sample(self._arrays(index), self._sounds[index].label, self._sounds[index].where)

    def digest(self, chosen: Sequence[int]) -> str:
        """Hash of the files' hashes, their labels, and how they become features."""
        lines = [f"{self._hashes[index]} {self._sounds[index].label!r}" for index in chosen]
        return hashlib.sha256("\n".join([self._extractor.to_json_string(), *lines]).encode()).hexdigest()


class _DecoderWords:
    """What an encoder-decoder's decoder reads as it says a text: its tokens, one behind, as in training."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        from quantcli.models import hugging_face

        self._tokenizer: Any = hugging_face.load_tokenizer(tokenizer)
        self._start, self._longest = hugging_face.decoder_of(folder)

    def of(self, text: str) -> np.ndarray:
        """Token ids, int64 ``[1, tokens]``."""
        import numpy as np

        ids = list(self._tokenizer(text)["input_ids"])
        ids = ids[1:] if ids[:1] == [self._start] else ids
        return np.array([[self._start, *ids[:-1]][: self._longest]], np.int64)
