"""What the weight of an n-bit node means, read from the node alone: for verification.

Written from the operators' documentation and independent of what packs them, in float32, as the kernels compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.core.nf4 import NF4_CODEBOOK
from quantcli.onnx.graph.values import array, input_of, integer

if TYPE_CHECKING:
    import onnx_ir as ir

#: The operators `decode` reads.
NBITS_OPERATORS = ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized")


def decode(node: ir.Node) -> np.ndarray:
    """Weight of an n-bit node, float32: ``[N, K]`` of a product, one row per entry of a lookup.

    A MatMul's own matrix is the transpose of a product's. What a Gemm's alpha was is in the weight.

    Raises:
        ValueError: the node is none of `NBITS_OPERATORS`, its constants are missing or of a kind that quantcli
            does not write.
    """
    if node.domain != "com.microsoft" or node.op_type not in NBITS_OPERATORS:
        raise ValueError(f"{node.name} is {node.op_type}, not an n-bit operator")
    if node.op_type == "MatMulBnb4":
        return _bnb4(node)
    lookup = node.op_type == "GatherBlockQuantized"
    codes, scales = _constant(node, 0 if lookup else 1), _constant(node, 2)
    bits = integer(node, "bits", 4)
    if bits not in (4, 8) or codes.dtype != np.uint8:
        raise ValueError(f"{node.name} has {bits}-bit codes in {codes.dtype}")
    rows, size = len(codes), integer(node, "block_size", 128)
    unpacked = _unpack(codes.reshape(rows, -1), bits)
    columns = unpacked.shape[1] if lookup else integer(node, "K", 0)
    blocks = -(-columns // size)
    zero_points = np.full((rows, blocks), 1 << (bits - 1), np.uint8)
    if input_of(node, 3) is not None:
        zero_points = _unpack(_constant(node, 3).reshape(rows, -1), bits)[:, :blocks]
    signed = unpacked[:, :columns].astype(np.float32) - np.repeat(zero_points, size, axis=1)[:, :columns]
    weight: np.ndarray = signed * np.repeat(scales.reshape(rows, blocks).astype(np.float32), size, axis=1)[:, :columns]
    return weight


def _bnb4(node: ir.Node) -> np.ndarray:
    rows, columns, size = (integer(node, name, 0) for name in ("N", "K", "block_size"))
    if integer(node, "quant_type", 0) != 1 or not integer(node, "transB", 1):
        raise ValueError(f"{node.name} is not NF4 of a transposed matrix")
    packed = _constant(node, 1)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: rows * columns]
    scales = np.repeat(_constant(node, 2).astype(np.float32), size)[: rows * columns]
    return (np.array(NF4_CODEBOOK, np.float32)[codes] * scales).reshape(rows, columns)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of ``[rows, bytes]``, low nibble first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _constant(node: ir.Node, index: int) -> np.ndarray:
    value = input_of(node, index)
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Reshape":  # codes that a lookup and a product share
        value = producer.inputs[0]
    values = array(value)
    if values is None:
        raise ValueError(f"{node.name} lacks the constant at input {index}")
    return values
