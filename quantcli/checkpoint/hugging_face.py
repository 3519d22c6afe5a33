"""What belongs to a Hugging Face folder beside its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import InputError

if TYPE_CHECKING:
    pass
MAX_JSON_BYTES = 256 << 20


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError where it is unreadable, too large or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} is over {MAX_JSON_BYTES >> 20} MiB, too much for what it should be.")
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} is not a JSON object.")
    return loaded


_COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".bpe", ".vocab", ".py", ".yaml")
_COMPANION_NAMES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|README)", re.IGNORECASE)
_WEIGHT_INDEX = re.compile(r"\.index\.json$")


def companions(folder: Path) -> Iterator[Path]:
    """Files of a model folder that travel with its weights: configuration, tokenizer, licence, text.

    Relative paths, sorted. Subfolders are searched (sentence-transformers keeps its pooling in one),
    hidden ones and linked ones are not.
    """
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        linked = any((folder / parent).is_symlink() for parent in relative.parents if parent.parts)
        if hidden or linked or not path.is_file() or _WEIGHT_INDEX.search(path.name):
            continue
        if path.suffix.lower() in _COMPANION_SUFFIXES or _COMPANION_NAMES.match(path.name):
            yield relative
