"""Torch forms of the ONNX operators that move entries: shapes, slices, gathering and scattering."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import ceil, prod
from operator import mul
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quantcli.onnx.execution.attributes import Outputs, axes_of, no_torch_form, text
from quantcli.onnx.graph.values import integer, integers

if TYPE_CHECKING:
    import onnx_ir as ir

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


# Shapes


def _reshape(node: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    sizes: list[int] = shape.tolist()
    if not integer(node, "allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(tuple(sizes))


def _flatten(node: ir.Node, x: Tensor) -> Tensor:
    axis = integer(node, "axis", 1)
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _transpose(node: ir.Node, x: Tensor) -> Tensor:
    return x.permute(integers(node, "perm") or list(range(x.ndim))[::-1])


def _squeeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(node, axes)
    return x.squeeze() if dims is None else x.squeeze(tuple(dims))


def _unsqueeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(node, axes) or []
    for dim in sorted(dim % (x.ndim + len(dims)) for dim in dims):
        x = x.unsqueeze(dim)
    return x


def _concat(node: ir.Node, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, integer(node, "axis", 0))


def _split(node: ir.Node, x: Tensor, split: Tensor | None = None) -> Outputs:
    axis = integer(node, "axis", 0)
    sizes = integers(node, "split") if split is None else split.tolist()
    if sizes is None:
        size = ceil(x.shape[axis] / len(node.outputs))
        sizes = [size] * (len(node.outputs) - 1)
        sizes.append(x.shape[axis] - sum(sizes))
    return torch.split(x, sizes, axis)


def _slice(
    _: ir.Node, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    count = starts.numel()
    dims = list(range(count)) if axes is None else axes.tolist()
    strides = [1] * count if steps is None else steps.tolist()
    for start, end, dim, step in zip(starts.tolist(), ends.tolist(), dims, strides, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[dim]))
        # Torch has no negative steps.
        low, high = (min(places[0], places[-1]), max(places[0], places[-1]) + 1) if places else (0, 0)
        index = [slice(None)] * x.ndim
        index[dim] = slice(low, high, abs(step))
        x = x[tuple(index)] if step > 0 else x[tuple(index)].flip(dim)
    return x


def _expand(_: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(shape.tolist())))


def _tile(_: ir.Node, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


def _pad(node: ir.Node, x: Tensor, pads: Tensor, constant: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    mode, sides = text(node, "mode", "constant"), pads.tolist()
    dims = [dim % x.ndim for dim in (range(x.ndim) if axes is None else axes.tolist())]
    pairs = dict(zip(dims, zip(sides[: len(dims)], sides[len(dims) :], strict=True), strict=True))
    if mode == "constant":
        value = 0 if constant is None else constant.item()
        return functional.pad(
            x, [side for dim in reversed(range(x.ndim)) for side in pairs.get(dim, (0, 0))], value=value
        )
    for dim, (before, after) in pairs.items():
        places, last = torch.arange(-before, x.shape[dim] + after, device=x.device), x.shape[dim] - 1
        if mode == "edge":
            places = places.clamp(0, last)
        elif mode == "reflect":
            places = last - (places % max(2 * last, 1) - last).abs()
        elif mode == "wrap":
            places = places % (last + 1)
        else:
            raise no_torch_form(node, f"mode {mode}")
        x = x.index_select(dim, places)
    return x


def _depth_to_space(node: ir.Node, x: Tensor) -> Tensor:
    size, (batch, channels, height, width) = integer(node, "blocksize", 1), x.shape
    left = channels // size**2
    if text(node, "mode", "DCR") == "DCR":
        blocks = x.reshape(batch, size, size, left, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(batch, left, size, size, height, width).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(batch, left, height * size, width * size)


def _space_to_depth(node: ir.Node, x: Tensor) -> Tensor:
    size, (batch, channels, height, width) = integer(node, "blocksize", 1), x.shape
    blocks = x.reshape(batch, channels, height // size, size, width // size, size)
    order = (3, 5, 1, 2, 4) if text(node, "mode", "DCR") == "DCR" else (1, 3, 5, 2, 4)
    return blocks.permute(0, *order).reshape(batch, channels * size**2, height // size, width // size)


# Places


def _counted(indices: Tensor, size: int) -> Tensor:
    """Indices of which negative ones count from the end, as int64."""
    return torch.where(indices < 0, indices + size, indices).long()


def _gather(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = integer(node, "axis", 0) % x.ndim
    rows = x.index_select(axis, _counted(indices, x.shape[axis]).reshape(-1))
    return rows.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _gather_elements(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = integer(node, "axis", 0)
    return x.gather(axis, _counted(indices, x.shape[axis]))


def _gather_nd(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    batch, depth = integer(node, "batch_dims", 0), indices.shape[-1]
    count = prod(x.shape[:batch])
    places = indices.reshape(count, -1, depth).unbind(-1)
    rows = torch.arange(count, device=x.device)[:, None]
    picked = x.reshape(count, *x.shape[batch:])[(rows, *places)]
    return picked.reshape(indices.shape[:-1] + x.shape[batch + depth :])


def _scatter_nd(node: ir.Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    depth, mode = indices.shape[-1], text(node, "reduction", "none")
    sizes = x.shape[:depth]
    strides = [*accumulate(reversed(sizes[1:]), mul, initial=1)][::-1]
    rows = sum(_counted(each, n) * stride for each, n, stride in zip(indices.unbind(-1), sizes, strides, strict=True))
    assert isinstance(rows, Tensor)
    flat, news = x.reshape(prod(sizes), -1), updates.reshape(rows.numel(), -1)
    return _scattered(flat, 0, rows.reshape(-1, 1).expand_as(news), news, mode).reshape(x.shape)


def _scatter_elements(node: ir.Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis = integer(node, "axis", 0)
    return _scattered(x, axis, _counted(indices, x.shape[axis]), updates, text(node, "reduction", "none"))


def _scattered(x: Tensor, axis: int, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    if mode == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCTIONS[mode])


def _one_hot(node: ir.Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    size = int(depth.item())
    codes = torch.arange(size, device=indices.device)
    hot = (_counted(indices, size).unsqueeze(-1) == codes).movedim(-1, integer(node, "axis", -1))
    return torch.where(hot, values[1], values[0])


def _trilu(node: ir.Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    return (torch.triu if integer(node, "upper", 1) else torch.tril)(x, 0 if k is None else int(k.item()))


#: Each takes a node and its inputs.
SHAPES: dict[str, Callable[..., Outputs]] = {
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
