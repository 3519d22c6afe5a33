"""Names of number formats as schemes, files and torch write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: safetensors dtype -> torch's name of it.
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip

#: Bits per stored value of each number format.
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "nf4": 4}

#: Formats that only cast a value and have no scale.
CASTS = ("fp16", "bf16", "fp32")

#: safetensors dtype -> bytes per element. The order is the one the reference writer sorts by.
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

#: Floating-point dtypes that hold weights at full meaning (not themselves a quantized form).
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

#: safetensors dtype -> the number format of the same values.
NUMBER_OF_DTYPE = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
DTYPE_OF_NUMBER = {number: dtype for dtype, number in NUMBER_OF_DTYPE.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype. Raises KeyError for an unknown one."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype
