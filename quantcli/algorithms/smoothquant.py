"""SmoothQuant: divide the inputs of a layer by a scale per channel, and multiply its weight by it.

Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
arXiv:2211.10438. A few input channels of a transformer are far larger than all others, and one scale per token, or
for the whole tensor, leaves the others few codes. ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` moves a part of that
difficulty into the weight, which has a scale per row. The paper takes one alpha for a model; here each place has the
one with the least error of its layers' outputs, and none where nothing is gained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from quantcli.algorithms import rtn
from quantcli.algorithms.base import NoOptions, Readers
from quantcli.core.numerics import choose_qparams, dequantize, quantize
from quantcli.core.scheme import Granularity, NumberFormat, Scheme

NEEDS = frozenset({"absmax", "sample"})

#: The paper recommends 0.5 for most models and 0.75 for those with larger outliers.
ALPHAS = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
#: Rows of a layer that are looked at in the search; from larger ones so many are picked, evenly.
SEARCH_ROWS = 1024


def supports(number_format: NumberFormat) -> str | None:
    """Integer weights."""
    return "smoothquant balances the ranges of integers; nf4 is none" if number_format.dtype == "nf4" else None


def input_scale(readers: Readers, options: NoOptions) -> Tensor:
    """As a transform; see `choose_scale`."""
    stats = readers.stats
    assert stats.absmax is not None and stats.sample is not None
    tie = partial(readers.tie, mean=False)
    return choose_scale(stats.absmax, stats.sample, readers.weights, readers.schemes, tie)


def choose_scale(
    input_absmax: Tensor,
    sample: Tensor,
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    tie: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The scale that the inputs of some layers are best divided by.

    Args:
        input_absmax: float32 ``[columns]``, the largest magnitude of each input channel in the calibration data.
        sample: float32 ``[tokens, columns]``, some of the inputs, which the error is measured on.
        weights: float32 ``[rows, columns]`` of each layer that reads these inputs.
        schemes: how the weight and the inputs of each of them are quantized.
        tie: makes values equal that must have one scale (see `quantcli.ptq.folds.Fold`).

    Returns:
        float32 ``[columns]``, positive; all ones where smoothing does not lower the error. A channel that is zero, in
        the inputs or in the weights, keeps its scale of one.
    """
    weight_absmax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    if tie is not None:
        input_absmax, weight_absmax = tie(input_absmax), tie(weight_absmax)
    rows = [_some_rows(weight) for weight in weights]
    wanted = [sample @ weight.T for weight in rows]
    best = torch.ones_like(input_absmax)
    least = _error(best, input_absmax, sample, rows, wanted, schemes)
    for alpha in ALPHAS:
        scale = smoothing_scale(input_absmax, weight_absmax, alpha)
        error = _error(scale, input_absmax, sample, rows, wanted, schemes)
        if error < least:
            best, least = scale, error
    return best


def smoothing_scale(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Equation 4 of the paper, about a geometric mean of one; one where a channel is zero. Float32 ``[columns]``."""
    alive = (input_absmax > 0) & (weight_absmax > 0)
    if not bool(alive.any()):
        return torch.ones_like(input_absmax)
    logarithm = alpha * input_absmax[alive].log() - (1 - alpha) * weight_absmax[alive].log()
    scale = torch.ones_like(input_absmax)
    # The mean is free: it moves nothing between channels, and around one no stored norm leaves fp16's range.
    scale[alive] = (logarithm - logarithm.mean()).exp()
    return scale


def fake_quantized_inputs(inputs: Tensor, number_format: NumberFormat, absmax: Tensor) -> Tensor:
    """What is left of inputs, ``[tokens, columns]``: with a scale per token, or one for magnitudes up to ``absmax``."""
    if number_format.granularity.kind == "token":
        return rtn.fake_quantized(inputs, NumberFormat(number_format.dtype, Granularity("channel")))
    groups = inputs.reshape(1, 1, -1)
    scale, _ = choose_qparams(None, absmax.reshape(1, 1), number_format)
    return dequantize(quantize(groups, scale, None, number_format), scale, None, number_format).reshape(inputs.shape)


def _error(
    scale: Tensor,
    input_absmax: Tensor,
    sample: Tensor,
    weights: Sequence[Tensor],
    wanted: Sequence[Tensor],
    schemes: Sequence[Scheme],
) -> float:
    """Squared error of the outputs in relation to their power, summed over layers."""
    absmax = (input_absmax / scale).amax()
    inputs = {
        each: sample / scale if each is None else fake_quantized_inputs(sample / scale, each, absmax)
        for each in {scheme.inputs for scheme in schemes}
    }
    error = 0.0
    for weight, output, scheme in zip(weights, wanted, schemes, strict=True):
        difference = inputs[scheme.inputs] @ rtn.fake_quantized(weight * scale, scheme.weights).T - output
        power = float(output.square().sum())
        error += float(difference.square().sum()) / power if power else 0.0
    return error


def _some_rows(weight: Tensor) -> Tensor:
    return weight[:: -(-len(weight) // SEARCH_ROWS)]
