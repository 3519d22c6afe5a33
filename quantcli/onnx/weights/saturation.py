"""Scales wide enough that no pair of 8-bit products leaves 16 bits, whatever the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.onnx.graph.values import integer

if TYPE_CHECKING:
    import onnx_ir as ir


#: Two neighbouring codes may sum to this: 255 * 128 is below 2 ** 15.
_EXACT_PAIR_SUM = 128

#: Values looked at together.
_CHUNK = 1 << 20


def exact_scale(kind: str | None, rows: np.ndarray) -> np.ndarray:
    """Scales, float32 ``[channels]``, from which on no product of codes can saturate; 0 where none can.

    ``kind`` is what `pairing` says of the weight that rows ``[channels, inputs, ...]`` are all, or some, channels of.

    Without VNNI, x86 multiplies uint8 by int8 in pairs and adds each pair in 16 bits (``vpmaddubsw``), which
    saturates: 255 * 127 twice is 64770. The sum of a pair of codes of one sign within 128 is always exact.
    Pairs are neighbours in the order of the matrix product; a depthwise convolution is none.
    """
    most = np.zeros(rows.shape[0], dtype=np.float32)
    if kind is None:
        return most
    step = max(1, _CHUNK * len(rows) // max(1, rows.size))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        pairs = _pairs(kind, rows[part])
        for sign in (1, -1):
            most[part] = np.maximum(most[part], np.maximum(sign * pairs, 0).sum(-1).max(-1, initial=0))
    # Rounding may add half a code to each of the two.
    return (most / (_EXACT_PAIR_SUM - 1)).astype(np.float32)


def largest_pairs(codes: np.ndarray) -> np.ndarray:
    """The largest sum of two neighbouring codes of one sign in each row of a matrix."""
    pairs = _pairs("matrix", codes).astype(np.int16)
    positive, negative = (np.maximum(sign * pairs, 0).sum(-1).max(-1, initial=0) for sign in (1, -1))
    return np.asarray(np.maximum(positive, negative))


def pairing(node: ir.Node, rows: np.ndarray) -> str | None:
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


def within_pairs(kind: str, codes: np.ndarray) -> np.ndarray:
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
