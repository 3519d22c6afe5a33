"""ONNX files written and read without their weights in memory: protobuf's own bytes, put together piece by piece.

A field of a message is its number and kind, then its length, then its bytes; fields stand in the order of their numbers
(https://protobuf.dev/programming-guides/encoding). What is written is what protobuf itself would write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from quantcli.errors import VerificationError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

#: Numbers of the fields on the way to a tensor's bytes: `ModelProto.graph`, `GraphProto.initializer` and
#: `TensorProto.raw_data`.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9

#: Kinds of fields: a number, eight bytes, a length and as many bytes, four bytes.
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


def write_model(proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], path: Path) -> None:
    """Write a model whose initializers of the names in ``weights`` have no bytes yet: those of these tensors.

    Raises:
        VerificationError: a tensor gives more or fewer bytes than it says that it has.
    """
    tensors: list[tuple[bytes, ir.TensorProtocol | None, bytes]] = []
    for tensor in proto.graph.initializer:
        before, after = _around(tensor, _RAW_DATA)
        weight = weights.get(tensor.name)
        if weight is None:
            tensors.append((tensor.SerializeToString(), None, b""))
        else:
            head = before.SerializeToString() + _head(_RAW_DATA, weight.nbytes)
            tensors.append((head, weight, after.SerializeToString()))
    sizes = [len(head) + (weight.nbytes if weight else 0) + len(tail) for head, weight, tail in tensors]
    graph_before, graph_after = (part.SerializeToString() for part in _around(proto.graph, _INITIALIZER))
    heads = [_head(_INITIALIZER, size) for size in sizes]
    graph_size = len(graph_before) + sum(map(len, heads)) + sum(sizes) + len(graph_after)
    model_before, model_after = _around(proto, _GRAPH)
    with path.open("wb") as stream:
        stream.write(model_before.SerializeToString() + _head(_GRAPH, graph_size) + graph_before)
        for field, (head, weight, tail) in zip(heads, tensors, strict=True):
            stream.write(field + head)
            if weight is not None:
                _write(weight, stream)
            stream.write(tail)
        stream.write(graph_after + model_after.SerializeToString())


def _write(weight: ir.TensorProtocol, stream: IO[bytes]) -> None:
    stream.flush()
    start = stream.tell()
    weight.tofile(stream)  # type: ignore[attr-defined]
    if stream.tell() - start != weight.nbytes:
        raise VerificationError(
            f"{weight.name} has {stream.tell() - start} bytes in place of {weight.nbytes}.", "Please report it."
        )


def _around(message: Any, number: int) -> tuple[Any, Any]:
    """A message's fields below a number, and those above it."""
    before, after = type(message)(), type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.number == number:
            continue
        part = before if descriptor.number < number else after
        if descriptor.is_repeated:
            getattr(part, descriptor.name).extend(value)
        elif descriptor.message_type is not None:
            getattr(part, descriptor.name).CopyFrom(value)
        else:
            setattr(part, descriptor.name, value)
    return before, after


def _head(number: int, size: int) -> bytes:
    """What stands before the bytes of a field."""
    return _varint(number << 3 | _BYTES) + _varint(size)


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def read_lean(path: Path, smallest: int) -> onnx.ModelProto:
    """Read a model; initializers with at least so many bytes refer to the file itself, as if it were external data.

    Raises:
        ValueError: the file is no message of protobuf.
    """
    import onnx

    proto = onnx.ModelProto()
    with path.open("rb") as stream:
        _read(stream, path.stat().st_size, proto, partial(_read_graph, path, smallest, proto.graph), _GRAPH)
    return proto


def _read_graph(path: Path, smallest: int, graph: onnx.GraphProto, stream: IO[bytes], size: int) -> None:
    _read(stream, size, graph, partial(_read_tensor, path, smallest, graph), _INITIALIZER)


def _read_tensor(path: Path, smallest: int, graph: onnx.GraphProto, stream: IO[bytes], size: int) -> None:
    tensor = graph.initializer.add()

    def refer(stream: IO[bytes], length: int) -> None:
        if length < smallest:
            tensor.raw_data = stream.read(length)
            return
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", path.name), ("offset", str(stream.tell())), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        stream.seek(length, os.SEEK_CUR)

    _read(stream, size, tensor, refer, _RAW_DATA)


def _read(stream: IO[bytes], size: int, message: Any, take: Callable[[IO[bytes], int], None], number: int) -> None:
    """Read a message of so many bytes; ``take`` is given the field of that number, protobuf all others."""
    end, others = stream.tell() + size, bytearray()
    while stream.tell() < end:
        tag = _read_varint(stream)
        kind = tag & 7
        if kind == _VARINT:
            others += _varint(tag) + _varint(_read_varint(stream))
            continue
        length = _read_varint(stream) if kind == _BYTES else {_EIGHT: 8, _FOUR: 4}.get(kind)
        if length is None or stream.tell() + length > end:
            raise ValueError(f"a field of {message.DESCRIPTOR.name} is damaged")
        if tag >> 3 == number and kind == _BYTES:
            take(stream, length)
        else:
            others += _varint(tag) + (_varint(length) if kind == _BYTES else b"") + stream.read(length)
    message.MergeFromString(bytes(others))


def _read_varint(stream: IO[bytes]) -> int:
    value = shift = 0
    while digit := stream.read(1):
        value |= (digit[0] & 0x7F) << shift
        shift += 7
        if digit[0] < 0x80:
            return value
    raise ValueError("the file ends within a number")
