"""Records of a .jsonl file that name images or sounds: which do, and where these files are.

Names are relative to the file that holds the records, and lead to nothing outside its folder: data from elsewhere is
not to read what else there is on a machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from quantcli.data.image_preprocessing import IMAGE_SUFFIXES
from quantcli.data.records import text_of
from quantcli.data.sound_files import SOUND_SUFFIXES
from quantcli.errors import InputError

Medium = Literal["image", "sound"]

SUFFIX = ".jsonl"
IMAGE_KEYS, SOUND_KEYS = ("image", "images"), ("audio", "audio_filepath")
#: What folders of transformers' datasets call the file of a record, whatever it holds.
_FILE_KEY = "file_name"
#: What is said in a sound.
TRANSCRIPT_KEYS = ("text", "sentence", "transcription", "transcript")

#: Where an image stands in a text: the character that Unicode has for an object in a text, and how LLaVA's data has it.
MARK, _WRITTEN_MARK = "\ufffc", "<image>"
#: The same with the number of the place, until it is known which texts are read, and in which order.
_NUMBERED = re.compile(f"{MARK}(\\d+){MARK}")
_PART_KINDS = ("image", "image_url")


def medium_of(data: str) -> Medium | None:
    """What the first record with a file names; None for another kind of DATA, or for records of text alone."""
    path = Path(data)
    if path.suffix != SUFFIX or not path.is_file():
        return None
    status = path.stat()
    return _medium(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _medium(path: Path, changed: int, size: int) -> Medium | None:
    """As `medium_of`; asked often of one file, which may be large."""
    try:
        with path.open("rb") as stream:
            for line in stream:
                if any(f'"{word}'.encode() in line for word in ("image", "audio", _FILE_KEY)):
                    record = json.loads(line)
                    medium = _medium_of_record(record) if isinstance(record, dict) else None
                    if medium:
                        return medium
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads the text says where it is damaged
    return None


def _medium_of_record(record: Mapping[str, Any]) -> Medium | None:
    named = str(record.get(_FILE_KEY) or "").lower()
    if _names(record, SOUND_KEYS) or named.endswith(SOUND_SUFFIXES):
        return "sound"
    if _names(record, IMAGE_KEYS) or named.endswith(IMAGE_SUFFIXES):
        return "image"
    places: list[str | None] = []
    _marked(record, places)
    return "image" if any(places) else None


def records_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record, and where it is, as messages say it. Raises InputError for a damaged file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise InputError(f"{where} is no record.")
        yield where, record


def file_named(name: str, folder: Path, where: str) -> Path:
    """The file that a record names, which lies in the folder of the records or below.

    Raises:
        InputError: it lies elsewhere, or there is none.
    """
    inside = os.path.normpath(folder.absolute())
    # By the name alone: links within the folder are the user's own.
    path = Path(os.path.normpath(Path(inside) / name))
    if "://" in name or name.startswith("data:"):
        raise InputError(f"{where} names {name[:80]}, which is no file.", "Give files in the folder of the data.")
    if not path.is_relative_to(inside):
        raise InputError(
            f"{where} names {name}, which lies outside of {folder}.", "Files of records lie in the records' folder."
        )
    if not path.is_file():
        raise InputError(f"{where} names {name}, and there is no such file in {folder}.")
    return path


def sound_of(record: Mapping[str, Any], where: str) -> str:
    """The name of a record's file of sound. Raises InputError where there is none."""
    names = _names(record, (*SOUND_KEYS, _FILE_KEY))
    if len(names) != 1:
        raise InputError(
            f"{where} names {len(names) or 'no'} files of sound; it has {', '.join(record) or 'nothing'}.",
            f"A record names one file in the field {SOUND_KEYS[0]}.",
        )
    return names[0]


def transcript_of(record: Mapping[str, Any]) -> str | None:
    """What is said in a record's sound, where that is known."""
    texts = (record.get(key) for key in TRANSCRIPT_KEYS)
    return next((text for text in texts if isinstance(text, str)), None)


@dataclass(frozen=True)
class Illustrated:
    """A record's turns, of which each image is a `MARK` in the text, and the files of the images in order.

    ``is_chat``: whether these are turns of a chat, rather than one text.
    """

    where: str
    turns: list[dict[str, str]]
    files: tuple[str, ...]
    is_chat: bool


def illustrated(record: Mapping[str, Any], where: str) -> Illustrated:
    """A record of text with images.

    Images stand where the text marks their places (parts of type ``image``, or ``<image>``), or else before it.

    Raises:
        InputError: there is no text, or places and images are not as many.
    """
    listed = _names(record, (*IMAGE_KEYS, _FILE_KEY))
    places: list[str | None] = []
    marked = _marked({key: value for key, value in record.items() if key not in (*IMAGE_KEYS, _FILE_KEY)}, places)
    chats: list[list[dict[str, str]]] = []

    def keep(turns: list[dict[str, str]]) -> str:
        chats.append(turns)
        return ""

    text = text_of(marked, where, keep)
    turns = chats[0] if chats else [{"role": "user", "content": text}]
    # Only what is read counts: a record may hold its chat in two forms.
    read = [places[int(number)] for turn in turns for number in _NUMBERED.findall(turn["content"])]
    turns = [turn | {"content": _NUMBERED.sub(MARK, turn["content"])} for turn in turns]
    named = [name for name in read if name is not None]
    files = named or listed
    if not read and turns:
        turns = [turns[0] | {"content": MARK * len(listed) + turns[0]["content"]}, *turns[1:]]
    elif len(files) != len(read):
        raise InputError(
            f"{where} has places for {len(read)} images and names {len(files)}.",
            f"Every image is named once, in {', '.join(IMAGE_KEYS)} or in its part of a turn.",
        )
    return Illustrated(where, turns, tuple(files), bool(chats))


def _names(record: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Files that fields name: a path, a list of these, or records with a path."""
    found = []
    for key in keys:
        value = record.get(key)
        for each in value if isinstance(value, list) else [value]:
            name = each.get("path") if isinstance(each, dict) else each
            if isinstance(name, str) and name:
                found.append(name)
    return found


def _marked(value: Any, places: list[str | None]) -> Any:
    """The same with a numbered mark for each image; ``places`` gets its file, or None where the place names none."""
    if isinstance(value, str):
        first, *others = value.replace(MARK, "").split(_WRITTEN_MARK)
        return first + "".join(_place(None, places) + other for other in others)
    if isinstance(value, list):
        return [_marked(each, places) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") in _PART_KINDS:
        given = next((value[key] for key in ("image", "path", "url", "image_url") if value.get(key)), None)
        given = given.get("url") or given.get("path") if isinstance(given, dict) else given
        return {"type": "text", "text": _place(given if isinstance(given, str) else None, places)}
    return {key: _marked(each, places) for key, each in value.items()}


def _place(name: str | None, places: list[str | None]) -> str:
    places.append(name)
    return f"{MARK}{len(places) - 1}{MARK}"
