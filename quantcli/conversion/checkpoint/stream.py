"""The engine of `convert`: weights go through in slabs of rows, on worker threads, in bounded memory.

A slab is read, worked on in chunks that fit a core's cache, and written to its final place, whose
offset is known from the headers. What remains in memory of a layer is its scales. Slabs and chunks depend
on shapes alone, so the bytes do not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from quantcli import algorithms
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.conversion.checkpoint.layout import Destination
from quantcli.conversion.checkpoint.writer import (
    CHUNK_ELEMENTS,
    SLAB_ELEMENTS,
    LayerResult,
    ranges,
    row_alignment,
    slabs,
    write_rows,
    write_scales,
    write_slab,
)
from quantcli.core import nf4, numerics
from quantcli.core.dtypes import torch_dtype
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor, Rounding, TensorInfo
from quantcli.errors import InputError
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.ptq.rounding import without_data

#: A share of values lost to zero from which on it is told: some in a million are in every tensor of random numbers.
LOST = 1e-3


@dataclass(frozen=True)
class _SlabResult:
    checksum: int
    signal: float = 0.0
    noise: float = 0.0


def _scale_shape(weights: NumberFormat, shape: tuple[int, int]) -> tuple[int, ...]:
    rows, columns = shape
    kind, size = weights.granularity.kind, weights.granularity.size or 1
    return {
        "tensor": (1, 1),
        "channel": (rows, 1),
        "group": (rows, columns // size),
        "block": (rows * columns // size,),
    }[kind]


class LayerJob:
    """One layer on its way; slabs may come in any order and from any thread.

    A layer whose plan is an algorithm that needs data lies outside the blocks, and gets its codes without.
    """

    def __init__(
        self, layer: LayerPlan, plan: Plan, checkpoint: Checkpoint, destinations: Mapping[str, Destination]
    ) -> None:
        self.layer, self.plan, self.checkpoint, self.destinations = layer, plan, checkpoint, destinations
        self.slabs = slabs(layer)
        self._results: dict[int, _SlabResult] = {}
        self._lock = threading.Lock()
        self._scale = self._zero_point = torch.empty(0)
        self._rounding = Rounding(layer.algorithm or "")
        self._lost = self._meant = 0
        if layer.has_codes:
            self._rounding = without_data(layer, "outside the blocks")

    def run_slab(self, index: int) -> LayerResult | None:
        """Convert one slab; the one that completes the layer also writes its scales and returns the result."""
        start, stop = self.slabs[index]
        result = self._quantize(start, stop) if self.layer.has_codes else self._cast(start, stop)
        with self._lock:
            self._results[index] = result
            if len(self._results) < len(self.slabs):
                return None
        outcome = self._finish()
        self._scale = self._zero_point = torch.empty(0)
        return outcome

    def _reserve_scales(self, weights: NumberFormat) -> None:
        """Allocate the layer's scales at once.

        Small results kept among large temporaries would fragment the heap until it outgrew the model.
        """
        with self._lock:
            if not self._scale.numel():
                shape = _scale_shape(weights, self.layer.matrix_shape)
                self._scale = torch.empty(shape)
                self._zero_point = torch.empty(shape if not weights.symmetric else (0,), dtype=torch.int8)

    def slab_nbytes(self, index: int) -> int:
        """Bytes of the input that a slab covers."""
        start, stop = self.slabs[index]
        rows = self.slabs[-1][1]
        return self.layer.info.nbytes * (stop - start) // rows if rows else self.layer.info.nbytes

    def _cast(self, start: int, stop: int) -> _SlabResult:
        info = self.layer.info
        rows = self.checkpoint.read_rows(info, start, stop)
        stored = rows.to(torch_dtype(self.layer.dtype))
        finite = not info.is_float or numerics.all_finite(stored)
        if not finite and not self._is_mask(rows, stored):
            self._refuse(rows, start)
        changed = finite and stored.dtype != rows.dtype
        signal, noise = _cast_powers(rows, stored) if changed else (0.0, 0.0)
        if stored.dtype == torch.float16 and changed:
            self._count_lost(rows, stored)
        return _SlabResult(write_rows(self.layer, start, stored, self.destinations), signal, noise)

    def _count_lost(self, rows: Tensor, stored: Tensor) -> None:
        """Count values that are too small for fp16, and so become zero."""
        lost, meant = int(((stored == 0) & (rows != 0)).sum()), int((rows != 0).sum())
        with self._lock:
            self._lost, self._meant = self._lost + lost, self._meant + meant

    def _is_mask(self, rows: Tensor, stored: Tensor) -> bool:
        """Whether infinities are meant: a mask holds negative ones and zeros, and a cast must not make new ones."""
        return (
            self.layer.role == "parameter"
            and _holds_only_a_mask(rows)
            and torch.equal(torch.isinf(rows), torch.isinf(stored))
        )

    def _quantize(self, start: int, stop: int) -> _SlabResult:
        scheme = self.layer.scheme
        assert scheme is not None
        weights, dtype = scheme.weights, torch_dtype(self.plan.scale_dtype)
        algorithm = algorithms.rounding(self._rounding.algorithm)
        self._reserve_scales(weights)
        rows = self._matrix(start, stop)
        elements = rows.numel() if weights.granularity.kind == "tensor" else CHUNK_ELEMENTS
        codes = torch.empty(rows.shape, dtype=torch.int8)
        chunks = list(ranges(len(rows), rows.shape[1], elements, row_alignment(self.layer)))
        signal = noise = 0.0
        for first, last in chunks:
            chunk = rows[first:last].float()
            tensor = algorithm.run(chunk, weights, dtype)
            codes[first:last] = tensor.codes
            part = self._scale_rows(start + first, start + last)
            self._scale[part] = tensor.scale
            if tensor.zero_point is not None:
                self._zero_point[part] = tensor.zero_point
            if not weights.double_quantized:
                powers = numerics.error_powers(numerics.in_groups(chunk, weights), tensor)
                signal, noise = signal + powers[0], noise + powers[1]
        # Small codes of a large weight have scales that fit, yet decode to infinity in fp16.
        too_large = dtype == torch.float16 and bool(rows.abs().amax() > torch.finfo(dtype).max)
        if too_large or not bool(torch.isfinite(self._scale[self._scale_rows(start, stop)]).all()):
            self._refuse(rows, start)
        if weights.double_quantized:
            signal, noise = self._nested_powers(rows, codes, chunks)
        return _SlabResult(write_slab(self.layer, start, codes, self.plan, self.destinations), signal, noise)

    def _scale_rows(self, first: int, last: int) -> slice:
        """Where the scales of some rows of the matrix lie."""
        assert self.layer.scheme is not None
        granularity = self.layer.scheme.weights.granularity
        if granularity.kind == "block":
            columns, size = self.layer.matrix_shape[1], granularity.size or 1
            return slice(first * columns // size, last * columns // size)
        return slice(0, 1) if granularity.kind == "tensor" else slice(first, last)

    def _matrix(self, start: int, stop: int) -> Tensor:
        info = self.layer.info
        if self.layer.transposed:
            return self.checkpoint.read_rows(info, 0, info.rows).T.contiguous()
        return self.checkpoint.read_rows(info, start, stop).reshape(stop - start, -1)

    def _nested_powers(self, rows: Tensor, codes: Tensor, chunks: list[tuple[int, int]]) -> tuple[float, float]:
        """Error with the scales as double quantization will give them back; the slab is the whole tensor."""
        assert self.layer.scheme is not None
        weights = self.layer.scheme.weights
        restored = nf4.dequantize_scales(*nf4.quantize_scales(self._scale))
        signal = noise = 0.0
        for first, last in chunks:
            chunk = rows[first:last].float()
            scale = restored[self._scale_rows(first, last)]
            tensor = QuantizedTensor(codes[first:last], scale, None, tuple(chunk.shape), weights)
            powers = numerics.error_powers(numerics.in_groups(chunk, weights), tensor)
            signal, noise = signal + powers[0], noise + powers[1]
        return signal, noise

    def _finish(self) -> LayerResult:
        ordered = [self._results[index] for index in range(len(self.slabs))]
        signal = sum(result.signal for result in ordered)
        noise = sum(result.noise for result in ordered)
        rounding = replace(self._rounding, signal=signal, noise=noise)
        if self._lost > LOST * self._meant:
            rounding = replace(rounding, note="values too small for fp16 become zero (bf16 has the range of fp32)")
        outcome = LayerResult([result.checksum for result in ordered], rounding=rounding)
        if self.layer.has_codes and self.layer.scheme is not None:
            no_codes = torch.empty(0, dtype=torch.int8)
            zero_point = self._zero_point if self._zero_point.numel() else None
            weights, shape = self.layer.scheme.weights, self.layer.matrix_shape
            tensor = QuantizedTensor(no_codes, self._scale, zero_point, shape, weights)
            checksums = write_scales(self.layer, tensor, self.plan, self.destinations)
            outcome.scales_checksum, outcome.others_checksum = checksums
        return outcome

    def _refuse(self, rows: Tensor, first_row: int) -> NoReturn:
        """Raise for values that are not finite, in the weight itself or only once stored."""
        name = self.layer.info.name
        _name_the_bad(name, rows, first_row)
        raise InputError(
            f"{name} has values too large for {self.plan.scale_dtype if self.layer.has_codes else self.layer.dtype}: "
            "they would become infinite.",
            hint="Use bf16, which has the range of fp32 (--scheme bf16, or --rest bf16)."
            if self.plan.scale_dtype == self.plan.dtype
            else f"{self.plan.format} has no other dtype; use another --format, or --skip the layer.",
        )


def require_finite(info: TensorInfo, checkpoint: Checkpoint) -> None:
    """Raise InputError where a weight holds what is no number, with its place."""
    for start, stop in ranges(info.rows, info.columns, SLAB_ELEMENTS, 1):
        rows = checkpoint.read_rows(info, start, stop)
        if not numerics.all_finite(rows) and not _holds_only_a_mask(rows):
            _name_the_bad(info.name, rows, start)


def _holds_only_a_mask(rows: Tensor) -> bool:
    return bool(((rows == 0) | (rows == -torch.inf)).all())


def _name_the_bad(name: str, rows: Tensor, first_row: int) -> None:
    flat = rows.reshape(len(rows), -1) if rows.ndim else rows.reshape(1, 1)
    bad = (~torch.isfinite(flat)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        value = flat[row, column].item()
        raise InputError(
            f"{name} holds {value} at row {first_row + row}, column {column}: the model is damaged or diverged.",
            hint="Repair the weight, or leave it out of the file.",
        )


def _cast_powers(rows: Tensor, stored: Tensor) -> tuple[float, float]:
    """Sums of squares of a tensor and of what a cast changed in it."""
    signal = noise = 0.0
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    pairs = zip(*(torch.split(each.reshape(-1), CHUNK_ELEMENTS) for each in (rows, stored)), strict=True)
    for before, after in pairs:
        reference = before.to(wide)
        difference = after.to(wide, copy=True).sub_(reference)
        signal += numerics.power(reference)
        noise += numerics.power(difference)
    return signal, noise
