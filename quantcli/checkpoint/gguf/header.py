"""The header of a GGUF file, versions 2 and 3, which may come from anywhere: nothing is believed before it is checked.

Layout (ggml's docs/gguf.md): magic, version, counts of tensors and of metadata entries, the metadata, a description of
every tensor, padding, data. Lengths and counts are held against the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any

from quantcli.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: Metadata beyond this is none that a model needs: the largest vocabularies take some 20 MiB.
MAX_HEADER_BYTES = 256 << 20
_MAX_DIMENSIONS = 4
_MAX_NAME = 1 << 10
_MAX_ALIGNMENT = 1 << 20
_ALIGNMENT_KEY = "general.alignment"

#: ggml's types of tensors by number: name, values of a block, and bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
#: The numbers of these types, by name.
TYPE_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}

#: Types of metadata by number, as struct writes them.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
#: The fewest bytes that a value of a type takes.
_LEAST = {number: struct.calcsize(code) for number, code in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it: ``shape`` with the rows first, ``offset`` from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself: ``metadata`` by key, and its tensors in file order."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_offset: int


def nbytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a type."""
    _, block, size = TYPES[TYPE_NUMBERS[kind]]
    return prod(shape) // block * size


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file. Raises InputError where it is no GGUF file, damaged, or of another version."""
    with path.open("rb") as stream:
        size = path.stat().st_size
        try:
            return _Header(stream, size, path).read()
        except (struct.error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged: its header is not what GGUF's is ({error}).") from error


class _Header:
    """A header under way: ``left`` counts the bytes that the file still has."""

    def __init__(self, stream: IO[bytes], size: int, path: Path) -> None:
        self._stream, self._size, self._path, self._at = stream, size, path, 0

    def read(self) -> GgufHeader:
        magic = self._take(4, "its magic number")
        if magic != MAGIC:
            raise InputError(f"{self._path} is no GGUF file: it does not begin with GGUF.")
        (version,) = struct.unpack("<I", self._take(4, "its version"))
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "of big-endian numbers" if swapped else f"of version {version}"
            raise InputError(f"{self._path} is a GGUF file {what}.", "Little-endian files of version 2 and 3 are read.")
        tensors, entries = (self._count(least, what) for least, what in ((24, "tensors"), (13, "metadata entries")))
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string("a key")
            if key in metadata:
                raise self._damaged(f"{key} stands there twice")
            metadata[key] = self._value(key)
        described = [self._describe() for _ in range(tensors)]
        return self._placed(metadata, described)

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self._path} is damaged: {what}.", "Download or copy it again.")

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._damaged(f"{what} takes {count:,} bytes, and {self._size - self._at:,} are left")
        if self._at + count > MAX_HEADER_BYTES:
            raise InputError(f"{self._path} has a header of over {MAX_HEADER_BYTES >> 20} MiB, too much for a model.")
        self._at += count
        return self._stream.read(count)

    def _count(self, least: int, what: str) -> int:
        """A number of things that take at least so many bytes each."""
        (count,) = struct.unpack("<Q", self._take(8, f"the number of {what}"))
        if count * least > self._size - self._at:
            raise self._damaged(f"it claims {count:,} {what}, more than its {self._size:,} bytes can hold")
        return int(count)

    def _string(self, what: str) -> str:
        (length,) = struct.unpack("<Q", self._take(8, f"the length of {what}"))
        return self._take(length, what).decode("utf-8", errors="surrogateescape" if what == "a token" else "strict")

    def _value(self, key: str) -> Any:
        (kind,) = struct.unpack("<I", self._take(4, f"the type of {key}"))
        if kind != _ARRAY:
            return self._scalar(kind, key)
        (kind,) = struct.unpack("<I", self._take(4, f"the type of {key}"))
        if kind == _ARRAY or kind not in _LEAST:
            raise self._damaged(f"{key} is a list of things of type {kind}, which is not known")
        count = self._count(_LEAST[kind], f"values of {key}")
        if kind == _STRING:
            return [self._string("a token") for _ in range(count)]
        code = _SCALARS[kind][1]
        return list(struct.unpack(f"<{count}{code}", self._take(count * _LEAST[kind], key)))

    def _scalar(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind not in _SCALARS:
            raise self._damaged(f"{key} is of type {kind}, which is not known")
        code = _SCALARS[kind]
        return struct.unpack(code, self._take(struct.calcsize(code), key))[0]

    def _describe(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with the rows first, type, and offset within the data."""
        name = self._string("the name of a tensor")
        if not name or len(name) > _MAX_NAME:
            raise self._damaged(f"a tensor's name has {len(name)} characters")
        (count,) = struct.unpack("<I", self._take(4, f"the dimensions of {name}"))
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise self._damaged(f"{name} has {count} dimensions")
        shape = struct.unpack(f"<{count}Q", self._take(8 * count, f"the shape of {name}"))[::-1]
        kind, offset = struct.unpack("<IQ", self._take(12, f"the place of {name}"))
        return name, shape, kind, offset

    def _placed(self, metadata: dict[str, Any], described: list[tuple[str, tuple[int, ...], int, int]]) -> GgufHeader:
        alignment = metadata.get(_ALIGNMENT_KEY, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        tensors = tuple(self._checked(name, shape, kind, start, offset) for name, shape, kind, offset in described)
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self._damaged("two tensors have one name")
        for before, after in _neighbours(tensors):
            if before.offset + before.nbytes > after.offset:
                raise self._damaged(f"{before.name} and {after.name} overlap")
        return GgufHeader(metadata, tensors, start)

    def _checked(self, name: str, shape: tuple[int, ...], number: int, start: int, offset: int) -> GgufTensor:
        if number not in TYPES:
            raise InputError(f"{self._path}: {name} is of ggml's type {number}, which is not known.")
        kind, block, _ = TYPES[number]
        if any(side < 1 for side in shape) or shape[-1] % block:
            raise self._damaged(f"{name} {list(shape)} does not divide into {kind}'s blocks of {block}")
        nbytes = nbytes_of(kind, shape)
        if start + offset + nbytes > self._size:
            raise self._damaged(
                f"{name} {list(shape)} ({kind}) ends at byte {start + offset + nbytes:,} of {self._size:,}"
            )
        return GgufTensor(name, shape, kind, start + offset, nbytes)


def _neighbours(tensors: tuple[GgufTensor, ...]) -> Iterator[tuple[GgufTensor, GgufTensor]]:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    return pairwise(ordered)
