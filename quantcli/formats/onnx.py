"""Codes as onnxruntime's n-bit operators read them (MatMulNBits, GatherBlockQuantized), in safetensors.

It is what a decoder graph is packed from: a working copy beside the output, which no runtime loads by itself. Codes are
stored unsigned, that is plus 8 or plus 128, two of four bits in a byte, the first in the low nibble. torch is imported
only where bits are laid out: planning does without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo, TensorSpec
from quantcli.formats.base import Storage

if TYPE_CHECKING:
    from torch import Tensor

NAME = "onnx"
STORAGE = Storage(scale_dtype="F32", channel_group=128)

#: The smallest block of columns with a scale that the operators take.
SMALLEST_BLOCK = 16

ROLES = {
    "conv": "the decoder graph has no convolutions",
    "conv1d": "the decoder graph has no transposed Conv1D layers",
    "expert": "the decoder graph has no experts",
    "experts": "the decoder graph has no experts",
}
_CODES = re.compile(r"(.+)_int([48])")


def supports(scheme: Scheme) -> str | None:
    """Why the scheme cannot be written, or None when it can."""
    weights, size = scheme.weights, scheme.weights.granularity.size
    if weights.is_cast:
        return None
    if weights.dtype not in ("int4", "int8"):
        return f"MatMulNBits carries int4 and int8 weights, not {weights.dtype}"
    if weights.granularity.kind not in ("channel", "group"):
        return f"MatMulNBits carries scales per channel or group, not per {weights.granularity.kind}"
    if size is not None and (size < SMALLEST_BLOCK or size & (size - 1)):
        return f"MatMulNBits has groups of a power of two, {SMALLEST_BLOCK} or more; asked are {size}"
    if weights.dynamic or weights.double_quantized:
        return f"MatMulNBits stores the scales of weights as they are; not {weights}"
    if scheme.inputs is not None:
        return "MatMulNBits quantizes weights alone"
    return None


def carries(role: str) -> str | None:
    """Why layers of this role stay as they are, or None when they are quantized."""
    return ROLES.get(role)


def fits(shape: tuple[int, ...], scheme: Scheme) -> str | None:
    """Why a matrix ``[rows, columns]`` cannot be laid out, or None: rows are whole blocks."""
    if shape[1] % SMALLEST_BLOCK:
        return f"MatMulNBits has blocks of {SMALLEST_BLOCK} columns or more, and {shape[1]} columns are none"
    return None


def together(schemes: Iterable[Scheme]) -> str | None:
    """None: every node has a scheme of its own."""
    return None


def codes_name(weight: str, scheme: Scheme) -> str:
    """Name of the tensor that holds the codes of ``weight``."""
    return f"{weight}_{scheme.weights.dtype}"


def layout(weight: str, shape: tuple[int, ...], scheme: Scheme, scale_dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that stands for ``weight`` ``[rows, columns]``."""
    rows, columns = shape
    bits, groups = scheme.weights.bits, columns // (scheme.weights.granularity.size or columns)
    specs = {
        codes_name(weight, scheme): TensorSpec("U8", (rows, columns * bits // 8)),
        f"{weight}_scale": TensorSpec(scale_dtype, (rows, groups)),
    }
    if not scheme.weights.symmetric:
        specs[f"{weight}_zero_point"] = TensorSpec("U8", (rows, -(-groups * bits // 8)))
    return specs


def codes_offset(row: int, columns: int, scheme: Scheme) -> int:
    """Bytes of the stored codes that lie before a row."""
    return row * columns * scheme.weights.bits // 8


def encode_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Stored form of codes, int8 ``[rows, columns]``: uint8 ``[rows, ceil(columns * bits / 8)]``."""
    import torch

    from quantcli.core import packing

    if scheme.weights.bits == 8:
        return (codes ^ -128).view(torch.uint8)
    packed = packing.pack_int4_low_nibble_first(codes.contiguous()).view(torch.uint8)
    return packed[:, : -(-codes.shape[1] // 2)].contiguous()


def decode_codes(stored: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Inverse of `encode_codes`: int8 ``[rows, columns]``."""
    import torch

    from quantcli.core import packing

    if scheme.weights.bits == 8:
        return stored.view(torch.int8) ^ -128
    return packing.unpack_int4_low_nibble_first(stored, 2 * stored.shape[1])[:, :columns]


def encode_scales(weight: str, tensor: QuantizedTensor, scheme: Scheme, scale_dtype: str) -> dict[str, Tensor]:
    """Every other tensor of the layer; ``tensor.codes`` is not looked at."""
    from quantcli.core.dtypes import torch_dtype

    parts = {f"{weight}_scale": tensor.scale.contiguous().to(torch_dtype(scale_dtype))}
    if tensor.zero_point is not None:
        parts[f"{weight}_zero_point"] = encode_codes(tensor.zero_point, scheme)
    return parts


def decode_scales(
    weight: str, shape: tuple[int, ...], scheme: Scheme, load: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point of a layer, as `QuantizedTensor` holds them."""
    scale = load(f"{weight}_scale").float()
    if scheme.weights.symmetric:
        return scale, None
    return scale, decode_codes(load(f"{weight}_zero_point"), scale.shape[1], scheme)


def config(schemes: Mapping[str, Scheme], left: Iterable[str], dtype: str) -> dict[str, Any]:
    """``quantization_config`` of the working copy: names and shapes tell the rest."""
    return {"quant_method": NAME}


def find(
    infos: Mapping[str, TensorInfo], section: Mapping[str, Any], load: Callable[[str], Tensor]
) -> dict[str, tuple[tuple[int, int], Scheme]]:
    """Shape and scheme of every quantized weight, by its name."""
    found = {}
    for name, info in infos.items():
        named = _CODES.fullmatch(name)
        if not named or info.dtype != "U8" or f"{named[1]}_scale" not in infos:
            continue
        bits, groups = int(named[2]), infos[f"{named[1]}_scale"].columns
        columns = info.columns * 8 // bits
        granularity = Granularity("channel") if groups == 1 else Granularity("group", columns // max(1, groups))
        symmetric = f"{named[1]}_zero_point" not in infos
        number_format = NumberFormat(f"int{bits}", granularity, symmetric)
        found[named[1]] = ((info.rows, columns), Scheme(number_format))
    return found
