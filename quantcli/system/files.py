"""Where outputs may go, and what errors of a file system mean."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from quantcli.errors import DiskFullError, InputError, UsageError

#: numpy's words for a write that ended early, which have no number of an error.
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
#: What files are known by that commands read or write, and others that a slip of the hand names. Not every suffix is a
#: kind: model-0.5 is a folder.
_FILE_SUFFIXES = (
    *(".safetensors", ".onnx", ".gguf", ".pt", ".pth", ".pt2", ".bin", ".ckpt", ".h5", ".tflite"),
    *(".npz", ".npy", ".parquet", ".csv", ".txt", ".json", ".jsonl", ".yaml", ".yml", ".md", ".html", ".xml"),
    *(".svg", ".png", ".jpg", ".log", ".zip", ".tar", ".gz", ".py", ".so"),
)
#: The system's error in those of libraries written in Rust, such as safetensors.
_OF_RUST = re.compile(r"\(os error (\d+)\)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)
#: What file systems say that have no way to force something to the disk, as some network file systems.
_CANNOT_FORCE = (errno.EINVAL, errno.ENOTSUP)


def stored_member_offset(stream: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed member of a zip archive start: behind its local header (APPNOTE.TXT 4.3.7)."""
    stream.seek(entry.header_offset + 26)
    lengths = stream.read(4)
    return stream.tell() + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def check_target(target: Path, source: Path | None, *, force: bool) -> None:
    """Refuse a target that exists, or that would swallow the input; ``source`` None: that is code, not a file.

    Raises:
        UsageError: the target exists and ``force`` is False, or it is, holds, or lies in the input.
    """
    if source is not None:
        here, there = target.resolve(), source.resolve()
        if here == there or here in there.parents or (there.is_dir() and there in here.parents):
            raise UsageError(f"The output {target} and the input {source} overlap.", "Choose another place for -o.")
    if target.exists() and not force:
        raise UsageError(f"The output {target} exists.", "Use --force to replace it.")


def check_name(target: Path, ending: str, *, folder: bool) -> None:
    """Refuse a target that is named as another kind of file than the one that is written to it.

    Args:
        target: the output.
        ending: the suffix of a file that is written.
        folder: whether a folder is written where the target has none.

    Raises:
        UsageError: its name ends as a file of another kind does.
    """
    if target.suffix.lower() in _FILE_SUFFIXES and target.suffix != ending:
        kinds = f"a folder, or a file that ends in {ending}" if folder else f"a file that ends in {ending}"
        raise UsageError(
            f"The output {target} is named as a {target.suffix} file, and what is written is {kinds}.",
            f"Name for example: -o {target.with_suffix('' if folder else ending)}",
        )


def require_utf8(path: Path) -> None:
    """Raise InputError for a name that libraries cannot take which know names as UTF-8 alone, such as onnxruntime."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="replace")
        raise InputError(
            f"The name {shown} is not UTF-8, and onnxruntime opens no other.", "Rename the file, or its folder."
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Meanwhile an error of the system is one of reading this file. Raises InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Meanwhile an InputError that does not say which file it is about says that it is this one."""
    try:
        yield
    except InputError as error:
        if str(path) not in error.message:
            error.message = f"{path}: {error.message}"
            error.args = (error.message,)
        raise


class Unchanged:
    """Files as they were when they were opened: what is read of them for hours must be of one state."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._states = {file: _state(file) for file in files}

    def require(self) -> None:
        """Raise InputError where a file is no longer what it was."""
        for file, state in self._states.items():
            if _state(file) != state:
                raise InputError(f"{file} was changed while it was read.", "Run the command again once it is whole.")


def _state(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def explain(error: OSError, target: Path) -> InputError:
    """An operating system's error about writing, in words."""
    if error.errno in _FULL or _CUT_SHORT.search(str(error)):
        message = f"The disk is full: {target} could not be written."
        return DiskFullError(message, "Free some space, or choose another -o.")
    place = error.filename or target
    return InputError(f"{place} cannot be written: {error.strerror or error}.", "Choose another -o.")


def require_space(target: Path, nbytes: int) -> None:
    """Raise DiskFullError where the target's disk has less room than ``nbytes``."""
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DiskFullError(
            f"The disk is full: {target} needs {nbytes:,} bytes, and {free:,} are free.",
            hint="Free some space, or choose another -o.",
        )


def force_to_disk(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, outlasts a power cut.

    A rename may reach the disk before what was written earlier: without this, a file could stand in its place, and be
    empty. Raises OSError where the disk fails or has no room.
    """
    if path.is_dir():
        for entry in path.iterdir():
            force_to_disk(entry)
    force_entry(path)


def force_entry(path: Path) -> None:
    """Wait until a file, or the list of what a folder holds, is on the disk. Raises OSError."""
    has_folders = hasattr(os, "O_DIRECTORY")
    if path.is_dir() and not has_folders:
        return  # Windows opens no folders, and keeps their entries itself
    # Windows forces only what may be written; elsewhere a file may be read-only, as copies of one are.
    descriptor = os.open(path, os.O_RDONLY if has_folders else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FORCE:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that appears under its own name only once it is whole; after an error, not at all.

    It is on the disk by then. Through links, and straight into what is no file, such as /dev/stdout. An OSError names
    ``path``.
    """
    target = path.resolve()
    is_special = target.exists() and not target.is_file()
    unfinished = target if is_special else target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield unfinished
        if not is_special:
            force_entry(unfinished)
            unfinished.replace(target)
            force_entry(target.parent)
    except OSError as error:
        if error.filename == str(unfinished):
            error.filename = str(path)
        raise
    except Exception as error:
        number = _OF_RUST.search(str(error))
        if number is None:
            raise
        raise _system_error(int(number[1]), path) from error
    finally:
        if not is_special:
            with suppress(OSError):  # where nothing could be written, there is nothing to clear away
                unfinished.unlink(missing_ok=True)


def _system_error(number: int, path: Path) -> OSError:
    """The error that a system gives this number: its own one on Windows, errno elsewhere."""
    if sys.platform == "win32":
        return OSError(0, ctypes.FormatError(number), str(path), number)
    return OSError(number, os.strerror(number), str(path))


def write_text(path: Path, text: str) -> None:
    """Write a text of an output: the same bytes on every system, in UTF-8 and with its line ends as they are."""
    path.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration as people read it."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def temporary_folder(prefix: str = "quantcli-", parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when it is left, by ``with``, ``cleanup`` or for want of a reference.

    What is still open or mapped then stays: Windows removes no such file, and that is no reason to fail.
    """
    return tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Meanwhile what compiled libraries print goes nowhere: stdout is for data.

    SciPy 1.17.1's HiGHS prints lines for its makers, whatever it is told.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
