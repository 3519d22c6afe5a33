"""Writing what was worked out for a whole layer to its place, and reading it back where a run is continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantcli import numerics, plugins
from quantcli.artifact import Destination
from quantcli.checkpoints.folder import Checkpoint
from quantcli.checkpoints.positional import tensor_bytes
from quantcli.errors import InputError
from quantcli.numerics import TORCH_DTYPES
from quantcli.plan import LayerPlan, Plan
from quantcli.roles import module_of
from quantcli.scheme import INPUT_SCALE, QuantizedTensor
from quantcli.streaming import LayerResult, others_checksum, scales_checksum, slabs


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
    form, name = plugins.coded_format(plan.format), layer.info.name
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
    form = plugins.coded_format(plan.format)
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
    stored = values.reshape(layer.info.shape).to(TORCH_DTYPES[layer.dtype])
    if not bool(torch.isfinite(stored).all()):
        raise InputError(f"{layer.info.name} has values too large for {layer.dtype}.", "Use --rest bf16.")
    _write(destinations[layer.info.name], 0, stored)
    rows = [stored[start:stop] if stored.ndim else stored for start, stop in slabs(layer)]
    return LayerResult([numerics.checksum(part) for part in rows])


def read_codes(layer: LayerPlan, plan: Plan, artifact: Checkpoint) -> QuantizedTensor:
    """What `place_codes` wrote."""
    scheme = layer.scheme
    assert scheme is not None
    form, shape = plugins.coded_format(plan.format), layer.matrix_shape
    stored = artifact.load(form.codes_name(layer.info.name, scheme))
    scale, zero_point = form.decode_scales(layer.info.name, shape, scheme, artifact.load)
    codes = form.decode_codes(stored, shape[1], scheme)
    inputs = artifact.load(f"{module_of(layer.info.name)}.{INPUT_SCALE}").float() if scheme.is_static else None
    return QuantizedTensor(codes, scale, zero_point, shape, scheme.weights, inputs)


def _write(destination: Destination, offset: int, tensor: Tensor) -> None:
    destination.file.write(destination.offset + offset, tensor_bytes(tensor))
