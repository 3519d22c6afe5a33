"""AWQ: make the weights that large inputs meet larger before they are rounded, and clip for the output's sake.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv:2306.00978. A layer
computes the same when its columns are multiplied by ``s`` and its inputs divided by it, but rounds differently: columns
with a larger ``s`` lose less. ``s = mean|x|^alpha``, alpha found on a grid; then each group's range is clipped.

The paper runs the layers on a sample to see a candidate's error. Here nothing is run: with G the sum of x x^T over all
tokens, the squared output error of a layer is exactly tr(D G D^T), D being the change of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from quantcli.algorithms.base import BlockLayers, NoOptions, Readers
from quantcli.algorithms.mse import clip_search, group_range, rounding_error
from quantcli.core.numerics import choose_qparams, in_groups, quantize
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor, RoundedTensor, Rounding

NEEDS = frozenset({"gram", "mean_abs"})

#: Steps of alpha from 0 (no scaling), as in the paper's code.
GRID = 20
#: Rows of a layer that are looked at in the search of alpha; from larger ones so many are picked, evenly.
SEARCH_ROWS = 512
#: Elements of a weight whose ranges are searched at a time: they fit a core's cache.
CHUNK_ELEMENTS = 1 << 16


def supports(number_format: NumberFormat) -> str | None:
    """Codes with a scale per channel, or per group or block of one."""
    if number_format.granularity.kind not in ("channel", "group", "block"):
        return f"awq works on scales per channel or group, not per {number_format.granularity.kind}"
    return None


def input_scale(readers: Readers, options: NoOptions) -> Tensor:
    """As a transform; see `choose_scale`."""
    stats, formats = readers.stats, [scheme.weights for scheme in readers.schemes]
    assert stats.gram is not None and stats.mean_abs is not None
    tie = partial(readers.tie, mean=True)
    return choose_scale(stats.gram, stats.mean_abs, readers.weights, formats, readers.scale_dtype, tie)


def round_layers(layers: BlockLayers, options: NoOptions) -> dict[str, RoundedTensor]:
    """As a calibrated rounding; see `run`."""
    rounded = {}
    for name, weight in layers.weights.items():
        gram = layers.stats[name].gram
        assert gram is not None
        tensor = run(weight, layers.formats[name], layers.scale_dtype, gram=gram)
        rounded[name] = RoundedTensor(tensor.on_cpu(), Rounding("awq"))
    return rounded


def choose_scale(
    gram: Tensor,
    input_mean_abs: Tensor,
    weights: Sequence[Tensor],
    number_formats: Sequence[NumberFormat],
    scale_dtype: torch.dtype,
    tie: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The scale that the columns of some layers are best multiplied by, and their inputs divided.

    Args:
        gram: float32 ``[columns, columns]``, the sum of x x^T over the calibration tokens.
        input_mean_abs: float32 ``[columns]``, the mean magnitude of each input channel.
        weights: float32 ``[rows, columns]`` of each layer that reads these inputs.
        number_formats: how each of them is quantized.
        scale_dtype: what the scales of the groups are stored as.
        tie: makes values equal that must have one scale (see `quantcli.ptq.folds.Fold`).

    Returns:
        float32 ``[columns]``, positive; all ones where no scale lowers the error.
    """
    magnitude = input_mean_abs if tie is None else tie(input_mean_abs)
    rows = [weight[:: -(-len(weight) // SEARCH_ROWS)] for weight in weights]
    best, least = torch.ones_like(magnitude), torch.inf
    for step in range(GRID):
        scale = grid_scale(magnitude, step / GRID)
        error = 0.0
        for weight, number_format in zip(rows, number_formats, strict=True):
            change = _change(weight * scale, number_format, scale_dtype).div_(scale)
            error += float(torch.sum((change @ gram).mul_(change)))
        if error < least:
            best, least = scale, error
    return best


def _change(weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """What rounding to nearest adds to a matrix."""
    groups = in_groups(weight, number_format)
    low, high = group_range(groups, number_format)
    scale, zero_point = choose_qparams(low, high, number_format, scale_dtype)
    return rounding_error(groups, scale, zero_point, number_format, torch.empty_like(groups)).reshape(weight.shape)


def grid_scale(magnitude: Tensor, alpha: float) -> Tensor:
    """``magnitude ** alpha``, its largest and smallest value as far above one as below it; one for dead channels."""
    alive = magnitude > 0
    if not bool(alive.any()):
        return torch.ones_like(magnitude)
    scale = magnitude.pow(alpha).clamp_(min=1e-4)
    scale /= (scale[alive].amax() * scale[alive].amin()).sqrt()
    return torch.where(alive, scale, 1.0)


def run(weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype, *, gram: Tensor) -> QuantizedTensor:
    """Quantize ``weight``, float32 ``[rows, columns]``, each group's range clipped to its least output error.

    The error of a group is d G_gg d^T, where G_gg is its block of ``gram``, float32 ``[columns, columns]``: what the
    layer's output would lose if all other groups were exact. The unclipped range is one of those tried.
    """
    groups = in_groups(weight, number_format)
    count, size = groups.shape[1:]
    blocks = gram.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    parts = [
        _clipped(rows.transpose(0, 1).contiguous(), blocks, number_format, scale_dtype)
        for rows in torch.split(groups, step)
    ]
    scale = torch.cat([part[0] for part in parts], 1).T.contiguous()
    offsets = [part[1] for part in parts if part[1] is not None]
    zero_point = torch.cat(offsets, 1).T.contiguous() if offsets else None
    codes = quantize(groups, scale, zero_point, number_format).reshape(weight.shape)
    return QuantizedTensor(codes, scale, zero_point, tuple(weight.shape), number_format)


def _clipped(
    groups: Tensor, blocks: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point ``[groups, rows]`` with the least error on the grid of ranges.

    ``groups`` is ``[groups, rows, size]`` here, and ``blocks`` ``[groups, size, size]``: one product for all.
    """
    change, product = torch.empty_like(groups), torch.empty_like(groups)

    def error(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        rounding_error(groups, scale, zero_point, number_format, change)
        return torch.bmm(change, blocks, out=product).mul_(change).sum(-1)

    return clip_search(groups, number_format, scale_dtype, error)
