"""Quantization with gradients: straight through the rounding, and to the scales (LSQ, arXiv:1902.08153)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantcli.algorithms import rtn
from quantcli.core.numerics import dequantize, in_groups, quantize, stored_scale
from quantcli.core.scheme import Granularity, GranularityKind, NumberFormat
from quantcli.core.tensors import QuantizedTensor

#: Values that are all smaller than this move as if they had this size.
_SMALLEST_MOVE = 1e-2

Restriction = Callable[[Tensor], Tensor]


class FakeQuantize(torch.autograd.Function):
    """Values, shaped as by `numerics.in_groups`, rounded to a grid, with gradients for both values and scales.

    ``scale`` ``[groups]`` and ``zero_point`` are the grid. Values are real ones, or with ``in_steps`` they are in steps
    of the grid, whatever its scale. ``restrict`` may change codes that the runtime could not multiply exactly.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        number_format: NumberFormat,
        in_steps: bool,
        restrict: Restriction | None,
    ) -> Tensor:
        """Rounded values, float32 like ``values``."""
        step = torch.ones_like(scale) if in_steps else scale
        codes = quantize(values, step, zero_point, number_format)
        if restrict is not None:
            codes = restrict(codes)
        ctx.save_for_backward(values, scale, codes)
        ctx.in_steps, ctx.zero_point, ctx.number_format = in_steps, zero_point, number_format
        return dequantize(codes, scale, zero_point, number_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """LSQ, equations 3 and 5: by the value 1 or 0, by the scale ``round(v/s) - v/s``, or the code where cut off.

        What is in steps does not depend on the scale: then the code itself is the slope by it, everywhere.
        """
        (gradient,) = gradients
        values, scale, codes = ctx.saved_tensors
        by_values, by_scale = None, None
        exact = values if ctx.in_steps else values / scale.unsqueeze(-1)
        steps = codes.float() if ctx.zero_point is None else codes - ctx.zero_point.float().unsqueeze(-1)
        inside = (exact - steps).abs_() <= 0.5
        if ctx.needs_input_grad[1]:
            slope = steps if ctx.in_steps else steps.sub_(exact.mul_(inside))
            by_scale = (slope * gradient).sum(-1)
        if ctx.needs_input_grad[0]:
            by_values = gradient * inside
            if ctx.in_steps:
                by_values.mul_(scale.unsqueeze(-1))
        return by_values, by_scale, None, None, None, None


def fake_quantize(
    values: Tensor,
    scale: Tensor,
    number_format: NumberFormat,
    *,
    zero_point: Tensor | None = None,
    in_steps: bool = False,
    restrict: Restriction | None = None,
) -> Tensor:
    """See `FakeQuantize`."""
    rounded: Tensor = FakeQuantize.apply(values, scale, zero_point, number_format, in_steps, restrict)  # type: ignore[no-untyped-call]
    return rounded


class LearnedWeight:
    """A weight and its scales in training: `tensor` is the codes and scales, and `values` what they stand for."""

    def __init__(
        self,
        start: QuantizedTensor,
        scale_dtype: torch.dtype,
        restrict: Restriction | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Begin at codes that were chosen already.

        Args:
            start: codes, scales and zero points; the latter stay.
            scale_dtype: what scales are stored in.
            restrict: what changes codes that the runtime could not multiply exactly.
            device: where it is trained, by default where the codes are.
        """
        start = _moved(start, device or start.codes.device)
        self._start, self._restrict = start, restrict
        self.number_format = start.number_format
        steps = in_groups(start.codes, self.number_format).float()
        if start.zero_point is not None:
            steps -= start.zero_point.float().unsqueeze(-1)
        #: The weight in steps of its grid, shaped as by `in_groups`.
        self.units = steps.contiguous().requires_grad_(True)
        self.scales = LearnedFactors(start.scale, scale_dtype, scales=True, coarse=start.number_format.coarse)

    def values(self) -> Tensor:
        """The weight as it would be stored now, float32 ``[rows, columns]``, with gradients."""
        start = self._start
        rounded = fake_quantize(
            self.units,
            self.scales.values(),
            self.number_format,
            zero_point=start.zero_point,
            in_steps=True,
            restrict=self._restrict,
        )
        return rounded.reshape(start.codes.shape)

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """Codes and scales as they are now."""
        start, scale = self._start, self.scales.values()
        codes = quantize(self.units, torch.ones_like(scale), start.zero_point, self.number_format)
        if self._restrict is not None:
            codes = self._restrict(codes)
        codes = codes.reshape(start.codes.shape)
        return _moved(replace(start, codes=codes, scale=scale), torch.device("cpu"))


def _moved(tensor: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    zero_point = None if tensor.zero_point is None else tensor.zero_point.to(device)
    return replace(tensor, codes=tensor.codes.to(device), scale=tensor.scale.to(device), zero_point=zero_point)


class LearnedRange:
    """A range of activations that is fixed at inference: its scale is learned, its zero point stays."""

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor | None,
        number_format: NumberFormat,
        scale_dtype: torch.dtype,
        largest_scale: float | None = None,
    ) -> None:
        """``scale`` and ``zero_point`` are scalars; the format is per tensor."""
        self._zero_point = None if zero_point is None else zero_point.reshape(1, 1)
        self.number_format, self._largest = number_format, largest_scale
        self.scale = LearnedFactors(scale.reshape(1, 1), scale_dtype, scales=True)

    def values(self) -> Tensor:
        """The scale as it would be stored now, ``[1, 1]``; a limit counts as having slope one."""
        scale = self.scale.values()
        return scale if self._largest is None else scale + (scale.clamp(max=self._largest) - scale).detach()

    def __call__(self, values: Tensor) -> Tensor:
        """Values of any shape, rounded."""
        flat = values.float().reshape(1, 1, -1)
        scale = self.values()
        return fake_quantize(flat, scale, self.number_format, zero_point=self._zero_point).reshape(values.shape)


def dynamic_range(values: Tensor, number_format: NumberFormat) -> Tensor:
    """Activations ``[..., channels]`` rounded as at inference, in ranges that are found there; slope one.

    Symmetric with a scale per token, or asymmetric over the whole tensor, as ONNX's DynamicQuantizeLinear has it.
    """
    kind: GranularityKind = "channel" if number_format.granularity.kind == "token" else "tensor"
    by_rows = NumberFormat(number_format.dtype, Granularity(kind), number_format.symmetric)
    with torch.no_grad():
        rounded = rtn.fake_quantized(values.float().reshape(-1, values.shape[-1]), by_rows).reshape(values.shape)
    return values + (rounded - values).detach()


class LearnedValues:
    """Values that are not quantized and learn, such as biases and norms: rounded to the dtype they are stored in."""

    def __init__(self, start: Tensor, dtype: torch.dtype, *, factors: bool = False) -> None:
        """``factors``: what values are multiplied by, which moves in proportion to each, as norms do."""
        self._start, self._dtype = start.float(), dtype
        rms = self._start.square().mean().sqrt()
        self._unit = self._start.abs() if factors else rms.clamp(min=_SMALLEST_MOVE)
        #: Change in units of the values' own size: of each, or their root mean square.
        self.change = torch.zeros_like(self._start, requires_grad=True)

    def values(self) -> Tensor:
        """The values as they would be stored now, float32, with gradients."""
        exact = self._start + self._unit * self.change
        return exact + (exact.to(self._dtype).float() - exact).detach()


class LearnedFactors:
    """Positive values that are learned as factors of what they start from, and stored in a dtype of their own."""

    def __init__(self, start: Tensor, dtype: torch.dtype, *, scales: bool, coarse: bool = False) -> None:
        """``scales``: values that divide, and so must not be rounded to zero; ``coarse``: see `NumberFormat.coarse`."""
        self._start, self._dtype, self._scales, self._coarse = start, dtype, scales, coarse
        self.factor = torch.ones_like(start, requires_grad=True)

    def values(self) -> Tensor:
        """The values as they will be stored, float32, shaped like the start."""
        exact = self._start * self.factor
        with torch.no_grad():
            if self._scales:
                stored = stored_scale(exact, self._dtype, coarse=self._coarse)
            else:
                stored = exact.to(self._dtype).float()
        return exact + (stored - exact).detach()
