"""Arrays for a model's inputs: opened without loading them, compared with what the model asks for, converted.

An array of a file fits an input in one of two ways: it has as many dimensions, and the first one counts
samples; or it has one more, and each entry is one whole input, as states and scalars need it.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from quantcli.errors import InputError
from quantcli.graph.model import Port

if TYPE_CHECKING:
    import numpy as np

ARRAY_SUFFIXES = (".npz", ".npy")
LABELS = "labels"

#: How an array's entries become one sample's input: a slice that keeps the first axis, an entry itself, or the
#: whole array with an axis before it.
Layout = Literal["rows", "entries", "single"]

_BFLOAT16 = "bfloat16"


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
                found = {
                    entry.filename.removesuffix(".npy"): self._member(archive, entry) for entry in archive.infolist()
                }
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            if any(word in reason for word in ("pickle", "Object arrays", "Python objects")):
                reason = "it holds Python objects, which are never loaded"
            raise InputError(f"{self.path} is not a readable numpy file: {reason}.") from error
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        names = [name for name in found if name != LABELS]
        if names == ["arr_0"] and len(needed) == 1:  # numpy's name for an array that was given none
            found[needed[0]] = found.pop("arr_0")
        return found

    def _member(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
        """One array of an archive, mapped from where it lies if it is not compressed."""
        with archive.open(entry) as stream:
            dtype, shape, fortran, start = _header(stream)
        if entry.file_size < start + dtype.itemsize * _product(shape):
            raise ValueError(f"{entry.filename} is truncated")
        if entry.compress_type == zipfile.ZIP_STORED:
            with self.path.open("rb") as raw:
                raw.seek(entry.header_offset + 26)
                lengths = raw.read(4)
            start += entry.header_offset + 30 + int.from_bytes(lengths[:2], "little")
            start += int.from_bytes(lengths[2:], "little")
            return self._mapped(self.path, dtype, shape, fortran, start)
        return self._mapped(self._extracted(archive, entry), dtype, shape, fortran, start)

    def _mapped(
        self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool, start: int
    ) -> np.ndarray:
        import numpy as np

        if path.stat().st_size < start + dtype.itemsize * _product(shape):
            raise ValueError(f"it is truncated: {dtype} {' x '.join(map(str, shape))} do not fit into it")
        if not _product(shape):
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
            self._scratch = tempfile.TemporaryDirectory(prefix="quantcli-")
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
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    return dtype, shape, fortran, stream.tell()


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def layouts(
    ports: Sequence[Port], arrays: Mapping[str, np.ndarray], where: str, *, single: bool = False
) -> dict[str, Layout]:
    """How each array becomes the input of its name; with ``single`` an array may also lack the axis of samples.

    Raises:
        InputError: names, dtypes or shapes are not what the model asks for, all of which is listed.
    """
    found = {
        port.name: layout
        for port in ports
        if port.name in arrays and (layout := _layout(port, arrays[port.name], single)) is not None
    }
    unknown = arrays.keys() - {port.name for port in ports}
    missing = [port for port in ports if port.name not in found and (port.name in arrays or not port.optional)]
    if missing or unknown:
        raise mismatch(ports, arrays, where)
    return found


def mismatch(ports: Sequence[Port], arrays: Mapping[str, np.ndarray], where: str) -> InputError:
    """Every input as the model wants it, with what there is beside it."""

    def described(array: np.ndarray | None) -> str:
        return "nothing" if array is None else f"{array.dtype} {' x '.join(map(str, array.shape)) or 'scalar'}"

    wanted = [port for port in ports if port.name in arrays or not port.optional]
    lines = [f"{port} is expected, got {described(arrays.get(port.name))}" for port in wanted]
    known = {port.name for port in ports}
    lines += [f"{name} is no input, got {described(array)}" for name, array in arrays.items() if name not in known]
    return InputError(
        f"{where} does not fit the model's inputs. {'; '.join(lines)}.",
        "The first axis counts samples.",
    )


def _layout(port: Port, array: np.ndarray, single: bool) -> Layout | None:
    if not converts(array.dtype, port.dtype):
        return None
    if port.shape is None:
        return "rows" if array.ndim else None
    extra = array.ndim - len(port.shape)
    if extra == 0 and array.ndim and _agree(port.shape[1:], array.shape[1:]):
        return "rows"
    if extra == 1 and _agree(port.shape, array.shape[1:]):
        return "entries"
    if single and extra == -1 and _agree(port.shape[1:], array.shape):
        return "single"
    return None


def _agree(wanted: Sequence[int | str | None], shape: Sequence[int]) -> bool:
    return all(not isinstance(dim, int) or dim == size for dim, size in zip(wanted, shape, strict=True))


def converts(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    """Whether values of one dtype mean the same in the other: floats as floats, integers as integers."""

    def kind(dtype: np.dtype[Any]) -> str:
        return "f" if dtype.name == _BFLOAT16 else dtype.kind.replace("u", "i")

    return have == want or (kind(have) == kind(want) and kind(have) in "fi")


def converted(array: np.ndarray, port: Port, where: str) -> np.ndarray:
    """The array in the input's dtype. Raises InputError where a value is too large for it."""
    import numpy as np

    if array.dtype == port.dtype:
        return np.array(array, order="C")
    with np.errstate(over="ignore"):
        found = np.array(array, port.dtype, order="C")
    if port.dtype.kind in "iu":
        fits = bool((found == array).all())
    else:
        fits = bool((np.isfinite(found.astype(np.float32)) == np.isfinite(array)).all())
    if not fits:
        raise InputError(f"{where} has values in {port.name} that {port.dtype} cannot hold; they are {array.dtype}.")
    return found


def labels_of(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Labels as integers ``[count]``. Raises InputError."""
    import numpy as np

    values = np.asarray(labels)
    if values.shape not in ((count,), (count, 1)) or values.dtype.kind not in "iu":
        raise InputError(
            f"{where} has labels of {values.dtype} {' x '.join(map(str, values.shape)) or 'scalar'}; "
            f"expected are integers, one for each of the {count} samples."
        )
    return values.reshape(-1)
