"""Torch forms of ONNX's layers: convolutions, products, pools, normalizations, resizing, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from quantcli.onnx.execution.attributes import Outputs, no_torch_form, opset, text
from quantcli.onnx.graph.padding import auto_padding, halves
from quantcli.onnx.graph.values import integer, integers, real

if TYPE_CHECKING:
    import onnx_ir as ir

# Convolutions and products


def _padding(
    node: ir.Node, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and after each spatial dimension, for kernels that reach over ``spans``."""
    mode = text(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = integers(node, "pads") or [0] * (2 * len(sizes))
        return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    return auto_padding(mode, sizes, spans, strides)


def _padded(x: Tensor, padding: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """``x`` with its last dimensions padded, or cropped where padding is negative."""
    if not any(map(any, padding)):
        return x
    return functional.pad(x, [side for pair in reversed(padding) for side in pair], value=value)


def _spans(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]


def _conv(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    strides, dilations = (integers(node, name) or [1] * len(kernel) for name in ("strides", "dilations"))
    padding = _padding(node, x.shape[2:], _spans(kernel, dilations), strides)
    sides = [before for before, after in padding if before == after]
    if len(sides) < len(kernel):
        x, sides = _padded(x, padding), [0] * len(kernel)
    none = [0] * len(kernel)
    return torch.convolution(x, weight, bias, strides, sides, dilations, False, none, integer(node, "group", 1))


def _conv_transpose(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    rank, mode = len(kernel), text(node, "auto_pad", "NOTSET")
    strides, dilations = (integers(node, name) or [1] * rank for name in ("strides", "dilations"))
    extra = integers(node, "output_padding") or [0] * rank
    none, group = [0] * rank, integer(node, "group", 1)
    y = torch.convolution(x, weight, None, strides, none, dilations, True, none, group)
    full = [size + more for size, more in zip(y.shape[2:], extra, strict=True)]
    shape = integers(node, "output_shape")
    if shape is None and mode.startswith("SAME"):
        shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if shape is not None:
        padding = [halves(size - wish, mode) for size, wish in zip(full, shape[-rank:], strict=True)]
    else:
        padding = _padding(node, none, none, strides)
    y = _padded(y, [(-before, more - after) for (before, after), more in zip(padding, extra, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def _gemm(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = real(node, "alpha", 1.0), real(node, "beta", 1.0)
    a, b = (x.T if integer(node, name, 0) else x for x, name in ((a, "transA"), (b, "transB")))
    if c is not None:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    return a @ b if alpha == 1.0 else alpha * (a @ b)


# Pools


@dataclass(frozen=True)
class _Windows:
    """What a pool runs over: lists by spatial dimension.

    ``padding`` is what the node asks for, ``filled`` what makes room for ``counts`` windows.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    padding: list[tuple[int, int]]
    filled: list[tuple[int, int]]
    counts: list[int]


def _windows(node: ir.Node, x: Tensor) -> _Windows:
    kernel, sizes = integers(node, "kernel_shape") or [], x.shape[2:]
    strides, dilations = (integers(node, name) or [1] * len(kernel) for name in ("strides", "dilations"))
    spans = _spans(kernel, dilations)
    padding = _padding(node, sizes, spans, strides)
    rounding = ceil if integer(node, "ceil_mode", 0) else floor
    filled, counts = [], []
    for size, span, stride, (before, after) in zip(sizes, spans, strides, padding, strict=True):
        count = rounding((size + before + after - span) / stride) + 1
        # A window that would start behind the input and the padding before it is none.
        if (count - 1) * stride >= size + before:
            count -= 1
        counts.append(count)
        filled.append((before, max((count - 1) * stride + span - size - before, 0)))
    return _Windows(kernel, strides, dilations, padding, filled, counts)


def _max_pool(node: ir.Node, x: Tensor) -> Tensor:
    windows = _windows(node, x)
    lowest = -inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    pool = _of_rank(node, windows.kernel, functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
    return pool(_padded(x, windows.filled, lowest), windows.kernel, windows.strides, 0, windows.dilations)


def _average_pool(node: ir.Node, x: Tensor) -> Tensor:
    windows = _windows(node, x)
    if max(windows.dilations) > 1:
        raise no_torch_form(node, "dilations")
    pool = _of_rank(node, windows.kernel, functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
    y = pool(_padded(x, windows.filled), windows.kernel, windows.strides)
    for axis, size in enumerate(windows.kernel):
        (before, after), length = windows.padding[axis], x.shape[2 + axis]
        low, high = (-before, length + after) if integer(node, "count_include_pad", 0) else (0, length)
        starts = torch.arange(windows.counts[axis]) * windows.strides[axis] - before
        counted = (starts + size).clamp(max=high) - starts.clamp(min=low)
        if bool((counted < size).any()):
            y = y * (size / counted).to(y).reshape(-1, *[1] * (len(windows.kernel) - 1 - axis))
    return y


def _of_rank(node: ir.Node, kernel: Sequence[int], *functions: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if not 1 <= len(kernel) <= len(functions):
        raise no_torch_form(node, f"{len(kernel)} spatial dimensions")
    return functions[len(kernel) - 1]


# Normalizations


def _layer_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Outputs:
    axis, epsilon = integer(node, "axis", -1) % x.ndim, real(node, "epsilon", 1e-5)
    shape = x.shape[axis:]
    y = functional.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)
    if len(node.outputs) == 1:
        return y
    variance, mean = torch.var_mean(x.float(), tuple(range(axis, x.ndim)), correction=0, keepdim=True)
    return y, mean, (variance + epsilon).rsqrt()


def _rms_norm(node: ir.Node, x: Tensor, scale: Tensor) -> Tensor:
    shape = x.shape[integer(node, "axis", -1) % x.ndim :]
    return functional.rms_norm(x, shape, scale.expand(shape), real(node, "epsilon", 1e-5))


def _group_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = integer(node, "num_groups", 1)
    # Before operator set 21 there was one scale per group.
    scale, bias = (each.repeat_interleave(x.shape[1] // len(each)) for each in (scale, bias))
    return functional.group_norm(x, groups, scale, bias, real(node, "epsilon", 1e-5))


def _instance_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=real(node, "epsilon", 1e-5))


def _batch_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if integer(node, "training_mode", 0):
        raise no_torch_form(node, "training_mode")
    # Written out, as torch takes mean and variance for constants.
    factor = scale * (variance + real(node, "epsilon", 1e-5)).rsqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


def _lp_norm(node: ir.Node, x: Tensor) -> Tensor:
    return functional.normalize(x, integer(node, "p", 2), integer(node, "axis", -1), eps=torch.finfo(x.dtype).tiny)


def _softmax(function: Callable[..., Tensor]) -> Callable[[ir.Node, Tensor], Tensor]:
    def run(node: ir.Node, x: Tensor) -> Tensor:
        if opset(node) >= 13:
            return function(x, integer(node, "axis", -1))
        # It used to run over all dimensions from an axis on.
        axis = integer(node, "axis", 1)
        return function(x.flatten(axis % max(x.ndim, 1)), -1).reshape(x.shape)

    return run


# Resizing


def _resize(
    node: ir.Node, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    mode = text(node, "mode", "nearest")
    if mode not in ("nearest", "linear") or integer(node, "antialias", 0):
        raise no_torch_form(node, f"mode {mode}" if mode not in ("nearest", "linear") else "antialias")
    axes = integers(node, "axes") or list(range(x.ndim))
    before = [x.shape[axis] for axis in axes]
    if sizes is not None and sizes.numel():
        after = sizes.tolist()
        factors = [wish / size for wish, size in zip(after, before, strict=True)]
        policy = text(node, "keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factors = [(min if policy == "not_larger" else max)(factors)] * len(axes)
            after = [floor(size * factors[0] + 0.5) for size in before]
    elif scales is not None:
        factors = scales.tolist()
        # The product is rounded to float32 before its fraction is cut off.
        after = (torch.tensor(before) * scales.cpu()).int().tolist()
    else:
        raise no_torch_form(node, "neither scales nor sizes")
    for axis, size, factor in zip(axes, after, factors, strict=True):
        if size != x.shape[axis] or factor != 1.0:
            x = _resized(node, x, axis, size, factor)
    return x


def _resized(node: ir.Node, x: Tensor, axis: int, size: int, factor: float) -> Tensor:
    """``x`` with one dimension resized, which is all there is to it: both modes are separable."""
    last = x.shape[axis] - 1
    places = _source_places(node, torch.arange(size, device=x.device, dtype=torch.float32), last + 1, factor)
    if text(node, "mode", "nearest") == "nearest":
        rounding = text(node, "nearest_mode", "round_prefer_floor")
        nearest = {
            "round_prefer_floor": (places - 0.5).ceil,
            "round_prefer_ceil": (places + 0.5).floor,
            "floor": places.floor,
            "ceil": places.ceil,
        }[rounding]()
        return x.index_select(axis, nearest.clamp(0, last).long())
    places = places.clamp(0, last)
    low = places.floor().long()
    share = (places - low).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=last)), share)


def _source_places(node: ir.Node, places: Tensor, before: int, factor: float) -> Tensor:
    """Where along the old dimension, of ``before`` entries, the new one's places lie."""
    mode, after = text(node, "coordinate_transformation_mode", "half_pixel"), len(places)
    if mode == "align_corners":
        return places * ((before - 1) / (after - 1) if after > 1 else 0.0)
    if mode == "asymmetric":
        return places / factor
    if mode == "half_pixel_symmetric":
        return (before / 2) * (1 - after / (factor * before)) + (places + 0.5) / factor - 0.5
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and after > 1):
        return (places + 0.5) / factor - 0.5
    if mode == "pytorch_half_pixel":
        return torch.zeros_like(places)
    raise no_torch_form(node, f"coordinates {mode}")


# Attention

_ATTENTION_ATTRIBUTES = {"is_causal", "kv_num_heads", "q_num_heads", "scale", "softcap", "softmax_precision"}


def _attention(
    node: ir.Node,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *others: Tensor | None,
) -> Outputs:
    if any(other is not None for other in others) or node.attributes.keys() - _ATTENTION_ATTRIBUTES:
        raise no_torch_form(node, "nonpad_kv_seqlen or other newer options")
    flat = query.ndim == 3
    if flat:
        heads, shared = integer(node, "q_num_heads", 1), integer(node, "kv_num_heads", 1)
        query = query.reshape(*query.shape[:2], heads, -1).transpose(1, 2)
        key, value = (each.reshape(*each.shape[:2], shared, -1).transpose(1, 2) for each in (key, value))
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    repeats = query.shape[1] // key.shape[1]
    scale = sqrt(real(node, "scale", 1 / sqrt(query.shape[-1])))
    scores = (query * scale) @ (key.repeat_interleave(repeats, 1) * scale).transpose(-1, -2)
    if softcap := real(node, "softcap", 0.0):
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -inf) if mask.dtype == torch.bool else scores + mask
    if integer(node, "is_causal", 0):
        before = key.shape[2] - query.shape[2] if past_key is not None else 0
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(before + 1)
        scores = scores.masked_fill(hidden, -inf)
    y = scores.softmax(-1) @ value.repeat_interleave(repeats, 1)
    return (y.transpose(1, 2).flatten(2) if flat else y), key, value


def _global_max_pool(node: ir.Node, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def _global_average_pool(node: ir.Node, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


#: Each takes a node and its inputs.
LAYERS: dict[str, Callable[..., Outputs]] = {
    "Attention": _attention,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax(torch.log_softmax),
    "LpNormalization": _lp_norm,
    "MatMul": lambda _, a, b: torch.matmul(a, b),
    "MaxPool": _max_pool,
    "RMSNormalization": _rms_norm,
    "Resize": _resize,
    "Softmax": _softmax(torch.softmax),
}
