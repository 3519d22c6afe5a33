"""Types that numpy, or its files, lack: as arrays of ml_dtypes, and as they lie in onnxruntime's memory.

ml_dtypes has a byte for a number of four or two bits; onnxruntime packs them, the first one into the lowest bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from quantcli.core.ports import dtype_family

#: Bits of types that share a byte.
_BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}


def is_narrow(dtype: np.dtype[Any]) -> bool:
    """Whether a type is one of ml_dtypes, which onnxruntime neither takes from numpy nor gives to it."""
    return hasattr(ml_dtypes, dtype.name)


def in_numpy(values: np.ndarray) -> np.ndarray:
    """The same numbers, or strings, in a type that numpy's files know."""
    if values.dtype == object:
        return values.astype(str)
    if not is_narrow(values.dtype):
        return values
    return values.astype(np.float32 if dtype_family(values.dtype) == "float" else np.int8)


def packed(values: np.ndarray) -> np.ndarray:
    """An array of the same shape, uint8 where numbers share a byte: its first bytes are what onnxruntime reads."""
    bits = _BITS.get(values.dtype.name)
    if bits is None:
        return np.ascontiguousarray(values)
    shares = 8 // bits
    codes = np.ascontiguousarray(values).reshape(-1).view(np.uint8) & ((1 << bits) - 1)
    groups = np.pad(codes, (0, -codes.size % shares)).reshape(-1, shares)
    found = np.zeros(values.shape, np.uint8)
    found.reshape(-1)[: len(groups)] = sum(groups[:, place] << (bits * place) for place in range(shares))
    return found


def unpacked(content: bytes, dtype: np.dtype[Any], shape: Sequence[int]) -> np.ndarray:
    """The numbers that onnxruntime holds in some bytes; inverse of `packed`."""
    bits = _BITS.get(dtype.name)
    if bits is None:
        return np.frombuffer(content, dtype).reshape(shape).copy()
    places = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (np.frombuffer(content, np.uint8)[:, None] >> places) & ((1 << bits) - 1)
    codes = codes.reshape(-1)[: int(np.prod(shape))].astype(np.uint8)
    if dtype.name.startswith("int"):
        sign = np.int8(1 << (bits - 1))
        codes = ((codes.view(np.int8) ^ sign) - sign).view(np.uint8)
    return codes.view(dtype).reshape(shape)
