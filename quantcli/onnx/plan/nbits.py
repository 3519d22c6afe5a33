"""Which products and lookups the n-bit operators of onnxruntime can carry, and in which blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.onnx.graph.operands import Operand, operand_of, readers

if TYPE_CHECKING:
    import onnx_ir as ir

#: Block size of a scheme that asks for one scale per channel, which these operators do not have. Smaller blocks
#: cost more scales, larger ones pad more; speed is within a tenth from 64 up (measured on onnxruntime 1.32).
CHANNEL_BLOCK = 128

#: The smallest block the operators take.
SMALLEST_BLOCK = 16


def block_size(columns: int, number_format: NumberFormat) -> int:
    """Block size for a matrix: at most what is asked for, and smaller where that makes fewer bytes.

    The last block of a row is stored in full, so that 576 columns fit blocks of 64 better than blocks of 128.
    """
    sizes = [number_format.granularity.size or CHANNEL_BLOCK]
    while sizes[-1] > SMALLEST_BLOCK:
        sizes.append(sizes[-1] // 2)

    def row_bits(size: int) -> int:
        scale_bits = 32 if number_format.symmetric else 32 + number_format.bits
        return -(-columns // size) * (size * number_format.bits + scale_bits)

    return min(sizes, key=row_bits)


#: The oldest onnxruntime whose CPU provider was seen to run an operator with so many bits.
_OLDEST_RUNTIME = {
    ("MatMulNBits", 4): "1.18", ("MatMulNBits", 8): "1.22", ("MatMulBnb4", 4): "1.18",
    ("GatherBlockQuantized", 4): "1.23", ("GatherBlockQuantized", 8): "1.23",
}  # fmt: skip


def supports(node: ir.Node, scheme: Scheme) -> str | None:
    """Why a node's weight cannot be quantized alone to a scheme, or None. No weight is read."""
    operand = operand_of(node)
    if isinstance(operand, str):
        return operand
    if reason := refusal(node, operand, scheme):
        return reason
    for other in readers(operand.value):
        theirs = operand_of(other)
        if other is not node and (isinstance(theirs, str) or refusal(other, theirs, scheme)):
            return f"its weight also serves {other.name or other.op_type}, which needs it as it is"
    return None


def oldest_runtime(node: ir.Node, scheme: Scheme) -> str:
    """The oldest onnxruntime that runs what `quantize_node` makes of a node."""
    weights = effective(node, scheme).weights
    return _OLDEST_RUNTIME[nbits_operator(node, weights), weights.bits]


def effective(node: ir.Node, scheme: Scheme) -> Scheme:
    """The scheme a node really gets: onnxruntime has no lookup in NF4, so that a table gets int4 in its stead."""
    if node.op_type != "Gather" or scheme.weights.dtype != "nf4":
        return scheme
    granularity = Granularity("group", scheme.weights.granularity.size)
    return Scheme(NumberFormat("int4", granularity), scheme.inputs)


def refusal(node: ir.Node, operand: Operand, scheme: Scheme) -> str | None:
    """Why one node cannot be quantized to a scheme, whoever else reads its weight."""
    weights, size = scheme.weights, scheme.weights.granularity.size
    if weights.is_cast or scheme.inputs is not None:
        return f"{scheme} does not quantize weights alone"
    if weights.dtype == "nf4":
        if weights.double_quantized:
            return "onnxruntime has no double quantization"
        if weights.granularity.kind != "block":
            return f"onnxruntime has NF4 in blocks of the flattened weight only, not by {weights.granularity}"
    elif weights.granularity.kind not in ("group", "channel"):
        return f"onnxruntime has no {weights.dtype} weights by {weights.granularity}"
    if size is not None and (size < SMALLEST_BLOCK or size & (size - 1)):
        return f"onnxruntime needs groups of a power of two, {SMALLEST_BLOCK} or more; asked are {size}"
    if node.op_type == "Gather" and weights.bits == 4 and operand.columns % 2:
        return "its entries have an odd length, which four bits cannot pack"
    return None


def nbits_operator(node: ir.Node, weights: NumberFormat) -> str:
    """The n-bit operator that takes a node's place."""
    if node.op_type == "Gather":
        return "GatherBlockQuantized"
    return "MatMulBnb4" if weights.dtype == "nf4" else "MatMulNBits"
