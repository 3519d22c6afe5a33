"""Codes of a node's constant weight: int8, one scale per output channel, for the integer kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quantcli import algorithms
from quantcli.algorithms import default_rounding
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import Hessian, QuantizedTensor, Rounding
from quantcli.onnx.graph.operands import channel_axis
from quantcli.onnx.graph.values import add_initializer, array, free_name
from quantcli.onnx.plan.evidence import Journal, Made
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.weights.compensation import compensate
from quantcli.onnx.weights.saturation import exact_scale, pairing, within_pairs

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

#: Values that are rounded at a time, where each channel is rounded by itself.
_SLAB_ELEMENTS = 1 << 20

#: Key of the `meta` of codes under which is kept what they are the codes of.
ORIGIN = "quantcli.origin"


@dataclass(frozen=True)
class Origin:
    """What some codes in a graph were made from: the weight called ``name``, whose dimension ``axis`` is its channels.

    What was quantized is ``factor`` times the weight. ``number_format`` is that of the codes; ``pairs`` tells how a
    kernel that cannot multiply all of them exactly takes them: as a ``matrix``, as a ``filter``, or None if it can.
    ``shape`` is that of the weight with its channels in front; the codes of a matrix can be ``turned``.
    """

    name: str
    number_format: NumberFormat
    axis: int
    shape: tuple[int, ...]
    pairs: str | None = None
    factor: float = 1.0
    turned: bool = False

    @property
    def codes_axis(self) -> int:
        """The dimension of the codes that is the channels."""
        return 1 - self.axis if self.turned else self.axis

    def restricted(self, codes: Tensor) -> Tensor:
        """Codes, int8 of any shape, that such a kernel multiplies exactly."""
        import torch

        if self.pairs is None:
            return codes
        within = within_pairs(self.pairs, codes.cpu().numpy().reshape(self.shape))
        return torch.from_numpy(within).reshape(codes.shape).to(codes.device)


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as the graph holds it now.

    ``codes`` int8 of the weight's own shape; ``scale`` float32 and ``zero_point`` int8 ``[channels]``, or
    scalars; for products of floats no ``zero_point``, and a ``scale`` of the weight's own dimensions, all but the
    channels one; ``axis`` the dimension of the channels; ``scales`` the scale's values, ``[channels]`` or ``[1]``;
    ``narrowed`` the number of channels whose scale grew so that nothing saturates (see `exact_scale`).
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    axis: int
    scales: np.ndarray
    narrowed: int
    rounding: Rounding
    bits: int = 8

    @property
    def parts(self) -> list[ir.Value]:
        """The constants that stand for the weight."""
        return [value for value in (self.codes, self.scale, self.zero_point) if value is not None]

    @property
    def channels(self) -> int:
        """Number of output channels, whether or not each has its own scale."""
        assert self.codes.const_value is not None
        return int(self.codes.const_value.shape.numpy()[self.axis])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        nbytes = sum(value.const_value.nbytes for value in self.parts if value.const_value is not None)
        # Four-bit codes are bytes only until the graph is written, see `quantcli.onnx.rewrite.four_bit_storage`.
        return nbytes if self.bits == 8 else nbytes - self.codes.const_value.nbytes // 2  # type: ignore[union-attr]

    def decoded(self) -> np.ndarray:
        """What the codes stand for, float32 of the weight's own shape."""
        assert self.codes.const_value is not None
        codes = self.codes.const_value.numpy()
        along = [-1 if axis == self.axis else 1 for axis in range(codes.ndim)]
        values: np.ndarray = codes.astype(np.float32) * self.scales.reshape(along)
        return values

    def outcome(self, layer: NodePlan) -> LayerOutcome:
        """What became of a layer that reads it in products of integers."""
        narrowed = None
        if self.narrowed:
            narrowed = f"{self.narrowed} of {max(len(self.scales), 1)} channels narrowed: no product can saturate"
        return LayerOutcome.quantized(layer, self.nbytes, self.rounding, narrowed, self.decoded)


