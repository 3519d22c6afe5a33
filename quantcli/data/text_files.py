"""Files of text, and windows over it: what models are calibrated, trained and evaluated on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_TEXT_KEYS = ("text", "sentence", "content")
_LABEL_KEYS = ("label", "labels")


def load_labelled_texts(path: Path, *, lines: bool) -> tuple[list[str], list[int] | None]:
    """Texts of a ``.txt``, ``.jsonl`` or ``.parquet`` file, and their labels where they have some.

    A ``.txt`` file is one text, or one per line with ``lines``; records of the other kinds are one text
    each, their field ``text`` (or ``sentence``, ``content``, or the only string there is). Their label is the whole
    number in the field ``label`` (or ``labels``).

    Raises:
        InputError: the file is missing, of another kind, empty, or not what its suffix says, or some records have a
            label and others have none.
    """
    if path.suffix not in TEXT_SUFFIXES:
        raise InputError(f"{path} is not text data.", f"DATA here is a file ending in {', '.join(TEXT_SUFFIXES)}.")
    try:
        found = list(_read(path, lines))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    found = [(text, label) for text, label in found if text.strip()]
    if not found:
        raise InputError(f"{path} holds no text.")
    labels = [label for _, label in found if label is not None]
    if labels and len(labels) < len(found):
        raise InputError(
            f"{path}: {len(labels)} of {len(found)} records have a label.", "Give all of them one, or none."
        )
    return [text for text, _ in found], labels or None


def _read(path: Path, lines: bool) -> Iterator[tuple[str, int | None]]:
    """Texts and labels, one after the other."""
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8")
        yield from ((part, None) for part in (text.splitlines() if lines else [text]))
        return
    if path.suffix == ".parquet":
        yield from _parquet_texts(path)
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}.") from error
        yield _text_of(record, f"{path}, line {number}"), _label_of(record)


def _label_of(record: Any) -> int | None:
    """The class of a record; None where it has none, such as where it is a name."""
    label = next((record[key] for key in _LABEL_KEYS if key in record), None) if isinstance(record, dict) else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _text_of(record: Any, where: str) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for key in _TEXT_KEYS:
            if isinstance(record.get(key), str):
                return str(record[key])
        strings = [value for value in record.values() if isinstance(value, str)]
        if len(strings) == 1:
            return strings[0]
        raise InputError(f"{where} has no field {' or '.join(_TEXT_KEYS)}; it has {', '.join(record) or 'none'}.")
    raise InputError(f"{where} is neither a text nor a record.")


def _parquet_texts(path: Path) -> Iterator[tuple[str, int | None]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", "Reading parquet") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [field.name for field in file.schema_arrow if pyarrow.types.is_string(field.type)]
        chosen = next((key for key in _TEXT_KEYS if key in names), names[0] if len(names) == 1 else None)
        if chosen is None:
            raise InputError(f"{path} has no column {' or '.join(_TEXT_KEYS)}; it has {', '.join(names) or 'no text'}.")
        whole = {field.name for field in file.schema_arrow if pyarrow.types.is_integer(field.type)}
        label = next((key for key in _LABEL_KEYS if key in whole), None)
        for batch in file.iter_batches(columns=[chosen, *([label] if label else [])]):
            for row in batch.to_pylist():
                if row[chosen]:
                    yield row[chosen], row[label] if label else None
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a readable parquet file: {error}.") from error


def token_windows(tokenizer: Any, texts: list[str], length: int, samples: int, source: Path) -> Tensor:
    """Token ids ``[windows, length]``: at most ``samples``, spread evenly over the whole text.

    Raises:
        InputError: the text is shorter than one window.
    """
    import torch

    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    available = len(ids) // length
    if available == 0:
        raise InputError(
            f"{source} has {len(ids)} tokens, less than one sequence of {length}.",
            hint="Give more text, or a smaller --seq-len.",
        )
    windows = torch.tensor(ids[: available * length]).reshape(available, length)
    return windows[spread(available, samples)]


def spread(available: int, wanted: int) -> list[int]:
    """At most ``wanted`` indices below ``available``, evenly spaced and in order."""
    count = min(available, wanted)
    return [index * available // count for index in range(count)]
