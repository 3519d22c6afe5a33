"""The safetensors container: headers read strictly and by ourselves, so that no weight, and no torch, is needed.

Layout: 8 bytes length of the header (little-endian), the header (JSON), the data. Checked here: known
dtypes, sizes that agree with shapes, offsets that cover the data without gap or overlap. Whatever else a
header says, nothing larger than the header itself is allocated for it.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.positional import PositionalFile
from quantcli.core.dtypes import DTYPE_BYTES, SMALL_DTYPES
from quantcli.core.tensors import TensorInfo, TensorSpec
from quantcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

#: The reference reader's own limit.
MAX_HEADER_BYTES = 100_000_000
#: No library has tensors of more dimensions, and a product of 64 sizes is quick.
_MAX_DIMENSIONS = 64
_MAX_SIZE = 1 << 62
#: The order of dtypes in which the reference writer lays tensors out, widest first so that all are aligned.
_DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself. ``offsets`` are absolute positions in the file."""

    infos: tuple[TensorInfo, ...]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        InputError: the file is truncated, is not safetensors, or its header contradicts itself.
    """

    def corrupt(why: str) -> InputError:
        return InputError(f"{path} is not a valid safetensors file: {why}.", "Download or copy it again.")

    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise corrupt(f"it has {size} bytes, less than the 8 of a header's length")
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise corrupt(f"its header claims {length} bytes, and {size - 8} follow")
        raw = stream.read(length)
    try:
        text = raw.decode()
        entries = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:  # an escape can spell half a character, which no file can hold
            json.dumps(entries, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise corrupt(f"its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise corrupt("its header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt("its __metadata__ does not map strings to strings")
    data_start = 8 + length
    placed = []
    for name, entry in entries.items():
        try:
            spec, begin, end = _parse_entry(entry)
        except ValueError as error:
            raise corrupt(f"tensor {name!r} {error}") from error
        placed.append((begin, end, TensorInfo(name, spec.shape, spec.dtype, end - begin, path)))
    placed.sort(key=lambda item: item[:2])
    expected = 0
    for begin, end, info in placed:
        if begin != expected:
            problem = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
            raise corrupt(f"tensor {info.name!r} at bytes {begin} to {end} {problem}")
        expected = end
    if data_start + expected != size:
        state = "truncated" if data_start + expected > size else "followed by unknown bytes"
        raise corrupt(f"it is {state}: the header describes {data_start + expected} bytes, the file has {size}")
    offsets = {info.name: data_start + begin for begin, _, info in placed}
    return Header(tuple(info for _, _, info in placed), offsets, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)


def _parse_entry(entry: Any) -> tuple[TensorSpec, int, int]:
    """Dtype, shape and relative byte range of one header entry. Raises ValueError."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in (*DTYPE_BYTES, *SMALL_DTYPES):
        raise ValueError(f"has the unknown dtype {reprlib.repr(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or prod(max(1, n) for n in shape) >= _MAX_SIZE:
        raise ValueError(f"has the impossible shape {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"has the impossible offsets {reprlib.repr(offsets)}")
    begin, end = offsets
    spec = TensorSpec(dtype, tuple(shape))
    nbytes = -(-prod(shape) * SMALL_DTYPES[dtype] // 8) if dtype in SMALL_DTYPES else spec.nbytes
    if end - begin != nbytes:
        raise ValueError(f"spans {end - begin} bytes, but {dtype} {shape} needs {nbytes}")
    return spec, begin, end


def build_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], reserve: int = 0
) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, absolute offset of each tensor, and the size of the whole file.

    The header is padded with spaces to hold ``reserve`` bytes more, for metadata known only later.
    Tensors are ordered by dtype, then name, as the reference writer does.
    """
    ordered = sorted(specs, key=lambda name: (_DTYPE_ORDER.index(specs[name].dtype), name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: dict[str, int] = {}
    position = 0
    for name in ordered:
        spec = specs[name]
        end = position + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        relative[name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-(len(text) + reserve) // 8) * 8)
    start = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: start + offset for name, offset in relative.items()}, start + position


class SafetensorsReader:
    """Reads tensors of one file, whole or by rows. Safe to use from several threads."""

    def __init__(self, path: Path, header: Header | None = None) -> None:
        self.header = header or read_header(path)
        self._file = PositionalFile(path)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype, shape ``[stop - start, ...]``.

        Raises:
            InputError: torch has no such dtype.
        """
        import torch

        from quantcli.core.dtypes import torch_dtype

        try:
            dtype = torch_dtype(info.dtype)
        except (KeyError, AttributeError) as error:
            raise InputError(
                f"{info.name} in {self._file.path} is {info.dtype}, which torch {torch.__version__} has no dtype for.",
                "Start from weights of another dtype, or update torch.",
            ) from error
        row_bytes = info.nbytes // info.rows if info.rows else 0
        offset = self.header.offsets[info.name] + start * row_bytes
        data = self._file.read_tensor(offset, (stop - start) * row_bytes)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        return data.view(dtype).reshape(shape)

    def close(self) -> None:
        """Release the file."""
        self._file.close()