def integer_weight(
    graph: ir.Graph,
    node: ir.Node,
    number_format: NumberFormat,
    algorithm: str,
    *,
    floats: bool = False,
    smallest_scale: np.ndarray | None = None,
    hessian: Hessian | None = None,
    journal: Journal | None = None,
) -> IntegerWeight:
    """Quantize a node's weight and register codes and scales beside it.

    Args:
        graph: where the new constants go.
        node: Conv, ConvTranspose, Gemm or MatMul with a constant float weight.
        number_format: int8, symmetric, per channel or per tensor; codes are within -127..127.
        algorithm: plug-in that chooses the scales.
        floats: whether floats are made of the codes before a product is taken: no scale is widened as `exact_scale`
            says, which is for sums of integers.
        smallest_scale: float32 ``[channels]``, or ``[1]`` for all of them, that scales must not go below, or None.
        hessian: of the node's input, which gptq needs.
        journal: where codes that come of the weight alone are noted.
    """
    value = node.inputs[1]
    weight = array(value)
    assert value is not None and weight is not None
    axis = channel_axis(node)
    channels = np.moveaxis(weight, axis, 0)
    number_format = replace(number_format, narrow=True)
    kind = None if floats else pairing(node, channels)
    make = partial(_rounded, channels, number_format, algorithm, kind, axis, floats, smallest_scale, hessian)
    if journal is None or hessian is not None or smallest_scale is not None:
        made = make()
    else:
        made = journal.of(f"{value.name} {number_format} {algorithm} {kind} {axis} {floats}", make)
    shape, scales = channels.shape, made.array("scales")
    del weight, channels, make
    # A single scale is written as a scalar: one entry of a list would have to match the channels.
    stored = scales if len(scales) > 1 else scales.reshape(())
    if floats:
        stored = scales.reshape([-1 if each == axis else 1 for each in range(len(shape))])

    def register(part: str, values: np.ndarray | ir.TensorProtocol) -> ir.Value:
        return add_initializer(graph, free_name(graph, f"{value.name}_{part}"), values)

    stored_codes = register("quantized", made.tensors["codes"])
    stored_codes.meta[ORIGIN] = Origin(value.name or "", number_format, axis, tuple(shape), kind)
    return IntegerWeight(
        stored_codes,
        register("scale", stored),
        # Zeros, and yet an integer kernel must have them: without them the runtime does not fuse Gemm.
        None if floats else register("zero_point", np.zeros(stored.shape, dtype=np.int8)),
        axis,
        scales,
        made.narrowed,
        made.rounding,
        number_format.bits,
    )


def _rounded(
    channels: np.ndarray,
    number_format: NumberFormat,
    algorithm: str,
    kind: str | None,
    axis: int,
    floats: bool,
    smallest_scale: np.ndarray | None,
    hessian: Hessian | None,
) -> Made:
    """Codes in the shape that the weight ``[channels, ...]`` has with its channels in dimension ``axis``, and scales.

    Slab by slab is taken of it where each channel is rounded by itself. ``kind`` is how a kernel pairs the weights;
    the rest is as of `integer_weight`.
    """
    count, inner = channels.shape[0], max(1, channels[:1].size)
    together = hessian is not None or number_format.granularity.kind == "tensor"
    step = count if together else max(1, _SLAB_ELEMENTS // inner)
    codes = np.empty(np.moveaxis(channels, 0, axis).shape, np.int8)
    into, scales, narrowed = np.moveaxis(codes, axis, 0), [], 0
    rounding = Rounding(algorithm)
    signal = noise = 0.0
    if smallest_scale is not None and len(smallest_scale) == 1:
        smallest_scale = np.broadcast_to(smallest_scale, count)
    for start in range(0, count, step):
        part = slice(start, start + step)
        rows = np.array(channels[part], np.float32, order="C")
        floor = np.zeros(len(rows), np.float32) if floats else exact_scale(kind, rows)
        if smallest_scale is not None:
            floor = np.maximum(floor, smallest_scale[part].astype(np.float32))
        tensor, wider, rounding = _rounded_slab(rows, number_format, algorithm, kind, floor, hessian)
        powers = _error_powers(rows, tensor)
        into[part] = _numpy(tensor.codes).reshape(rows.shape)
        scales.append(_numpy(tensor.scale).reshape(-1))
        narrowed, signal, noise = narrowed + wider, signal + powers[0], noise + powers[1]
    rounding = replace(rounding, signal=signal, noise=noise)
    return Made({"codes": codes, "scales": np.concatenate(scales)}, rounding, narrowed)


def _rounded_slab(
    rows: np.ndarray,
    number_format: NumberFormat,
    algorithm: str,
    kind: str | None,
    smallest_scale: np.ndarray,
    hessian: Hessian | None,
) -> tuple[QuantizedTensor, int, Rounding]:
    """Some channels, or all of them, rounded; and the number of those whose scale grew."""
    import torch

    from quantcli.core import numerics

    matrix = torch.from_numpy(rows.reshape(len(rows), -1))
    start = default_rounding(number_format) if hessian else algorithm
    tensor = algorithms.rounding(start).run(matrix, number_format, torch.float32)
    floor = torch.from_numpy(smallest_scale).reshape(-1, 1)
    if number_format.granularity.kind == "tensor":
        floor = floor.amax(0, keepdim=True)
    narrowed = int((floor > tensor.scale).sum())
    if narrowed:
        groups = numerics.in_groups(matrix, number_format)
        tensor.scale = torch.maximum(tensor.scale, floor)
        tensor.codes = numerics.quantize(groups, tensor.scale, None, number_format).reshape(matrix.shape)
    if hessian is None:
        return tensor, narrowed, Rounding(algorithm)
    compensated = compensate(matrix, tensor, torch.float32, hessian)
    tensor = compensated.tensor
    if kind is not None:
        codes = within_pairs(kind, _numpy(tensor.codes).reshape(rows.shape))
        tensor.codes = torch.from_numpy(codes.reshape(matrix.shape))
    return tensor, narrowed, compensated.rounding


def _error_powers(rows: np.ndarray, tensor: QuantizedTensor) -> tuple[float, float]:
    import torch

    from quantcli.core import numerics

    matrix = torch.from_numpy(rows.reshape(len(rows), -1))
    return numerics.error_powers(numerics.in_groups(matrix, tensor.number_format), tensor)


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.numpy())
