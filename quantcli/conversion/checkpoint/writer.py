"""Writing what was worked out for a whole layer to its place, and reading it back where a run is continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.positional import tensor_bytes
from quantcli.checkpoint.roles import module_of
from quantcli.conversion.checkpoint.layout import Destination
from quantcli.core import numerics
from quantcli.core.dtypes import torch_dtype
from quantcli.core.scheme import INPUT_SCALE, Scheme
from quantcli.core.tensors import QuantizedTensor
from quantcli.errors import InputError
from quantcli.planning.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Output:
    """An output under way, for what works its tensors out by itself.

    ``folder``: its files, which exist at their full size. ``scratch``: a folder for what does not fit into memory.
    ``destinations``: where each tensor goes. ``results``: of tensors that are done. ``record`` is called with each
    tensor that is done, once all that belongs to it is written; ``tick`` with the fraction that is done, and
    ``say`` with words of how it goes.
    """

    folder: Path
    scratch: Path
    destinations: Mapping[str, Destination]
    results: Mapping[str, LayerResult]
    record: Callable[[str, LayerResult], None]
    tick: Callable[[float], None]
    say: Callable[[str], None] = lambda _: None


def place_codes(
    layer: LayerPlan, tensor: QuantizedTensor, plan: Plan, destinations: Mapping[str, Destination]
) -> LayerResult:
    """Write a layer's codes and scales. Raises InputError where a scale is not finite."""
    scheme = layer.scheme
    assert scheme is not None
    form, name = formats.quantized_format(plan.format), layer.info.name
    if not bool(torch.isfinite(tensor.scale).all()):
        raise InputError(f"{name} has values too large for scales in {plan.scale_dtype}.", "Use --rest bf16.")
    result = LayerResult()
    for start, stop in slabs(layer):
        codes = tensor.codes[start:stop]
        _write(
            destinations[form.codes_name(name, scheme)],
            form.codes_offset(start, codes.shape[1], scheme),
            form.encode_codes(codes, scheme),
        )
        result.checksums.append(numerics.checksum(codes))
    return place_scales(layer, tensor, plan, destinations, result)


def place_scales(
    layer: LayerPlan,
    tensor: QuantizedTensor,
    plan: Plan,
    destinations: Mapping[str, Destination],
    result: LayerResult,
) -> LayerResult:
    """Write everything of a layer but its codes, and note it in ``result``, which is returned."""
    assert layer.scheme is not None
    form = formats.quantized_format(plan.format)
    others = form.encode_scales(layer.info.name, tensor, layer.scheme, plan.scale_dtype)
    for name, part in others.items():
        _write(destinations[name], 0, part)
    result.scales_checksum = scales_checksum(tensor.scale, tensor.zero_point)
    result.others_checksum = others_checksum(others)
    return result


def place_values(layer: LayerPlan, values: Tensor, destinations: Mapping[str, Destination]) -> LayerResult:
    """Write a tensor that is not quantized, float32 ``values``, in its planned dtype.

    Raises InputError where a value does not fit that dtype.
    """
    stored = values.reshape(layer.info.shape).to(torch_dtype(layer.dtype))
    if not bool(torch.isfinite(stored).all()):
        raise InputError(f"{layer.info.name} has values too large for {layer.dtype}.", "Use --rest bf16.")
    _write(destinations[layer.info.name], 0, stored)
    rows = [stored[start:stop] if stored.ndim else stored for start, stop in slabs(layer)]
    return LayerResult([numerics.checksum(part) for part in rows])


def read_codes(layer: LayerPlan, plan: Plan, artifact: Checkpoint) -> QuantizedTensor:
    """What `place_codes` wrote."""
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


#: Elements worked on at a time: as float32 they fill a 1 MiB cache.
CHUNK_ELEMENTS = 1 << 18
#: Elements read and written at a time.
SLAB_ELEMENTS = 1 << 20


@dataclass
class LayerResult:
    """What is known of a finished layer: checksums of what was meant, and the error that it costs.

    ``checksums``: one per slab, of the codes (int8), or of the stored bytes of a copy or cast.
    ``scales_checksum``: of scale and zero point, as decoding gives them. ``others_checksum``: of all that is
    stored beside the codes. ``signal`` and ``noise`` are sums of squares of the weight and of its error.
    """

    checksums: list[int] = field(default_factory=list)
    scales_checksum: int = 0
    others_checksum: int = 0
    signal: float = 0.0
    noise: float = 0.0
    algorithm: str = ""
    note: str = ""

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise; None where nothing was lost."""
        return numerics.decibels(self.signal, self.noise)

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LayerResult:
        """Inverse of `to_json`."""
        return cls(**{each.name: record[each.name] for each in fields(cls)})


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
