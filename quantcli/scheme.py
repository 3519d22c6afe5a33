"""The vocabulary every other module shares: number formats, schemes, tensors and their quantized form.

Nothing here imports torch, so that headers can be inspected in a tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

GranularityKind = Literal["tensor", "channel", "group", "block", "token"]

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


@dataclass(frozen=True)
class Granularity:
    """How many values share one scale.

    ``tensor``: all of them. ``channel``: one output row. ``group``: ``size`` consecutive values of a
    row. ``block``: ``size`` consecutive values of the flattened tensor (as QLoRA and bitsandbytes
    mean it). ``token``: one row of an activation.
    """

    kind: GranularityKind
    size: int | None = None

    def __post_init__(self) -> None:
        needs_size = self.kind in ("group", "block")
        if needs_size != (self.size is not None) or (self.size is not None and self.size < 1):
            raise ValueError(f"granularity {self.kind!r} with size {self.size!r}")

    def __str__(self) -> str:
        return self.kind if self.size is None else f"{self.kind} {self.size}"


@dataclass(frozen=True)
class NumberFormat:
    """How one tensor's values are stored.

    ``double_quantized``: the scales are themselves quantized to 8 bits (QLoRA, arXiv:2305.14314).
    ``dynamic``: ranges are found at inference; only activations can be dynamic.
    ``narrow``: the lowest code is left out, so that a symmetric range ends in a code at both ends.
    ``raised``: no zero point is the lowest code, which some formats have no way to store.
    """

    dtype: str
    granularity: Granularity = Granularity("tensor")
    symmetric: bool = True
    dynamic: bool = False
    double_quantized: bool = False
    narrow: bool = False
    raised: bool = False

    @property
    def bits(self) -> int:
        """Bits per stored value, scales not counted."""
        return BITS[self.dtype]

    @property
    def is_cast(self) -> bool:
        """Whether values are only cast, without a scale."""
        return self.dtype in CASTS

    def __str__(self) -> str:
        if self.is_cast:
            return self.dtype
        parts = [self.dtype, str(self.granularity)]
        if not self.symmetric:
            parts.append("asymmetric")
        if self.double_quantized:
            parts.append("double-quantized")
        if self.dynamic:
            parts.append("dynamic")
        return ", ".join(parts)


@dataclass(frozen=True)
class Scheme:
    """How a layer's weights, and optionally its inputs, are quantized."""

    weights: NumberFormat
    inputs: NumberFormat | None = None

    @property
    def is_static(self) -> bool:
        """Whether inputs are quantized in ranges that are fixed beforehand."""
        return self.inputs is not None and not self.inputs.dynamic

    def with_group_size(self, size: int) -> Scheme:
        """The same scheme with groups (or blocks) of ``size`` values."""
        granularity = Granularity(self.weights.granularity.kind, size)
        return replace(self, weights=replace(self.weights, granularity=granularity))

    def __str__(self) -> str:
        if self.inputs is None:
            return str(self.weights)
        return f"{self.weights} | inputs {self.inputs}"


_CHANNEL = Granularity("channel")
_INT8 = NumberFormat("int8", _CHANNEL)
_NF4 = NumberFormat("nf4", Granularity("block", 64))

#: The schemes the command line knows by name.
PRESETS: dict[str, Scheme] = {
    "fp16": Scheme(NumberFormat("fp16")),
    "bf16": Scheme(NumberFormat("bf16")),
    "int8": Scheme(_INT8),
    "int4": Scheme(NumberFormat("int4", Granularity("group", 128))),
    "nf4": Scheme(_NF4),
    "nf4-double": Scheme(replace(_NF4, double_quantized=True)),
    "int8-dynamic": Scheme(_INT8, NumberFormat("int8", Granularity("token"), dynamic=True)),
    "int8-static": Scheme(_INT8, NumberFormat("int8", symmetric=False)),
}

#: The parameter of a layer, beside its weight, that holds the scale of inputs with a fixed range.
INPUT_SCALE = "input_scale"

#: Scales per second-level scale in double quantization, bitsandbytes' fixed choice.
NESTED_BLOCK = 256

#: Tried in this order where the default group size does not divide a layer's columns.
FALLBACK_GROUP_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (safetensors' name) and shape of a tensor that will be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Storage:
    """What a format fixes for every weight that it holds.

    ``scale_dtype``: safetensors' name of the dtype of scales; None: that of the model. ``by_rows``: the codes of a row
    lie together, so that a weight can be written row by row. ``lowest_zero_point``: a zero point may be the lowest
    code. ``input_zero_points``: fixed ranges of inputs may be asymmetric.
    """

    scale_dtype: str | None = None
    by_rows: bool = True
    lowest_zero_point: bool = True
    input_zero_points: bool = True


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a checkpoint's headers describe it; no weight has been read.

    ``shares`` names an earlier tensor that is the same memory (tied weights of a torch file).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    shares: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the first dimension (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Elements behind one index of the first dimension."""
        return self.numel // self.rows if self.rows else 0

    @property
    def is_float(self) -> bool:
        """Whether the tensor holds ordinary floating-point values."""
        return self.dtype in FLOAT_DTYPES


@dataclass
class QuantizedTensor:
    """A weight as integer codes, the noun that algorithms and formats share.

    ``real = (code - zero_point) * scale``, or ``codebook[code] * scale`` for nf4.

    - ``codes``: int8 ``[rows, columns]`` in the signed range of the format (nf4: 0..15).
    - ``scale``: float32 ``[rows, groups]``; ``[blocks]`` for block granularity. Already rounded to
      the precision it is stored in, so decoding reproduces exactly what was chosen.
    - ``zero_point``: int8 like ``scale``, or None when symmetric.
    - ``shape``: the weight's own shape; rows are its first dimension.
    - ``input_scale``: float32, a scalar: what the layer's inputs are divided by where their range is fixed, already
      rounded like ``scale``; else None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, ...]
    number_format: NumberFormat = field(repr=False)
    input_scale: Tensor | None = None
