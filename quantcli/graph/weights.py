"""Codes of a node's constant weight: int8, one scale per output channel, for the integer kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantcli import plugins
from quantcli.graph.values import add_initializer, array, free_name, integer
from quantcli.numerics import decibels, error_powers, in_groups, quantize
from quantcli.scheme import NumberFormat

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor


#: Two neighbouring codes may sum to this: 255 * 128 is below 2 ** 15.
_EXACT_PAIR_SUM = 128


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as the graph holds it now.

    ``codes`` int8 of the weight's own shape; ``scale`` float32 and ``zero_point`` int8 ``[channels]``, or
    scalars; ``axis`` the dimension of the channels; ``scales`` the scale's values, ``[channels]`` or ``[1]``;
    ``narrowed`` the number of channels whose scale grew so that nothing saturates (see `exact_scale`).
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    axis: int
    scales: np.ndarray
    sqnr_db: float | None
    narrowed: int

    @property
    def channels(self) -> int:
        """Number of output channels, whether or not each has its own scale."""
        assert self.codes.const_value is not None
        return int(self.codes.const_value.shape.numpy()[self.axis])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        values = (self.codes, self.scale, self.zero_point)
        return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def channel_axis(node: ir.Node) -> int:
    """The dimension of a node's weight that runs over its output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if integer(node, "transB", 0) else 1
    return 1


def integer_weight(
    graph: ir.Graph,
    node: ir.Node,
    number_format: NumberFormat,
    algorithm: str,
    *,
    exact: bool = True,
    smallest_scale: np.ndarray | None = None,
) -> IntegerWeight:
    """Quantize a node's weight and register codes and scales beside it.

    Args:
        graph: where the new constants go.
        node: Conv, ConvTranspose, Gemm or MatMul with a constant float weight.
        number_format: int8, symmetric, per channel or per tensor; codes are within -127..127.
        algorithm: plug-in that chooses the scales.
        exact: widen scales as `exact_scale` says; pointless where the codes are expanded before use.
        smallest_scale: float32 ``[channels]`` that scales must not go below, or None.
    """
    import torch

    value = node.inputs[1]
    weight = array(value)
    assert value is not None and weight is not None
    axis = channel_axis(node)
    rows = np.moveaxis(weight, axis, 0).astype(np.float32)
    matrix = torch.from_numpy(np.ascontiguousarray(rows).reshape(rows.shape[0], -1))
    number_format = replace(number_format, narrow=True)
    found = plugins.rounding(algorithm).run(matrix, number_format, torch.float32)
    needed = exact_scale(node, rows) if exact else np.zeros(rows.shape[0], dtype=np.float32)
    floor = torch.from_numpy(needed).reshape(-1, 1)
    if smallest_scale is not None:
        floor = torch.maximum(floor, torch.from_numpy(smallest_scale.astype(np.float32)).reshape(-1, 1))
    if number_format.granularity.kind == "tensor":
        floor = floor.amax(0, keepdim=True)
    narrowed = int((floor > found.scale).sum())
    if narrowed:
        found.scale = torch.maximum(found.scale, floor)
        groups = in_groups(matrix, number_format)
        found.codes = quantize(groups, found.scale, None, number_format).reshape(matrix.shape)
    sqnr_db = decibels(*error_powers(in_groups(matrix, number_format), found))
    codes = np.moveaxis(_numpy(found.codes).reshape(rows.shape), 0, axis)
    scales = _numpy(found.scale).reshape(-1)
    # A single scale is written as a scalar: one entry of a list would have to match the channels.
    stored = scales if len(scales) > 1 else scales.reshape(())

    def register(part: str, values: np.ndarray) -> ir.Value:
        return add_initializer(graph, free_name(graph, f"{value.name}_{part}"), values)

    return IntegerWeight(
        register("quantized", np.ascontiguousarray(codes)),
        register("scale", stored),
        # Zeros, and yet they must be there: without them the runtime does not fuse Gemm.
        register("zero_point", np.zeros(stored.shape, dtype=np.int8)),
        axis,
        scales,
        sqnr_db,
        narrowed,
    )


def exact_scale(node: ir.Node, rows: np.ndarray) -> np.ndarray:
    """Scales, float32 ``[channels]``, from which on no product of codes can saturate; 0 where none can.

    Without VNNI, x86 multiplies uint8 by int8 in pairs and adds each pair in 16 bits (``vpmaddubsw``), which
    saturates: 255 * 127 twice is 64770. The sum of a pair of codes of one sign within 128 is always exact.
    Pairs are neighbours in the order of the matrix product; a depthwise convolution is none.
    """
    if node.op_type == "Conv":
        # One channel in and one out in each group; one channel in alone is a matrix product like others.
        if rows.shape[1] == 1 and integer(node, "group", 1) == rows.shape[0]:
            return np.zeros(rows.shape[0], dtype=np.float32)
        # The runtime's kernels run over kernel positions, and at each over the input channels.
        rows = np.moveaxis(rows, 1, -1)
    matrix = rows.reshape(rows.shape[0], -1)
    if matrix.shape[1] % 2:
        matrix = np.pad(matrix, ((0, 0), (0, 1)))
    pairs = matrix.reshape(matrix.shape[0], -1, 2)
    most = np.zeros(matrix.shape[0], dtype=np.float32)
    for sign in (1, -1):
        most = np.maximum(most, np.maximum(sign * pairs, 0).sum(-1).max(-1, initial=0))
    # Rounding may add half a code to each of the two.
    return (most / (_EXACT_PAIR_SUM - 1)).astype(np.float32)


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.numpy())
