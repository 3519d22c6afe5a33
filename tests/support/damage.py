"""Damage to honest files, drawn by a seed: of bytes, and of what they hold, so that it comes past the first check."""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from random import Random
from typing import Any

import yaml

_NUMBERS = (0, 1, -1, 7, 255, 2**31, 2**32 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
#: In place of anything in a document. The texts are those that readers might take for something.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, 1e-320, math.nan, math.inf, "", " ", "x", "0",
    "../../etc/passwd", "/etc/passwd", "C:\\x", "int4", "channel", "nan", "\0", "\ud800",
    "\N{SNOWMAN}" * 30, "a" * 5000,
    [], {}, [[]], [None], [0], [1, 2, 3], [""], ["x", 1, {}], {"": ""}, {"a": {"b": []}}, {"0": 0}, [{}], [{"a": 1}],
    {"path": 3}, {"dtype": "int4"}, {"role": "user"},
)  # fmt: skip

_NO_LONGER_OF_ITS_KIND = (
    ValueError, KeyError, EOFError, RecursionError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
    yaml.YAMLError,
)  # fmt: skip


def damaged(content: bytes, name: str, seed: int) -> bytes:
    """A damaged copy of a file of this name; the same for the same seed."""
    random = Random(seed)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = _once(content, name, random)
    return content


def _once(content: bytes, name: str, random: Random) -> bytes:
    if random.random() < 0.7:
        try:
            return _of_its_kind(content, name, random)
        except _NO_LONGER_OF_ITS_KIND:
            pass  # damaged before
    return _bytes(content, random)


def _of_its_kind(content: bytes, name: str, random: Random) -> bytes:
    suffix = name.rpartition(".")[2]
    if content[:2] == b"PK":
        return _archive(content, random)
    if suffix == "json":
        return _json(content, random)
    if suffix == "jsonl":
        lines = content.splitlines()
        line = random.randrange(len(lines))
        lines[line] = _json(lines[line], random)
        return b"\n".join(lines)
    if suffix == "yaml":
        document = _changed(yaml.safe_load(content), random)
        text = yaml.safe_dump(document, allow_unicode=True)
        return text.encode("utf-8", "surrogatepass")
    if suffix == "safetensors":
        length = int.from_bytes(content[:8], "little")
        header = _json(content[8 : 8 + length], random)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    if suffix == "onnx":
        return _protobuf(content, random)
    if suffix == "npy":
        return _npy(content, random)
    return _bytes(content, random)


def _json(content: bytes, random: Random) -> bytes:
    document = _changed(json.loads(content), random)
    text = json.dumps(document)
    if random.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    if random.random() < 0.03:
        text = "[" * 100_000
    return text.encode("utf-8", "surrogatepass")


def _changed(document: Any, random: Random) -> Any:
    """The document with a value at a random place replaced, removed, repeated, or put under another key."""
    holders: list[Any] = []
    waiting = [document]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list) and each:
            holders.append(each)
            waiting += each.values() if isinstance(each, dict) else each
    if not holders or random.random() < 0.02:
        return random.choice(_VALUES)
    holder = random.choice(holders)
    key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    way = random.randrange(8)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[random.choice(("x", "", "weight", "format", "quant_method", "extra"))] = holder.pop(key)
    elif way == 2 and isinstance(holder, list):
        holder += [holder[key]] * random.choice((1, 2, 300))
    elif way == 3:
        # What stands elsewhere, whose type fits.
        other = random.choice(holders)
        holder[key] = json.loads(json.dumps(random.choice(list(other.values()) if isinstance(other, dict) else other)))
    else:
        holder[key] = random.choice(_VALUES)
    return document


def _archive(content: bytes, random: Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(info.filename, info.compress_type, archive.read(info)) for info in archive.infolist()]
    number = random.randrange(len(parts))
    name, how, part = parts[number]
    parts[number] = name, how, _once(part, name, random)
    if random.random() < 0.1:
        parts.append(parts[random.randrange(len(parts))])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, how, part in parts:
            archive.writestr(name, part, how)
    return buffer.getvalue()


def _npy(content: bytes, random: Random) -> bytes:
    length = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + length].decode("latin1")
    old = random.choice(("'<f4'", "'>f4'", "False", "True", "(6, 4)", "(6,)", "'shape'", "'descr'"))
    new = random.choice(
        ("'O'", "'<f8'", "'V0'", "'S0'", "'<U9'", "'<c16'", "'|b1'", "('<f4', (2,))", "[('a', '<f4')]", "(-1, 4)", "()",
         "(0, 10**9)", "(1073741824, 1073741824)", "(True,)", "('a',)", "(6, 4, 1)", "None", "[" * 60, "{" * 60, "1")
    )  # fmt: skip
    header = header.replace(old, new)
    return content[:8] + len(header).to_bytes(2, "little") + header.encode("latin1") + content[10 + length :]


def _protobuf(content: bytes, random: Random) -> bytes:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ValueError("no longer a model") from error
    messages: list[Any] = [model]
    for message in messages:
        for field, value in message.ListFields():
            if field.message_type is not None:
                messages += value if field.is_repeated else [value]
    message = random.choice(messages)
    field = random.choice(list(message.DESCRIPTOR.fields))
    if random.random() < 0.5 and message.ListFields():
        field = random.choice(message.ListFields())[0]
    value: Any = None
    if field.message_type is None:
        texts = ("", "x", "a/b", "../x", "/etc/passwd", "w", "y", "MatMul", "Loop", "com.microsoft")
        value = {
            "str": lambda: random.choice(texts), "bytes": lambda: random.choice((b"", b"\0" * 3, b"\xff" * 64)),
            "float": lambda: random.choice((0.0, math.nan, math.inf, -1.0)),
        }.get(_python_type(field), lambda: random.choice(_NUMBERS))()  # fmt: skip
    try:
        if field.is_repeated:
            target = getattr(message, field.name)
            if random.random() < 0.3 or value is None:
                del target[random.randrange(len(target) + 1) :]
            else:
                target.append(value)
        elif value is not None:
            setattr(message, field.name, value)
        else:
            message.ClearField(field.name)
    except (TypeError, ValueError):
        message.ClearField(field.name)  # a number that this field cannot have
    return model.SerializeToString()


def _python_type(field: Any) -> str:
    return {
        field.CPPTYPE_STRING: "bytes" if field.type == field.TYPE_BYTES else "str", field.CPPTYPE_FLOAT: "float",
        field.CPPTYPE_DOUBLE: "float",
    }.get(field.cpp_type, "int")  # fmt: skip


def _bytes(content: bytes, random: Random) -> bytes:
    size = len(content)
    at = random.randrange(size + 1)
    way = random.randrange(8)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[at:]
    if way == 2:
        number = random.choice(_NUMBERS) % 2**64
        width = random.choice((1, 2, 4, 8))
        piece = (number % 2 ** (8 * width)).to_bytes(width, random.choice(("little", "big")))
        return content[:at] + piece + content[at + width :]
    if way == 3:
        return content[:at] + random.randbytes(random.choice((1, 4, 64))) + content[at:]
    if way == 4:
        end = min(size, at + random.choice((1, 16, 1000)))
        return content[:at] + content[at:end] * random.choice((2, 100)) + content[end:]
    if way == 5:
        return content[:at] + content[at + random.choice((1, 8, 100)) :]
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        if changed:
            changed[random.randrange(size)] ^= 1 << random.randrange(8)
    return bytes(changed)
