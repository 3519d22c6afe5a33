"""Codes of a node's constant weight: int8, one scale per output channel, for the integer kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantcli import plugins
from quantcli.graph.compensation import Hessian, compensate
from quantcli.graph.values import add_initializer, array, free_name, integer
from quantcli.numerics import decibels, error_powers, in_groups, quantize
from quantcli.scheme import NumberFormat
from quantcli.steps import default_rounding

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor


#: Two neighbouring codes may sum to this: 255 * 128 is below 2 ** 15.
_EXACT_PAIR_SUM = 128

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
        within = _within_pairs(self.pairs, codes.cpu().numpy().reshape(self.shape))
        return torch.from_numpy(within).reshape(codes.shape).to(codes.device)


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as the graph holds it now.

    ``codes`` int8 of the weight's own shape; ``scale`` float32 and ``zero_point`` int8 ``[channels]``, or
    scalars; ``axis`` the dimension of the channels; ``scales`` the scale's values, ``[channels]`` or ``[1]``;
    ``narrowed`` the number of channels whose scale grew so that nothing saturates (see `exact_scale`);
    ``algorithm`` what chose the codes in the end, ``note`` what is to be said of that.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    axis: int
    scales: np.ndarray
    sqnr_db: float | None
    narrowed: int
    algorithm: str
    note: str | None
    bits: int = 8

    @property
    def channels(self) -> int:
        """Number of output channels, whether or not each has its own scale."""
        assert self.codes.const_value is not None
        return int(self.codes.const_value.shape.numpy()[self.axis])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        values = (self.codes, self.scale, self.zero_point)
        nbytes = sum(value.const_value.nbytes for value in values if value.const_value is not None)
        # Four-bit codes are bytes only until the graph is written, see `quantcli.graph.narrow`.
        return nbytes if self.bits == 8 else nbytes - self.codes.const_value.nbytes // 2  # type: ignore[union-attr]


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
    hessian: Hessian | None = None,
) -> IntegerWeight:
    """Quantize a node's weight and register codes and scales beside it.

    Args:
        graph: where the new constants go.
        node: Conv, ConvTranspose, Gemm or MatMul with a constant float weight.
        number_format: int8, symmetric, per channel or per tensor; codes are within -127..127.
        algorithm: plug-in that chooses the scales.
        exact: widen scales as `exact_scale` says; pointless where the codes are expanded before use.
        smallest_scale: float32 ``[channels]`` that scales must not go below, or None.
        hessian: of the node's input, which gptq needs.
    """
    import torch

    value = node.inputs[1]
    weight = array(value)
    assert value is not None and weight is not None
    axis = channel_axis(node)
    rows = np.moveaxis(weight, axis, 0).astype(np.float32)
    matrix = torch.from_numpy(np.ascontiguousarray(rows).reshape(rows.shape[0], -1))
    number_format = replace(number_format, narrow=True)
    start = default_rounding(number_format) if hessian else algorithm
    found = plugins.rounding(start).run(matrix, number_format, torch.float32)
    kind = _pairing(node, rows) if exact else None
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
    note = None
    if hessian is not None:
        chosen = compensate(matrix, found, torch.float32, hessian)
        found, algorithm, note = chosen.tensor, chosen.algorithm, chosen.note
        if kind is not None:
            codes = _within_pairs(kind, _numpy(found.codes).reshape(rows.shape))
            found.codes = torch.from_numpy(codes.reshape(matrix.shape))
    sqnr_db = decibels(*error_powers(in_groups(matrix, number_format), found))
    codes = np.moveaxis(_numpy(found.codes).reshape(rows.shape), 0, axis)
    scales = _numpy(found.scale).reshape(-1)
    # A single scale is written as a scalar: one entry of a list would have to match the channels.
    stored = scales if len(scales) > 1 else scales.reshape(())

    def register(part: str, values: np.ndarray) -> ir.Value:
        return add_initializer(graph, free_name(graph, f"{value.name}_{part}"), values)

    coded = register("quantized", np.ascontiguousarray(codes))
    coded.meta[ORIGIN] = Origin(value.name or "", number_format, axis, tuple(rows.shape), kind)
    return IntegerWeight(
        coded,
        register("scale", stored),
        # Zeros, and yet they must be there: without them the runtime does not fuse Gemm.
        register("zero_point", np.zeros(stored.shape, dtype=np.int8)),
        axis,
        scales,
        sqnr_db,
        narrowed,
        algorithm,
        note,
        number_format.bits,
    )


def exact_scale(node: ir.Node, rows: np.ndarray) -> np.ndarray:
    """Scales, float32 ``[channels]``, from which on no product of codes can saturate; 0 where none can.

    Without VNNI, x86 multiplies uint8 by int8 in pairs and adds each pair in 16 bits (``vpmaddubsw``), which
    saturates: 255 * 127 twice is 64770. The sum of a pair of codes of one sign within 128 is always exact.
    Pairs are neighbours in the order of the matrix product; a depthwise convolution is none.
    """
    most = np.zeros(rows.shape[0], dtype=np.float32)
    kind = _pairing(node, rows)
    if kind is None:
        return most
    pairs = _pairs(kind, rows)
    for sign in (1, -1):
        most = np.maximum(most, np.maximum(sign * pairs, 0).sum(-1).max(-1, initial=0))
    # Rounding may add half a code to each of the two.
    return (most / (_EXACT_PAIR_SUM - 1)).astype(np.float32)


def _pairing(node: ir.Node, rows: np.ndarray) -> str | None:
    """How a kernel pairs weights ``[channels, inputs, ...]``: see `Origin`."""
    if node.op_type != "Conv":
        return "matrix"
    # One channel in and one out in each group; one channel in alone is a matrix product like others.
    return None if rows.shape[1] == 1 and integer(node, "group", 1) == rows.shape[0] else "filter"


def _pairs(kind: str, rows: np.ndarray) -> np.ndarray:
    """Weights ``[channels, inputs, ...]`` as a kernel pairs them, ``[channels, pairs, 2]``."""
    if kind == "filter":
        # The runtime's kernels run over kernel positions, and at each over the input channels.
        rows = np.moveaxis(rows, 1, -1)
    matrix = rows.reshape(rows.shape[0], -1)
    if matrix.shape[1] % 2:
        matrix = np.pad(matrix, ((0, 0), (0, 1)))
    return matrix.reshape(matrix.shape[0], -1, 2)


def _within_pairs(kind: str, codes: np.ndarray) -> np.ndarray:
    """Codes, int8 ``[channels, inputs, ...]``, with the larger of a pair drawn in where their sum is not exact.

    `exact_scale` sees to that for rounded weights; compensation moves a few codes further.
    """
    wide = _pairs(kind, codes).astype(np.int16)
    same_sign = (wide[..., 0] > 0) == (wide[..., 1] > 0)
    excess = np.where(same_sign, np.maximum(np.abs(wide.sum(-1)) - _EXACT_PAIR_SUM, 0), 0)
    larger = np.abs(wide).argmax(-1)[..., None]
    drawn_in = np.take_along_axis(wide, larger, -1)
    np.put_along_axis(wide, larger, drawn_in - np.sign(drawn_in) * excess[..., None], -1)
    moved = np.moveaxis(codes, 1, -1) if kind == "filter" else codes
    flat = wide.reshape(len(codes), -1)[:, : moved[0].size].astype(np.int8).reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(flat, -1, 1) if kind == "filter" else flat)


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.numpy())
