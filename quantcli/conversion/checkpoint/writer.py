"""The writer: codes, scales and values go to their places in the output, and are read back where a run is continued."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.positional import tensor_bytes
from quantcli.checkpoint.roles import module_of
from quantcli.conversion.checkpoint.layout import Destination
from quantcli.conversion.staging import Staging
from quantcli.core import nf4, numerics
from quantcli.core.dtypes import torch_dtype
from quantcli.core.scheme import INPUT_SCALE, Scheme
from quantcli.core.tensors import QuantizedTensor, RoundedTensor, Rounding
from quantcli.errors import InputError
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.system.progress import Fractions, Tracker, say

#: Elements worked on at a time: as float32 they fill a 1 MiB cache.
CHUNK_ELEMENTS = 1 << 18
#: Elements read and written at a time.
SLAB_ELEMENTS = 1 << 20


@dataclass
class Output:
    """An output under way: where its tensors go, which of them are done, and who is told how far the work is.

    ``results``: of tensors that are done. ``workers``: threads to work on. ``tick`` is called with the fraction that
    is done of the work that is not streamed.
    """

    staging: Staging
    destinations: Mapping[str, Destination]
    results: dict[str, LayerResult]
    workers: int
    tracker: Tracker
    tick: Fractions
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def record(self, name: str, result: LayerResult) -> None:
        """A tensor is done, with all that belongs to it written; from any thread."""
        with self._lock:
            self.staging.record({"name": name, **result.to_json()})
            self.results[name] = result

    def say(self, text: str) -> None:
        """Tell in words how it goes."""
        say(self.tracker.progress, text)


@dataclass
class LayerResult:
    """What is known of a finished tensor: checksums of what was meant, and how its codes came about.

    ``checksums``: one per slab, of the codes (int8), or of the stored bytes of a copy or cast.
    ``scales_checksum``: of scale and zero point, as decoding gives them. ``others_checksum``: of all that is
    stored beside the codes. A cast's ``rounding`` has its signal and noise.
    """

    checksums: list[int]
    scales_checksum: int = 0
    others_checksum: int = 0
    rounding: Rounding = field(default_factory=lambda: Rounding(""))

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        rounding = self.rounding
        powers = {"signal": rounding.signal, "noise": rounding.noise}
        named = {"algorithm": rounding.algorithm, "note": rounding.note or "", "tokens": rounding.tokens}
        return {name: getattr(self, name) for name in _CHECKSUMS} | powers | named

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LayerResult:
        """Inverse of `to_json`."""
        named = (record["algorithm"], record["note"] or None)
        rounding = Rounding(*named, record["signal"], record["noise"], record["tokens"])
        return cls(**{name: record[name] for name in _CHECKSUMS}, rounding=rounding)


_CHECKSUMS = ("checksums", "scales_checksum", "others_checksum")


def write_codes(
    layer: LayerPlan, rounded: RoundedTensor, plan: Plan, destinations: Mapping[str, Destination]
) -> LayerResult:
    """Write a layer's codes and scales. Raises InputError where a scale is not finite."""
    tensor = rounded.tensor
    if not numerics.all_finite(tensor.scale):
        raise InputError(
            f"{layer.info.name} has values too large for scales in {plan.scale_dtype}.", "Use --rest bf16."
        )
    checksums = [write_slab(layer, start, tensor.codes[start:stop], plan, destinations) for start, stop in slabs(layer)]
    return LayerResult(checksums, *write_scales(layer, tensor, plan, destinations), rounded.rounding)


def write_slab(layer: LayerPlan, start: int, codes: Tensor, plan: Plan, destinations: Mapping[str, Destination]) -> int:
    """Write the codes, int8 ``[rows, columns]``, of a layer's rows from ``start`` on; returns their checksum."""
    assert layer.scheme is not None
    form = formats.quantized_format(plan.format)
    destination = destinations[form.codes_name(layer.info.name, layer.scheme)]
    _write(destination, form.codes_offset(start, codes.shape[1], layer.scheme), form.encode_codes(codes, layer.scheme))
    return numerics.checksum(codes)


def write_scales(
    layer: LayerPlan, tensor: QuantizedTensor, plan: Plan, destinations: Mapping[str, Destination]
) -> tuple[int, int]:
    """Write everything of a layer but its codes; returns checksums of scales and zero points, and of all as stored."""
    assert layer.scheme is not None
    form, scale = formats.quantized_format(plan.format), tensor.scale
    others = form.encode_scales(layer.info.name, tensor, layer.scheme, plan.scale_dtype)
    for name, part in others.items():
        _write(destinations[name], 0, part)
    if layer.scheme.weights.double_quantized:
        scale = nf4.dequantize_scales(*nf4.quantize_scales(scale))
    return scales_checksum(scale, tensor.zero_point), others_checksum(others)


