"""Operators with weights: at which inputs, and over which dimensions of a weight its products are summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.onnx.graph.operands import behind_transposes, channel_axis
from quantcli.onnx.graph.products import einsum_terms
from quantcli.onnx.graph.values import constant, input_of, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

_MICROSOFT = "com.microsoft"

#: ONNX's names of the dtypes that weights have before they are quantized.
_FLOATS = ("DOUBLE", "FLOAT", "FLOAT16", "BFLOAT16")


@dataclass(frozen=True)
class Carried:
    """One weight of a node: the input it is at, its role, and the dimensions that its products are summed over.

    ``value`` is the constant itself, which a Transpose may turn on its way to the node.
    """

    index: int
    value: ir.Value
    role: str
    summed: tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """An input where an operator may have a weight; ``summed`` is asked for the node and the weight's rank."""

    index: int
    role: str
    summed: Callable[[ir.Node, int], tuple[int, ...] | None]


def _but_channels(node: ir.Node, rank: int) -> tuple[int, ...]:
    axis = channel_axis(node) if node.domain == "" else 0
    return tuple(each for each in range(rank) if each != axis)


def _last(node: ir.Node, rank: int) -> tuple[int, ...]:
    return (rank - 1,)


def _last_but_one(node: ir.Node, rank: int) -> tuple[int, ...]:
    return (rank - 2,)


def _right(node: ir.Node, rank: int) -> tuple[int, ...]:
    turned = node.attributes.get("transB")
    return (rank - 1,) if turned is not None and turned.as_int() else (rank - 2,)


def _left(node: ir.Node, rank: int) -> tuple[int, ...]:
    turned = node.attributes.get("transA")
    return (rank - 2,) if turned is not None and turned.as_int() else (rank - 1,)


def _contracted(index: int) -> Callable[[ir.Node, int], tuple[int, ...] | None]:
    """The dimensions of an Einsum's operand that its result lacks; None where the equation tells none."""

    def summed(node: ir.Node, rank: int) -> tuple[int, ...] | None:
        operands, result = einsum_terms(node)
        if index >= len(operands) or len(operands[index]) != rank or "." in operands[index]:
            return None
        return tuple(axis for axis, letter in enumerate(operands[index]) if letter not in result) or None

    return summed


_RECURRENT = (_Place(1, "recurrent", _last), _Place(2, "recurrent", _last))
_RIGHT, _LEFT = _Place(1, "linear", _right), _Place(0, "linear", _left)
_CONVOLUTION = (_Place(1, "conv", _but_channels),)

#: Where operators have weights. A convolution's, and a Gemm's, is never its first input.
_PLACES: dict[tuple[str, str], tuple[_Place, ...]] = {
    ("", "Conv"): _CONVOLUTION,
    ("", "ConvTranspose"): _CONVOLUTION,
    ("", "Gemm"): (_RIGHT,),
    ("", "MatMul"): (_RIGHT, _LEFT),
    ("", "Gather"): (_Place(0, "embedding", _last),),
    ("", "Einsum"): (_Place(1, "linear", _contracted(1)), _Place(0, "linear", _contracted(0))),
    **{("", name): _RECURRENT for name in ("LSTM", "GRU", "RNN")},
    **{(_MICROSOFT, name): (_RIGHT, _LEFT) for name in ("FusedMatMul", "TransposeMatMul")},
    **{(_MICROSOFT, name): (_RIGHT,) for name in ("FusedGemm", "GemmFastGelu")},
    **{(_MICROSOFT, name): _CONVOLUTION for name in ("FusedConv", "NhwcFusedConv", "ConvTransposeWithDynamicPads")},
    **{
        (_MICROSOFT, name): (_Place(1, "linear", _last_but_one),)
        for name in ("Attention", "PackedAttention", "DecoderMaskedSelfAttention", "LongformerAttention")
    },
    (_MICROSOFT, "EmbedLayerNormalization"): tuple(_Place(index, "embedding", _last) for index in (2, 3, 4)),
    (_MICROSOFT, "MoE"): tuple(_Place(index, "expert", _last) for index in (2, 4, 6)),
}

#: Operators whose weight may be turned by a Transpose before it gets there.
_THROUGH_TRANSPOSE = ("MatMul", "Gemm")


def carried(node: ir.Node) -> list[Carried]:
    """The constant float weights of a node, matrices or more; none of an operator that is not known to have any."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    found: list[Carried] = []
    for place in _PLACES.get((domain, node.op_type), ()):
        value = input_of(node, place.index)
        if is_standard(node, *_THROUGH_TRANSPOSE):
            value, _ = behind_transposes(value)
        tensor = constant(value)
        if value is None or tensor is None or tensor.dtype.name not in _FLOATS or len(tensor.shape) < 2:
            continue
        summed = place.summed(node, len(tensor.shape))
        # Of a product of two constants one is its weight, and the other its input.
        if any(place.role == each.role == "linear" for each in found):
            continue
        if summed is not None and value not in [each.value for each in found]:
            found.append(Carried(place.index, value, place.role, summed))
    return found
