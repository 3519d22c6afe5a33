"""``.npy`` and ``.npz`` files, read sample by sample without loading them whole."""

from __future__ import annotations

import lzma
import mmap
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from quantcli.core.ports import Port
from quantcli.errors import InputError
from quantcli.system.files import stored_member_offset, temporary_folder
from quantcli.system.text import first_line

if TYPE_CHECKING:
    import numpy as np

ARRAY_SUFFIXES = (".npz", ".npy")
LABELS = "labels"
#: What zipfile, and what it decompresses with, raise for a damaged archive.
_DAMAGED = (
    ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


class ArrayFile:
    """The arrays of a ``.npz`` or ``.npy`` file, mapped into memory. Compressed ones go through a temporary file."""

    def __init__(self, path: Path, ports: Sequence[Port]) -> None:
        self.path = path
        self._mappings: list[mmap.mmap] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.arrays = self._open(ports)
        self.labels = self.arrays.pop(LABELS, None) if LABELS not in {port.name for port in ports} else None

    def _open(self, ports: Sequence[Port]) -> dict[str, np.ndarray]:
        needed = [port.name for port in ports if not port.optional]
        try:
            if self.path.suffix == ".npy":
                if len(needed) != 1:
                    raise InputError(
                        f"{self.path} is one array, and the model has {len(needed)} inputs.",
                        f"Give a .npz with {', '.join(needed)}.",
                    )
                with self.path.open("rb") as stream:
                    dtype, shape, fortran, start = _header(stream)
                return {needed[0]: self._mapped(self.path, dtype, shape, fortran, start)}
            with zipfile.ZipFile(self.path) as archive:
                arrays = {
                    entry.filename.removesuffix(".npy"): self._member(archive, entry) for entry in archive.infolist()
                }
        except _DAMAGED as error:
            reason, hint = " ".join(str(error).split()).rstrip("."), None
            if any(word in reason for word in ("pickle", "Object arrays", "Python objects")):
                reason = "it holds Python objects, which are never loaded"
                hint = "Strings are saved as an array of the type str: numpy.array([...], dtype=str)."
            raise InputError(f"{self.path} is not a readable numpy file: {reason}.", hint) from error
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        names = [name for name in arrays if name != LABELS]
        if names == ["arr_0"] and len(needed) == 1:  # numpy's name for an array that was given none
            arrays[needed[0]] = arrays.pop("arr_0")
        return arrays

    def _member(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
        """One array of an archive, mapped from where it lies if it is not compressed."""
        with archive.open(entry) as stream:
            dtype, shape, fortran, start = _header(stream)
        if entry.file_size < start + dtype.itemsize * prod(shape):
            raise ValueError(f"{entry.filename} is truncated")
        if entry.compress_type == zipfile.ZIP_STORED:
            with self.path.open("rb") as raw:
                start += stored_member_offset(raw, entry)
            return self._mapped(self.path, dtype, shape, fortran, start)
        return self._mapped(self._extracted(archive, entry), dtype, shape, fortran, start)

    def _mapped(
        self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool, start: int
    ) -> np.ndarray:
        import numpy as np

        if path.stat().st_size < start + dtype.itemsize * prod(shape):
            raise ValueError(f"it is truncated: {dtype} {' x '.join(map(str, shape))} do not fit into it")
        if not prod(shape):
            return np.zeros(shape, dtype)
        with path.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._mappings.append(mapping)
        return np.ndarray(shape, dtype, mapping, start, order="F" if fortran else "C")

    def release(self) -> None:
        """Give back the memory of what was read: mapped pages would otherwise count as this process's own."""
        for mapping in self._mappings:
            if hasattr(mapping, "madvise"):  # not on Windows
                mapping.madvise(mmap.MADV_DONTNEED)

    def _extracted(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Path:
        if self._scratch is None:
            self._scratch = temporary_folder()
        folder = Path(self._scratch.name)
        if entry.file_size > shutil.disk_usage(folder).free:
            raise InputError(
                f"{self.path} holds {entry.file_size:,} bytes in compressed form, more than {folder} has room for.",
                "Save it with numpy.savez, which does not compress.",
            )
        target = folder / str(len(list(folder.iterdir())))
        with archive.open(entry) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        return target


def _header(stream: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Dtype, shape, order, and where the data starts. Raises ValueError."""
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has version {version} of the format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    except (*_DAMAGED, OSError):
        raise
    except Exception as error:  # numpy parses it as Python, and raises whatever it stumbles over
        raise ValueError(f"its header is damaged ({first_line(error)})") from error
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"its header is damaged (the shape {shape})")
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    return dtype, shape, fortran, stream.tell()
