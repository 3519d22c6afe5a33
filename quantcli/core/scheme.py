"""The vocabulary every other module shares: number formats, schemes, tensors and their quantized form.

Nothing here imports torch, so that headers can be inspected in a tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from quantcli.core.dtypes import BITS, CASTS

GranularityKind = Literal["tensor", "channel", "group", "block", "token"]


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
    ``coarse``: scales have so few digits that a scale times any number of codes' steps is a number of their dtype, too.
    """

    dtype: str
    granularity: Granularity = Granularity("tensor")
    symmetric: bool = True
    dynamic: bool = False
    double_quantized: bool = False
    narrow: bool = False
    raised: bool = False
    coarse: bool = False

    @property
    def bits(self) -> int:
        """Bits per stored value, scales not counted."""
        return BITS[self.dtype]

    @property
    def is_cast(self) -> bool:
        """Whether values are only cast, without a scale."""
        return self.dtype in CASTS

    @property
    def is_grouped(self) -> bool:
        """Whether a number of values that can be chosen share a scale."""
        return self.granularity.kind in ("group", "block")

    @property
    def in_rows(self) -> NumberFormat:
        """The same with blocks as groups of a row, which they are where their size divides the columns."""
        if self.granularity.kind != "block":
            return self
        return replace(self, granularity=Granularity("group", self.granularity.size))

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
    """How a layer's weights, and optionally its inputs, are quantized. ``help`` is a preset's line in lists of them.

    ``unpacked``: 8-bit codes take a byte each and the weight's own name, where a container has another form as well.
    """

    weights: NumberFormat
    inputs: NumberFormat | None = None
    unpacked: bool = False
    help: str = field(default="", compare=False, repr=False)

    @property
    def is_static(self) -> bool:
        """Whether inputs are quantized in ranges that are fixed beforehand."""
        return self.inputs is not None and not self.inputs.dynamic

    def with_group_size(self, size: int) -> Scheme:
        """The same scheme with groups (or blocks) of ``size`` values."""
        granularity = Granularity(self.weights.granularity.kind, size)
        return replace(self, weights=replace(self.weights, granularity=granularity))

    def with_groups_of(self, size: int) -> Scheme:
        """The same scheme with a scale for every ``size`` values of a row, whatever had one before."""
        return replace(self, weights=replace(self.weights, granularity=Granularity("group", size)))

    def __str__(self) -> str:
        if self.inputs is None:
            return str(self.weights)
        return f"{self.weights} | inputs {self.inputs}"


_CHANNEL = Granularity("channel")
_INT8 = NumberFormat("int8", _CHANNEL)
_NF4 = NumberFormat("nf4", Granularity("block", 64))

#: The schemes the command line knows by name. Another one is another row.
PRESETS: dict[str, Scheme] = {
    "fp16": Scheme(NumberFormat("fp16"), help="cast to half precision"),
    "bf16": Scheme(NumberFormat("bf16"), help="cast to 16 bits with the range of float32"),
    "int8": Scheme(_INT8, help="8-bit weights, a scale per output"),
    "int4": Scheme(NumberFormat("int4", Granularity("group", 128)), help="4-bit weights, a scale per 128 of a row"),
    "nf4": Scheme(_NF4, help="4-bit weights on QLoRA's uneven grid, a scale per 64"),
    "nf4-double": Scheme(replace(_NF4, double_quantized=True), help="nf4 whose scales are quantized as well"),
    "int8-dynamic": Scheme(
        _INT8,
        NumberFormat("int8", Granularity("token"), dynamic=True),
        help="8-bit weights and inputs, ranges of inputs found at inference",
    ),
    "int8-static": Scheme(
        _INT8, NumberFormat("int8", symmetric=False), help="8-bit weights and inputs, ranges of inputs from your data"
    ),
}

#: The parameter of a layer, beside its weight, that holds the scale of inputs with a fixed range.
INPUT_SCALE = "input_scale"

#: Scales per second-level scale in double quantization, bitsandbytes' fixed choice.
NESTED_BLOCK = 256

#: Tried in this order where the default group size does not divide a layer's columns.
FALLBACK_GROUP_SIZES = (128, 64, 32, 16)
