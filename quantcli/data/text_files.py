"""Files of text, and windows over it: what models are calibrated, trained and evaluated on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.data.records import KNOWN_KEYS, LABEL_KEYS, ChatText, label_of, plain_chat, text_of, unknown_fields
from quantcli.errors import InputError, MissingExtraError
from quantcli.system.text import first_line

if TYPE_CHECKING:
    from torch import Tensor

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def load_labelled_texts(path: Path, *, lines: bool, chat: ChatText = plain_chat) -> tuple[list[str], list[int] | None]:
    """Texts of a ``.txt``, ``.jsonl`` or ``.parquet`` file, and their labels where they have some.

    A ``.txt`` file is one text, or one per line with ``lines``; records of the other kinds are one text
    each, of the fields that `quantcli.data.records` knows, a chat as ``chat`` writes it. Their label is the whole
    number in the field ``label`` (or ``labels``).

    Raises:
        InputError: the file is missing, of another kind, empty, or not what its suffix says, records have no field
            that is known to hold text, or some records have a label and others have none.
    """
    if path.suffix not in TEXT_SUFFIXES:
        raise InputError(f"{path} is not text data.", f"DATA here is a file ending in {', '.join(TEXT_SUFFIXES)}.")
    try:
        found = list(_read(path, lines, chat))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or first_line(error)}.") from error
    found = [(text, label) for text, label in found if text.strip()]
    if not found:
        raise InputError(f"{path} holds no text.")
    labels = [label for _, label in found if label is not None]
    if labels and len(labels) < len(found):
        raise InputError(
            f"{path}: {len(labels)} of {len(found)} records have a label.", "Give all of them one, or none."
        )
    return [text for text, _ in found], labels or None


def _read(path: Path, lines: bool, chat: ChatText) -> Iterator[tuple[str, int | None]]:
    """Texts and labels, one after the other."""
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8")
        yield from ((part, None) for part in (text.splitlines() if lines else [text]))
        return
    if path.suffix == ".parquet":
        yield from _parquet_texts(path, chat)
        return
    # Only a line feed ends a record: JSON may hold other separators of lines as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}.") from error
        yield text_of(record, f"{path}, line {number}", chat), label_of(record)


def _parquet_texts(path: Path, chat: ChatText) -> Iterator[tuple[str, int | None]]:
    """Texts and labels of rows; those without any text are left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", "Reading parquet") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [field.name for field in file.schema_arrow]
        # Whatever type strings have (dictionaries, views, those of polars), Python sees the same.
        wanted = [name for name in names if name in KNOWN_KEYS]
        if not set(wanted) - set(LABEL_KEYS):
            raise unknown_fields(str(path), names)
        number = 0
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                if any(value is not None for key, value in row.items() if key not in LABEL_KEYS):
                    yield text_of(row, f"{path}, row {number}", chat), label_of(row)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}.") from error


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
            hint="Give more text, or a smaller --seq-len."
            if ids or not any(text.strip() for text in texts)
            else "Its tokenizer makes none of this text: name the model's own with --tokenizer FOLDER.",
        )
    windows = torch.tensor(ids[: available * length]).reshape(available, length)
    return windows[spread(available, samples)]


def spread(available: int, wanted: int) -> list[int]:
    """At most ``wanted`` indices below ``available``, evenly spaced and in order."""
    count = min(available, wanted)
    return [index * available // count for index in range(count)]
