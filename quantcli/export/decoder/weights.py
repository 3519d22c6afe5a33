"""The weights of a decoder, one at a time: codes as the n-bit operators hold them, or values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.quantized import QuantizedCheckpoint
from quantcli.core.scheme import Scheme
from quantcli.errors import InputError
from quantcli.formats.onnx import SMALLEST_BLOCK, encode_codes

if TYPE_CHECKING:
    from torch import Tensor

#: The blocks that kernels of MatMulNBits take: powers of two up to this.
LARGEST_BLOCK = 256
#: The block that a head with one scale for a row has, where rows are filled up to whole blocks. One row times
#: 49152 x 576 in 8 bits took 0.92 to 0.94 of the time of blocks of 64, the longest that divide 576.
HEAD_BLOCK = 128
#: By how much of its codes a head may be filled up for that.
_FILLED = 1 / 8


@dataclass(frozen=True)
class Blocks:
    """How codes of a matrix ``shape``, rows and columns, lie in blocks of so many columns; zeros fill up the last."""

    shape: tuple[int, int]
    bits: int
    block: int

    @property
    def stored(self) -> int:
        """Columns of a row as it lies, whole blocks."""
        return -(-self.shape[1] // self.block) * self.block


@dataclass(frozen=True)
class NbitsMatrix:
    """A matrix ``[rows, columns]`` as codes.

    ``codes`` uint8 ``[rows, stored columns * bits / 8]``, ``scales`` float32 ``[rows, blocks]``, ``zero_points`` uint8
    ``[rows, ceil(blocks * bits / 8)]`` or None where they are in the middle.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    bits: int
    block: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.codes), self.columns

    @property
    def blocks(self) -> Blocks:
        """How its codes lie."""
        return Blocks(self.shape, self.bits, self.block)

    def rows(self, start: int, stop: int) -> NbitsMatrix:
        """Some of its rows."""
        points = None if self.zero_points is None else self.zero_points[start:stop]
        codes, scales = self.codes[start:stop], self.scales[start:stop]
        return NbitsMatrix(codes, scales, points, self.bits, self.block, self.columns)


Matrix = NbitsMatrix | np.ndarray


class DecoderWeights:
    """What a graph is built of: a checkpoint, whose quantized weights, if any, are codes. Nothing is kept."""

    def __init__(self, checkpoint: Checkpoint, quantized: QuantizedCheckpoint | None) -> None:
        """Take a checkpoint; ``quantized`` are the codes in it.

        Raises:
            InputError: a code is of a kind that MatMulNBits does not hold.
        """
        self._quantized = quantized
        self._infos = {info.name: info for info in checkpoint.infos()}
        self._checkpoint = checkpoint
        for name, reason in ((name, _reason(scheme)) for name, scheme in self.schemes.items()):
            if reason:
                raise InputError(
                    f"{name} cannot become ONNX with equal codes: {reason}.",
                    "Start from the original weights, or turn the codes into values first (--scheme bf16).",
                )

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of every quantized weight."""
        return {name: weight.scheme for name, weight in self._quantized.weights.items()} if self._quantized else {}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._infos or name in self.schemes

    def vector(self, name: str) -> np.ndarray:
        """A tensor of one dimension, float32."""
        return _array(self._load(name).float())

    def matrix(self, name: str, *, fill: bool = False) -> Matrix:
        """A weight, as codes or in float32 (float16 where it is stored so). Raises InputError where it is missing.

        ``fill``: rows with one scale may be filled up to whole blocks of `HEAD_BLOCK`.
        """
        if name in self.schemes:
            assert self._quantized is not None
            return _packed(self._quantized, name, fill=fill)
        import torch

        stored = self._load(name)
        return _array(stored if stored.dtype == torch.float16 else stored.float())

    def joined(self, names: Sequence[str]) -> list[Matrix]:
        """Several weights of one input: joined by rows where one operator can hold all of them."""
        matrices = [self.matrix(name) for name in names]
        first, *others = matrices
        if isinstance(first, np.ndarray):
            same = all(isinstance(each, np.ndarray) and each.dtype == first.dtype for each in others)
            return [np.concatenate(matrices)] if same else matrices  # type: ignore[arg-type]
        alike = [each for each in matrices if isinstance(each, NbitsMatrix) and _kind(each) == _kind(first)]
        if len(alike) < len(matrices):
            return matrices
        points = [each.zero_points for each in alike if each.zero_points is not None]
        codes, scales = np.concatenate([each.codes for each in alike]), np.concatenate([each.scales for each in alike])
        joined_points = np.concatenate(points) if points else None
        return [NbitsMatrix(codes, scales, joined_points, first.bits, first.block, first.columns)]

    def _load(self, name: str) -> Tensor:
        info = self._infos.get(name)
        if info is None:
            raise InputError(f"{self._checkpoint.path} lacks {name}, which its configuration needs.")
        return self._checkpoint.read_rows(info, 0, info.rows)


def _kind(matrix: NbitsMatrix) -> tuple[int, int, bool]:
    return matrix.bits, matrix.block, matrix.zero_points is None


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.contiguous().numpy()
    return array


def _reason(scheme: Scheme) -> str | None:
    """Why MatMulNBits cannot hold a weight, or None."""
    weights, size = scheme.weights, scheme.weights.granularity.size
    if scheme.inputs is not None:
        return "its inputs are quantized as well"
    if weights.dtype not in ("int4", "int8"):
        return f"it is {weights.dtype}, and MatMulNBits holds integers"
    if size is not None and size & -size < SMALLEST_BLOCK:
        return f"no block of {SMALLEST_BLOCK} columns or more divides its groups of {size}"
    return None


def filled_block(columns: int) -> int | None:
    """The block of a head whose rows are filled up; None where blocks divide them, or filling costs too much."""
    stored = -(-columns // HEAD_BLOCK) * HEAD_BLOCK
    return HEAD_BLOCK if 0 < stored - columns <= columns * _FILLED else None


def _packed(quantized: QuantizedCheckpoint, name: str, *, fill: bool) -> NbitsMatrix:
    """A weight's codes, with a scale for each block of the operator. Raises InputError where no block divides it."""
    tensor, scheme = quantized.tensor(name), quantized.weights[name].scheme
    rows, columns = tensor.shape
    group = scheme.weights.granularity.size or columns
    block = min(group & -group, LARGEST_BLOCK)
    filled = filled_block(columns) if fill and group == columns and tensor.zero_point is None else None
    if filled is None and block < SMALLEST_BLOCK:
        raise InputError(f"{name} has {columns} columns, and MatMulNBits has blocks of {SMALLEST_BLOCK} or more.")
    codes = tensor.codes
    if filled is not None:
        import torch

        block = filled
        codes = torch.nn.functional.pad(codes, (0, -columns % block))
    # A row with one scale may end within a block.
    repeats = -(-group // block)

    def spread(values: Tensor) -> Tensor:
        return values.expand(rows, -1).repeat_interleave(repeats, 1)

    points = None if tensor.zero_point is None else _array(encode_codes(spread(tensor.zero_point), scheme))
    scales = _array(spread(tensor.scale).float())
    return NbitsMatrix(_array(encode_codes(codes, scheme)), scales, points, scheme.weights.bits, block, columns)
