"""Arrays for a model's inputs: opened without loading them, compared with what the model asks for, converted.

An array of a file fits an input in one of two ways: it has as many dimensions, and the first one counts
samples; or it has one more, and each entry is one whole input, as states and scalars need it. Where the arrays of a
file fit as they are, and their first dimensions count no samples, they are one feed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from quantcli.core.ports import Port, dtype_family
from quantcli.errors import InputError

if TYPE_CHECKING:
    import numpy as np

#: How an array's entries become one sample's input: a slice that keeps the first axis, an entry itself, the whole
#: array with an axis before it, or the array as it is.
Layout = Literal["rows", "entries", "single", "whole"]


def layouts(
    ports: Sequence[Port], arrays: Mapping[str, np.ndarray], where: str, *, single: bool = False
) -> dict[str, Layout]:
    """How each array becomes the input of its name; with ``single`` an array may also lack the axis of samples.

    Raises:
        InputError: names, dtypes or shapes are not what the model asks for, all of which is listed.
    """
    if _is_feed(ports, arrays):
        return {port.name: "whole" for port in ports if port.name in arrays}
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


def _is_feed(ports: Sequence[Port], arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether arrays are what one run of the model takes, and cannot be samples along their first axes."""
    present = [port for port in ports if port.name in arrays]
    if arrays.keys() - {port.name for port in present} or any(
        port.name not in arrays and not port.optional for port in ports
    ):
        return False
    named: dict[str, int] = {}
    for port in present:
        shape, array = port.shape, arrays[port.name]
        if shape is None or len(shape) != array.ndim or port.dtype_of(array.dtype) is None:
            return False
        for dim, size in zip(shape, array.shape, strict=True):
            wanted = named.setdefault(dim, size) if isinstance(dim, str) else dim
            if isinstance(wanted, int) and wanted != size:
                return False
    firsts = {port.shape[0] for port in present if port.shape}
    counts = {arrays[port.name].shape[:1] for port in present}
    fixed = {first for first in firsts if isinstance(first, int)}
    # Samples have one count, and a model that takes a number of them at a time takes it of every input. Where first
    # axes have no names, counts that differ are a mistake rather than a feed.
    counted = () not in counts and len(fixed) < 2 and not (fixed and len(firsts) > 1)
    return not counted or (len(counts) > 1 and None not in firsts)


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
        "The first axis counts samples; a file that holds exactly what the model is fed is one sample.",
    )


def _layout(port: Port, array: np.ndarray, single: bool) -> Layout | None:
    if port.dtype_of(array.dtype) is None:
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


def converted(array: np.ndarray, port: Port, where: str) -> np.ndarray:
    """The array in the input's dtype. Raises InputError where a value is too large for it."""
    import numpy as np

    dtype = port.dtype_of(array.dtype) or port.dtype
    if array.dtype == dtype:
        return np.array(array, order="C")
    if port.dtype.kind == "O":
        return (np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array).astype(object)
    with np.errstate(over="ignore"):
        found = np.array(array, dtype, order="C")
    if dtype_family(dtype) == "integer":
        fits = bool((found == array).all())
    else:
        fits = bool((np.isfinite(found.astype(np.float32)) == np.isfinite(array)).all())
    if not fits:
        raise InputError(f"{where} has values in {port.name} that {dtype} cannot hold; they are {array.dtype}.")
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
