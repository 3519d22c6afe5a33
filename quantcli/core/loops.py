"""The inner loops of numerics and packing, compiled by numba: one pass over memory where torch takes several.

Imported by `quantcli.core.compiled` alone, where numba is installed. Codes and ranges equal those of torch's operations
to the bit; sums of squares, in float64, but for their last digits.

``values`` are float32 ``[groups, size]``, with one scale, float32 ``[groups]``, for each row; ``bits`` are the same
values seen as int32. All arrays are contiguous. Indices run from zero along each axis: numba then knows that none is
negative, and works on many values at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from quantcli.core.nf4 import nf4_bounds

_NF4_BOUNDS = tuple(np.float32(bound) for bound in nf4_bounds().tolist())
_BELOW_SIGN = 0x7FFFFFFF
_INT32 = np.iinfo(np.int32)
_LARGEST, _SMALLEST = np.int32(_INT32.max), np.int32(_INT32.min)
_f32, _i32, _i8, _u8 = np.float32, np.int32, np.int8, np.uint8


def _compiled(*, reorder_sums: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """A decorator; machine code is kept beside the module, or in the user's cache, where either can be written."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"reassoc", "nsz"} if reorder_sums else False

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no place for a cache can be written
            return numba.njit(**options)(function)

    return decorate


@_compiled()
def largest(bits: Any, out: Any) -> None:
    """Bits of the largest magnitude of each group into ``out``, int32 ``[groups]``; a NaN is above all numbers."""
    for group in range(bits.shape[0]):
        found = _i32(0)
        for index in range(bits.shape[1]):
            found = max(found, _i32(bits[group, index] & _BELOW_SIGN))
        out[group] = found


@_compiled()
def extremes(bits: Any, low: Any, high: Any) -> None:
    """Bits of the smallest and of the largest value of each group into ``low`` and ``high``, int32 ``[groups]``."""
    for group in range(bits.shape[0]):
        smallest, biggest = _LARGEST, _SMALLEST
        for index in range(bits.shape[1]):
            # Integers in the order of the floats: below zero, a larger magnitude is a smaller number.
            ordered = _i32(bits[group, index] ^ ((bits[group, index] >> 31) & _BELOW_SIGN))
            smallest, biggest = min(smallest, ordered), max(biggest, ordered)
        low[group] = smallest ^ ((smallest >> 31) & _BELOW_SIGN)
        high[group] = biggest ^ ((biggest >> 31) & _BELOW_SIGN)


@_compiled()
def integer_codes(values: Any, scale: Any, zero_point: Any, low: float, high: float, out: Any) -> None:
    """Codes between two float32 bounds into ``out``, int8 ``[groups, size]``; ``zero_point`` is int8 ``[groups]``."""
    for group in range(values.shape[0]):
        step, offset = scale[group], _f32(zero_point[group])
        for index in range(values.shape[1]):
            code = np.rint(values[group, index] / step) + offset
            code = low if code < low else code
            out[group, index] = _i8(high if code > high else code)


@_compiled()
def nf4_codes(values: Any, inverse: Any, out: Any) -> None:
    """Indices of the nearest values of NF4 into ``out``, int8 ``[groups, size]``; ``inverse`` is one over the scale."""
    for group in range(values.shape[0]):
        factor = inverse[group]
        for index in range(values.shape[1]):
            scaled, code = values[group, index] * factor, _i32(0)
            # A tuple of constants: the loop over it is unrolled.
            for bound in _NF4_BOUNDS:
                code += _i32(scaled > bound)
            out[group, index] = code


@_compiled(reorder_sums=True)
def integer_powers(values: Any, codes: Any, scale: Any, zero_point: Any) -> tuple[float, float]:
    """Sums of squares of values, and of what integer codes changed in them."""
    signal, noise = 0.0, 0.0
    for group in range(values.shape[0]):
        step, offset = scale[group], _f32(zero_point[group])
        for index in range(values.shape[1]):
            value = values[group, index]
            difference = (_f32(codes[group, index]) - offset) * step - value
            signal += float(value * value)
            noise += float(difference * difference)
    return signal, noise


@_compiled(reorder_sums=True)
def codebook_powers(values: Any, codes: Any, scale: Any, codebook: Any) -> tuple[float, float]:
    """Sums of squares of values, and of what the codes of a codebook, float32 ``[n]``, changed in them."""
    signal, noise = 0.0, 0.0
    for group in range(values.shape[0]):
        step = scale[group]
        for index in range(values.shape[1]):
            value = values[group, index]
            difference = codebook[_u8(codes[group, index])] * step - value
            signal += float(value * value)
            noise += float(difference * difference)
    return signal, noise


@_compiled()
def pack_signed_low_first(codes: Any, out: Any) -> None:
    """Pairs of signed codes of four bits ``[n]`` into bytes ``[n / 2]``: stored as ``code + 8``, the first one low."""
    for index in range(out.size):
        out[index] = _u8((codes[2 * index] + 8) & 15 | (codes[2 * index + 1] + 8) << 4)


@_compiled()
def unpack_signed_low_first(packed: Any, out: Any) -> None:
    """Inverse of `pack_signed_low_first`."""
    for index in range(packed.size):
        out[2 * index] = _i8(packed[index] & 15) - _i8(8)
        out[2 * index + 1] = _i8(packed[index] >> 4) - _i8(8)


@_compiled()
def pack_high_first(codes: Any, out: Any) -> None:
    """Pairs of unsigned codes of four bits ``[n]`` into bytes ``[n / 2]``, the first one high."""
    for index in range(out.size):
        out[index] = _u8((codes[2 * index] & 15) << 4 | codes[2 * index + 1] & 15)


@_compiled()
def unpack_high_first(packed: Any, out: Any) -> None:
    """Inverse of `pack_high_first`."""
    for index in range(packed.size):
        out[2 * index] = _i8(packed[index] >> 4)
        out[2 * index + 1] = _i8(packed[index] & 15)
