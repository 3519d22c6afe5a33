"""Torch forms of ONNX's operators, by name. Each takes a node, for its attributes, and the node's inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import ceil, prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quantcli.onnx.execution.attributes import Outputs, axes_of, no_torch_form, text
from quantcli.onnx.execution.layers import LAYERS
from quantcli.onnx.execution.shapes import SHAPES
from quantcli.onnx.graph.values import integer, real

if TYPE_CHECKING:
    import onnx_ir as ir


def to_torch(values: np.ndarray) -> Tensor:
    """A constant as a tensor of its own; codes of less than a byte get a byte each."""
    name = values.dtype.name
    if name in ("int2", "int4", "uint2", "uint4"):
        return torch.from_numpy(values.astype(f"{name[:-1]}8"))
    if values.dtype.isbuiltin == 1:
        return torch.from_numpy(np.array(values))
    # bfloat16 and its smaller kin, which numpy knows from elsewhere.
    return torch.from_numpy(np.array(values).view(f"uint{8 * values.itemsize}")).view(getattr(torch, name))


# Arithmetic


def _div(_: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _mod(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if integer(node, "fmod", 0) else torch.remainder(a, b)


def _clip(_: ir.Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _gelu(node: ir.Node, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=text(node, "approximate", "none"))


def _selu(node: ir.Node, x: Tensor) -> Tensor:
    return real(node, "gamma", 1.0507009873554805) * functional.elu(x, real(node, "alpha", 1.6732632423543772))


def _hard_sigmoid(node: ir.Node, x: Tensor) -> Tensor:
    return (real(node, "alpha", 0.2) * x + real(node, "beta", 0.5)).clamp(0, 1)


def _is_inf(node: ir.Node, x: Tensor) -> Tensor:
    negative, positive = integer(node, "detect_negative", 1), integer(node, "detect_positive", 1)
    return torch.isinf(x) & ((x < 0) & bool(negative) | (x > 0) & bool(positive))


def _cumsum(node: ir.Node, x: Tensor, axis: Tensor) -> Tensor:
    dim, backwards = int(axis.item()), integer(node, "reverse", 0)
    turned = x.flip(dim) if backwards else x
    sums = turned.cumsum(dim, dtype=x.dtype)
    if integer(node, "exclusive", 0):
        sums = sums - turned
    return sums.flip(dim) if backwards else sums


def _einsum(node: ir.Node, *tensors: Tensor) -> Tensor:
    return torch.einsum(text(node, "equation", ""), *tensors)


# Reductions


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def run(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims, keep = axes_of(node, axes), bool(integer(node, "keepdims", 1))
        if dims or (x.ndim and not integer(node, "noop_with_empty_axes", 0)):
            return function(x, dims or list(range(x.ndim)), keep)
        # Every entry by itself.
        return function(x.unsqueeze(-1), [-1], False)

    return run


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return x.sum(dims, keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(dims, keep)
    return torch.div(_sum(x, dims, keep), prod(x.shape[dim] for dim in dims), rounding_mode="trunc")


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((dim % x.ndim for dim in dims), reverse=True):
        x = x.prod(dim, keep, dtype=x.dtype)
    return x


def _extreme(sign: int) -> Callable[..., Tensor]:
    """The place of the greatest entry of ``sign * x``."""

    def run(node: ir.Node, x: Tensor) -> Tensor:
        axis, keep, signed = integer(node, "axis", 0), bool(integer(node, "keepdims", 1)), x if sign > 0 else -x
        if integer(node, "select_last_index", 0):
            return x.shape[axis] - 1 - torch.argmax(signed.flip(axis), axis, keep)
        return torch.argmax(signed, axis, keep)

    return run


def _top_k(node: ir.Node, x: Tensor, k: Tensor) -> Outputs:
    axis, count = integer(node, "axis", -1), int(k.item())
    # Of equal ones the first comes first, which torch.topk does not promise.
    ordered = x.sort(dim=axis, descending=bool(integer(node, "largest", 1)), stable=True)
    return ordered.values.narrow(axis, 0, count), ordered.indices.narrow(axis, 0, count)


# Constants, shapes and types


def _constant(node: ir.Node) -> Tensor:
    ((name, attribute),) = node.attributes.items()
    if name == "value":
        return to_torch(attribute.as_tensor().numpy())
    if name in ("value_float", "value_floats"):
        return torch.tensor(attribute.value, dtype=torch.float32)
    if name in ("value_int", "value_ints"):
        return torch.tensor(attribute.value, dtype=torch.int64)
    raise no_torch_form(node, name)


def _constant_of_shape(node: ir.Node, shape: Tensor) -> Tensor:
    attribute = node.attributes.get("value")
    value = torch.zeros(1) if attribute is None else to_torch(attribute.as_tensor().numpy())
    return value.reshape(()).repeat(shape.tolist())


def _shape(node: ir.Node, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[integer(node, "start", 0) : integer(node, "end", x.ndim)], dtype=torch.int64)


def _range(_: ir.Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = (each.item() for each in (start, limit, delta))
    count = max(ceil((last - first) / step), 0)
    return start.reshape(()) + delta.reshape(()) * torch.arange(count, dtype=start.dtype, device=start.device)


def _cast(node: ir.Node, x: Tensor) -> Tensor:
    import onnx_ir as ir
    from onnx_ir import tensor_adapters

    target = ir.DataType(integer(node, "to", 0))
    try:
        return x.to(tensor_adapters.to_torch_dtype(target))
    except (TypeError, ValueError) as error:
        raise no_torch_form(node, target.name) from error


def _dropout(node: ir.Node, x: Tensor, _: Tensor | None = None, training: Tensor | None = None) -> Outputs:
    if training is not None and training.item():
        raise no_torch_form(node, "training_mode")
    return x, torch.ones_like(x, dtype=torch.bool)


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator without attributes that a torch function is."""
    return lambda _, *inputs: function(*inputs)


