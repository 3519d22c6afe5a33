"""GGUF's types Q4_0, Q4_1 and Q8_0, which llama.cpp runs (checked against gguf 0.19).

Blocks of 32 values of a row: ``Q4_0`` is ``(q - 8) * d`` with q of 0 to 15, ``Q4_1`` is ``q * d + m``, ``Q8_0`` is
``q * d``; d and m are FP16. Value j of a block of four-bit ones lies in the low half of byte j, value j + 16 in the
high half. A larger group is several blocks with one scale. ``m`` is ``-(zero point + 8) * d``, which must be a number
of FP16: quantization chooses such scales (`NumberFormat.coarse`).

While a model is worked on, codes and scales of a weight are tensors of their own: ``.codes``, ``.scales`` and
``.zero_points``. `to_blocks` joins them. torch is imported only where bits are laid out: planning does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo, TensorSpec
from quantcli.formats.base import Storage

if TYPE_CHECKING:
    from torch import Tensor

NAME = "gguf"
STORAGE = Storage(scale_dtype="F16", wide_vectors=True, coarse_scales=True, starts_anew=True)

#: Values that share a scale in every type that is written.
BLOCK = 32
#: What is added to a four-bit code to make it one of GGUF's.
_SHIFT = 8

CODES, SCALES, ZERO_POINTS = ".codes", ".scales", ".zero_points"

_ROLES = {
    "conv": "GGUF is written for language models, which have no convolutions",
    "conv1d": "GGUF is written for models of linear layers",
    "expert": "GGUF is not written for mixtures of experts",
    "experts": "GGUF is not written for mixtures of experts",
    "router": "GGUF is not written for mixtures of experts",
}


def supports(scheme: Scheme) -> str | None:
    """Why the scheme cannot be written, or None when it can."""
    weights = scheme.weights
    if scheme.inputs is not None:
        return f"{NAME} keeps inputs as they are"
    if weights.dtype in ("fp16", "bf16"):
        return None
    if weights.dtype not in ("int4", "int8"):
        return f"{NAME} carries int4, int8, fp16 and bf16, not {weights.dtype}"
    kind, size = weights.granularity.kind, weights.granularity.size
    if kind != "channel" and not (kind == "group" and size and size % BLOCK == 0):
        told = weights.granularity
        return f"{NAME} has a scale for every {BLOCK} values, so groups are of {BLOCK}, 64, 128 or a row; not {told}"
    if weights.dtype == "int8" and not weights.symmetric:
        return f"{NAME} has no zero points for int8 (Q8_0); int4 has them (Q4_1)"
    if weights.dynamic or weights.double_quantized:
        return f"{NAME} stores the scales of weights as they are; not {weights}"
    return None


def carries(role: str) -> str | None:
    """Why layers of this role stay as they are, or None when they are quantized."""
    return _ROLES.get(role)


def fits(shape: tuple[int, ...], scheme: Scheme) -> str | None:
    """Why a matrix ``[O, I]`` cannot be laid out, or None: a row is whole blocks."""
    return (
        f"{NAME} stores rows in blocks of {BLOCK}, which do not divide {shape[1]} columns" if shape[1] % BLOCK else None
    )


def together(schemes: Iterable[Scheme]) -> str | None:
    """None: every tensor has a type of its own."""
    return None


def type_of(scheme: Scheme) -> str:
    """GGUF's type for codes of a scheme."""
    if scheme.weights.dtype == "int8":
        return "Q8_0"
    return "Q4_0" if scheme.weights.symmetric else "Q4_1"


def codes_name(weight: str, scheme: Scheme) -> str:
    """Name of the tensor that holds the codes of ``weight`` while it is worked on."""
    return weight + CODES


def _groups(shape: tuple[int, ...], scheme: Scheme) -> int:
    return shape[1] // (scheme.weights.granularity.size or shape[1])


