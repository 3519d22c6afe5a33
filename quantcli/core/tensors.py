"""The nouns that readers, algorithms and formats share: a tensor's header, and a quantized tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log10, prod
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.core.dtypes import DTYPE_BYTES, FLOAT_DTYPES
from quantcli.core.scheme import NumberFormat

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hessian:
    """Sums of x x^T of a layer's inputs, float32 ``[groups, columns, columns]``, and gptq's damping."""

    values: Tensor
    damping: float = 0.01


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
class TensorInfo:
    """One tensor as a checkpoint's headers describe it; no weight has been read.

    ``shares`` names an earlier tensor that is the same memory (tied weights of a torch file). ``decoded``: its values
    are made of codes, so that no author chose its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    shares: str | None = None
    decoded: bool = False

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

    def on_cpu(self, rows: slice = slice(None), shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        """The tensor, or some rows of a matrix as a tensor of its own, in main memory."""
        scale = self.scale if len(self.scale) == 1 else self.scale[rows]
        zero_point = None if self.zero_point is None else self.zero_point[rows].cpu()
        return QuantizedTensor(self.codes[rows].cpu(), scale.cpu(), zero_point, shape or self.shape, self.number_format)


@dataclass(frozen=True)
class Rounding:
    """How a weight's codes came about, and at what cost.

    - ``algorithm``: what chose the codes in the end.
    - ``note``: what is to be said of that, such as "rtn in place of gptq: ...".
    - ``signal``, ``noise``: sums of squares of the weight, and of its error.
    - ``tokens``: of an expert's layer, how many tokens of the data were sent to it; None: they were not counted.
    """

    algorithm: str
    note: str | None = None
    signal: float = 0.0
    noise: float = 0.0
    tokens: int | None = None

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise; None where nothing was lost, or nothing was measured."""
        if self.signal <= 0 or self.noise <= 0:
            return None
        return 10 * log10(self.signal / self.noise)


@dataclass(frozen=True)
class RoundedTensor:
    """A quantized weight, and how its codes came about."""

    tensor: QuantizedTensor
    rounding: Rounding