def _with_real(function: Callable[..., Tensor], name: str, default: float) -> Callable[..., Tensor]:
    """The operator with one number as attribute that a torch function of an input and a number is."""
    return lambda node, x: function(x, real(node, name, default))


_WITHOUT_ATTRIBUTES: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Add": torch.add, "And": torch.logical_and,
    "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh,
    "BitwiseAnd": torch.bitwise_and, "BitwiseNot": torch.bitwise_not, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Equal": torch.eq,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "HardSwish": functional.hardswish, "IsNaN": torch.isnan, "Less": torch.lt, "LessOrEqual": torch.le,
    "Log": torch.log, "Mish": functional.mish, "Mul": torch.mul, "Neg": torch.neg, "Not": torch.logical_not,
    "Or": torch.logical_or, "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Softplus": functional.softplus, "Softsign": functional.softsign, "Sqrt": torch.sqrt, "Sub": torch.sub,
    "Tan": torch.tan, "Tanh": torch.tanh, "Where": torch.where, "Xor": torch.logical_xor,
    "CastLike": lambda x, like: x.to(like.dtype),
    "Identity": lambda x: x,
    "Max": lambda *tensors: reduce(torch.maximum, tensors),
    "Mean": lambda *tensors: reduce(torch.add, tensors) / len(tensors),
    "Min": lambda *tensors: reduce(torch.minimum, tensors),
    "NonZero": lambda x: x.nonzero().T,
    "PRelu": lambda x, slope: torch.where(x < 0, slope * x, x),
    "Pow": lambda x, exponent: torch.pow(x, exponent).to(x.dtype),
    "Size": lambda x: torch.tensor(x.numel()),
    "Sum": lambda *tensors: reduce(torch.add, tensors),
}  # fmt: skip

#: Torch functions with the name and default of their second argument.
_WITH_A_NUMBER: dict[str, tuple[Callable[..., Tensor], str, float]] = {
    "Celu": (functional.celu, "alpha", 1.0),
    "Elu": (functional.elu, "alpha", 1.0),
    "LeakyRelu": (functional.leaky_relu, "alpha", 0.01),
    "Swish": (lambda x, alpha: x * torch.sigmoid(alpha * x), "alpha", 1.0),
    "ThresholdedRelu": (lambda x, alpha: functional.threshold(x, alpha, 0.0), "alpha", 1.0),
}

_REDUCED: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, dims, keep: _sum(x.abs(), dims, keep),
    "ReduceL2": lambda x, dims, keep: torch.linalg.vector_norm(x, dim=dims, keepdim=keep),
    "ReduceLogSum": lambda x, dims, keep: _sum(x, dims, keep).log(),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": _mean,
    "ReduceMin": torch.amin,
    "ReduceProd": _prod,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, dims, keep: _sum(x.square(), dims, keep),
}

#: What computes an operator of ONNX itself: a function of the node and its inputs, None where one is left out.
OPERATORS: dict[str, Callable[..., Outputs]] = {
    **LAYERS,
    **SHAPES,
    **{name: _plain(function) for name, function in _WITHOUT_ATTRIBUTES.items()},
    **{name: _with_real(*parts) for name, parts in _WITH_A_NUMBER.items()},
    **{name: _reduction(function) for name, function in _REDUCED.items()},
    "ArgMax": _extreme(1),
    "ArgMin": _extreme(-1),
    "Cast": _cast,
    "Clip": _clip,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "Div": _div,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "IsInf": _is_inf,
    "Mod": _mod,
    "Range": _range,
    "Selu": _selu,
    "Shape": _shape,
    "TopK": _top_k,
}

#: Inputs that are read as numbers, to become sizes and places; they may lie in the CPU's memory.
HOST_INPUTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_REDUCED, (1,)),
    **dict.fromkeys(("CumSum", "Expand", "OneHot", "Reshape", "Split", "Squeeze", "Tile", "TopK", "Trilu"), (1,)),
    "Dropout": (1, 2),
    "Pad": (1, 2, 3),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Unsqueeze": (1,),
}
