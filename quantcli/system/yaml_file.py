"""YAML written by people, which may come from anywhere: keys once, no code, no more than it says. Its only reader."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from quantcli.errors import InputError, UsageError
from quantcli.system.text import first_line

_MOST_BYTES = 16 << 20
#: Values that a document may stand for: one that repeats its parts by aliases can stand for far more than it holds.
_MOST_VALUES = 1_000_000


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where the last one would silently win."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set[Any]()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; ``what`` is what messages call it.

    Raises:
        InputError: it cannot be read, or is too large.
        UsageError: it is no YAML, or stands for more values than anybody writes.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{what} {path} is over {_MOST_BYTES >> 20} MiB, too much for what it should be.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} cannot be read: it is not UTF-8 text.") from error
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MOST_VALUES:
            raise UsageError(
                f"{what} {path} stands for more than {_MOST_VALUES:,} values.", "Write it without aliases."
            )
        return loader.construct_document(node)
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError(f"{what} {path} is not valid YAML: it is nested too deeply, or holds itself.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except Exception as error:  # its constructors of dates and numbers raise whatever they stumble over
        raise UsageError(f"{what} {path} is not valid YAML: {first_line(error)}.") from error


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for, with those below it, aliases written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]