def write_values(layer: LayerPlan, values: Tensor, destinations: Mapping[str, Destination]) -> LayerResult:
    """Write a tensor that is not quantized, float32 ``values``, in its planned dtype.

    Raises InputError where a value does not fit that dtype.
    """
    stored = values.reshape(layer.info.shape).to(torch_dtype(layer.dtype))
    if not numerics.all_finite(stored):
        raise InputError(f"{layer.info.name} has values too large for {layer.dtype}.", "Use --rest bf16.")
    parts = [(start, stored[start:stop] if stored.ndim else stored) for start, stop in slabs(layer)]
    return LayerResult([write_rows(layer, start, part, destinations) for start, part in parts])


def write_rows(layer: LayerPlan, start: int, stored: Tensor, destinations: Mapping[str, Destination]) -> int:
    """Write rows of a tensor that is not quantized, as they are stored, from ``start`` on; returns their checksum."""
    width = stored.nbytes // len(stored) if start else 0
    _write(destinations[layer.info.name], start * width, stored)
    return numerics.checksum(stored)


def read_codes(layer: LayerPlan, plan: Plan, artifact: Checkpoint) -> QuantizedTensor:
    """What `write_codes` wrote."""
    scheme = layer.scheme
    assert scheme is not None
    form, shape = formats.quantized_format(plan.format), layer.matrix_shape
    stored = artifact.load(form.codes_name(layer.info.name, scheme))
    scale, zero_point = form.decode_scales(layer.info.name, shape, scheme, artifact.load)
    codes = form.decode_codes(stored, shape[1], scheme)
    inputs = artifact.load(f"{module_of(layer.info.name)}.{INPUT_SCALE}").float() if scheme.is_static else None
    return QuantizedTensor(codes, scale, zero_point, shape, scheme.weights, inputs)


def _write(destination: Destination, offset: int, tensor: Tensor) -> None:
    destination.file.write(destination.offset + offset, tensor_bytes(tensor))


def whole_tensor(layer: LayerPlan) -> bool:
    """Whether a layer cannot be worked on by rows: one scale for all, scales of scales, or transposed codes."""
    if not layer.has_codes or layer.scheme is None:
        return False
    weights = layer.scheme.weights
    return weights.granularity.kind == "tensor" or weights.double_quantized or layer.transposed or not layer.by_rows


def slabs(layer: LayerPlan) -> list[tuple[int, int]]:
    """Row ranges of the matrix that are read and written at a time."""
    rows, columns = layer.matrix_shape if layer.has_codes else (layer.info.rows, layer.info.columns)
    if whole_tensor(layer) or not layer.info.numel:
        return [(0, rows)]
    return list(ranges(rows, columns, SLAB_ELEMENTS, row_alignment(layer)))


def row_alignment(layer: LayerPlan) -> int:
    """Rows must come in multiples of this, so that no block of scales is cut."""
    if layer.scheme is None or layer.scheme.weights.granularity.kind != "block":
        return 1
    size = layer.scheme.weights.granularity.size or 1
    return size // gcd(size, layer.matrix_shape[1])


def ranges(rows: int, columns: int, elements: int, alignment: int) -> Iterator[tuple[int, int]]:
    """Pieces of some rows with about so many elements each, whose limits are multiples of ``alignment``."""
    step = max(1, elements // max(1, columns) // alignment) * alignment
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def scales_checksum(scale: Tensor, zero_point: Tensor | None) -> int:
    """Checksum of scale (float32) and zero point (int8)."""
    own = numerics.checksum(scale)
    return own if zero_point is None else own ^ numerics.checksum(zero_point)


def others_checksum(parts: Mapping[str, Tensor]) -> int:
    """Checksum of several tensors as they are stored."""
    stored = (parts[name].contiguous().reshape(-1).view(torch.uint8) for name in sorted(parts))
    return numerics.checksum(torch.cat(list(stored)))


def working_set_bytes(layer: LayerPlan) -> int:
    """Memory one worker needs for a slab of this layer, at the most."""
    largest = max((stop - start for start, stop in slabs(layer)), default=0)
    columns = layer.matrix_shape[1] if layer.has_codes else layer.info.columns
    elements = largest * columns
    source = elements * (layer.info.nbytes // max(1, layer.info.numel))
    if not layer.has_codes:
        return 2 * source + 16 * min(elements, CHUNK_ELEMENTS)
    chunk = elements if _one_scale(layer.scheme) else min(elements, CHUNK_ELEMENTS)
    return source * (2 if layer.transposed else 1) + 3 * elements + 20 * chunk


def _one_scale(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.weights.granularity.kind == "tensor"
