"""Names of number formats as schemes, files and torch write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: safetensors dtype -> the same dtype as torch and as ONNX call it, and bytes per element.
_NAMES = {
    "F64": ("float64", "DOUBLE", 8), "F32": ("float32", "FLOAT", 4),
    "F16": ("float16", "FLOAT16", 2), "BF16": ("bfloat16", "BFLOAT16", 2),
    "I64": ("int64", "INT64", 8), "I32": ("int32", "INT32", 4), "I16": ("int16", "INT16", 2), "I8": ("int8", "INT8", 1),
    "U64": ("uint64", "UINT64", 8), "U32": ("uint32", "UINT32", 4),
    "U16": ("uint16", "UINT16", 2), "U8": ("uint8", "UINT8", 1),
    "BOOL": ("bool", "BOOL", 1), "C64": ("complex64", "COMPLEX64", 8),
    "F8_E4M3": ("float8_e4m3fn", "FLOAT8E4M3FN", 1), "F8_E5M2": ("float8_e5m2", "FLOAT8E5M2", 1),
    "F8_E8M0": ("float8_e8m0fnu", "FLOAT8E8M0", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "FLOAT8E4M3FNUZ", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", "FLOAT8E5M2FNUZ", 1),
}  # fmt: skip

#: safetensors dtypes of less than a byte, which no tensor of torch has, and bits per element.
SMALL_DTYPES = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

#: safetensors dtype -> torch's name of it, and the other way.
TORCH_NAMES = {name: torch_name for name, (torch_name, _, _) in _NAMES.items()}
DTYPE_OF_TORCH_NAME = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
#: ONNX's name of a dtype -> safetensors' name.
DTYPE_OF_ONNX_NAME = {onnx_name: name for name, (_, onnx_name, _) in _NAMES.items()}
#: safetensors dtype -> bytes per element.
DTYPE_BYTES = {name: size for name, (_, _, size) in _NAMES.items()}

#: Bits per stored value of each number format.
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "nf4": 4}

#: Formats that only cast a value and have no scale.
CASTS = ("fp16", "bf16", "fp32")

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
