"""Constants of a graph that are no layer's weight, and why they stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from quantcli.onnx.graph.casts import keeps_codes
from quantcli.onnx.graph.values import constant
from quantcli.onnx.plan.plan import QUANTIZED_OPS

if TYPE_CHECKING:
    import onnx_ir as ir

#: What weighs less than this is not looked at more closely: biases, norms and the like.
_TINY_BYTES = 1 << 16

#: Integer constants below this many values are shapes and positions; of those above, codes are told from others.
_SMALLEST_CODES = 256

_QUANTIZED = {name for names in QUANTIZED_OPS.values() for name in names}


def left_constants(model: ir.Model, weights: Collection[str]) -> Iterator[tuple[ir.Value, str]]:
    """Constants other than these ``weights``, of the graph and of its bodies, with the reason each stays."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            reason = _reason(value) if value.name not in weights else None
            if reason:
                yield value, reason


def _reason(value: ir.Value) -> str | None:
    tensor = constant(value)
    if tensor is None:
        return None
    readers = [use.node for use in value.uses()]
    names = sorted({node.op_type for node in readers})
    if not tensor.dtype.is_floating_point():
        codes = bool(set(names) & _QUANTIZED) or any(keeps_codes(node) is False for node in readers)
        return "quantized already: stays as it is" if codes and tensor.size >= _SMALLEST_CODES else None
    if set(names) & _QUANTIZED and not set(names) - _QUANTIZED:
        return "belongs to what is quantized already: stays as it is"
    if tensor.nbytes < _TINY_BYTES:
        return "bias, norm or constant: tiny, and sensitive"
    if not names:
        return "nothing reads it"
    if all(_folds(node) for node in readers):
        return "computed into other constants beforehand"
    return f"no weight of a product or lookup that is known: {', '.join(names)} reads it"


def _folds(node: ir.Node) -> bool:
    """Whether a node has constants alone to work on, so that what it computes is a constant."""
    return bool(node.inputs) and all(value is None or constant(value) is not None for value in node.inputs)