def layout(weight: str, shape: tuple[int, ...], scheme: Scheme, scale_dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that stands for ``weight`` ``[O, I]`` while it is worked on."""
    rows, columns = shape
    four_bits = scheme.weights.bits == 4
    specs = {
        weight + CODES: TensorSpec("U8", (rows, columns // 2)) if four_bits else TensorSpec("I8", (rows, columns)),
        weight + SCALES: TensorSpec("F16", (rows, _groups(shape, scheme))),
    }
    if not scheme.weights.symmetric:
        specs[weight + ZERO_POINTS] = TensorSpec("I8", (rows, _groups(shape, scheme)))
    return specs


def codes_offset(row: int, columns: int, scheme: Scheme) -> int:
    """Bytes of the stored codes that lie before a row."""
    return row * columns * scheme.weights.bits // 8


def encode_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes, int8 ``[rows, columns]``, in the order of GGUF's blocks."""
    import torch

    if scheme.weights.bits == 8:
        return codes.contiguous()
    halves = (codes + _SHIFT).to(torch.uint8).reshape(len(codes), -1, 2, BLOCK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)


def decode_codes(stored: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Inverse of `encode_codes`: int8 ``[rows, columns]``."""
    import torch

    if scheme.weights.bits == 8:
        return stored
    halves = stored.reshape(len(stored), -1, 1, BLOCK // 2)
    both = torch.cat((halves & 15, halves >> 4), dim=2)
    return both.to(torch.int8).sub_(_SHIFT).reshape(len(stored), columns)


def encode_scales(weight: str, tensor: QuantizedTensor, scheme: Scheme, scale_dtype: str) -> dict[str, Tensor]:
    """Every other tensor of the layer; ``tensor.codes`` is not looked at."""
    import torch

    parts = {weight + SCALES: tensor.scale.to(torch.float16)}
    return parts if tensor.zero_point is None else parts | {weight + ZERO_POINTS: tensor.zero_point}


def decode_scales(
    weight: str, shape: tuple[int, ...], scheme: Scheme, load: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point of a layer, as `QuantizedTensor` holds them."""
    scale = load(weight + SCALES).float()
    return scale, None if scheme.weights.symmetric else load(weight + ZERO_POINTS)


def find(
    infos: Mapping[str, TensorInfo], section: Mapping[str, Any], load: Callable[[str], Tensor]
) -> dict[str, tuple[tuple[int, int], Scheme]]:
    """Shape ``[O, I]`` and scheme of every quantized weight, by its name, from the shapes of its parts."""
    found = {}
    for name, info in infos.items():
        weight = name.removesuffix(CODES)
        scales = infos.get(weight + SCALES)
        if weight == name or scales is None:
            continue
        dtype, columns = ("int4", 2 * info.columns) if info.dtype == "U8" else ("int8", info.columns)
        groups = scales.columns
        granularity = Granularity("channel") if groups == 1 else Granularity("group", columns // groups)
        number_format = NumberFormat(dtype, granularity, symmetric=weight + ZERO_POINTS not in infos)
        found[weight] = ((info.rows, columns), Scheme(number_format))
    return found


def config(schemes: Mapping[str, Scheme], left: Iterable[str], dtype: str) -> dict[str, Any]:
    """What config.json says while the model is worked on: types stand with every tensor."""
    return {"quant_method": NAME}


def exact_minimum(scale: Tensor, zero_point: Tensor) -> bool:
    """Whether FP16 holds what ``Q4_1`` adds to every value of scales (float32) and zero points."""
    minimum = -(zero_point.float() + _SHIFT) * scale
    return bool((minimum.half().float() == minimum).all())


def to_blocks(tensor: QuantizedTensor) -> Tensor:
    """A weight as GGUF stores it: bytes ``[rows, bytes of a row]``."""
    import torch

    scheme = Scheme(tensor.number_format)
    rows, columns = tensor.codes.shape
    blocks = columns // BLOCK

    def per_block(values: Tensor) -> Tensor:
        halves = values.to(torch.float16).repeat_interleave(blocks // values.shape[1], 1)
        return halves.contiguous().view(torch.uint8).reshape(rows, blocks, 2)

    parts = [per_block(tensor.scale)]
    if tensor.zero_point is not None:
        parts.append(per_block(-(tensor.zero_point.float() + _SHIFT) * tensor.scale))
    parts.append(encode_codes(tensor.codes, scheme).view(torch.uint8).reshape(rows, blocks, -1))
    return torch.cat(parts, dim=2).reshape(rows, -1)


def from_blocks(stored: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `to_blocks`, block by block.

    Args:
        stored: bytes ``[rows, bytes of a row]``.
        kind: ``Q4_0``, ``Q4_1`` or ``Q8_0``.

    Returns:
        Codes as `encode_codes` gives them, scales (float16) ``[rows, blocks]``, and of Q4_1 minima like these.
    """
    import torch

    offset = 4 if kind == "Q4_1" else 2
    size = offset + (BLOCK if kind == "Q8_0" else BLOCK // 2)
    blocks = stored.reshape(len(stored), -1, size)
    codes = blocks[:, :, offset:].reshape(len(stored), -1)
    floats = blocks[:, :, :offset].contiguous().view(torch.float16)
    minima = floats[:, :, 1].contiguous() if kind == "Q4_1" else None
    return codes.view(torch.int8) if kind == "Q8_0" else codes, floats[:, :, 0].contiguous(), minima
