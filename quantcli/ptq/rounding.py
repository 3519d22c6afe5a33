"""Choosing the codes of a block's layers, each by its own algorithm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantcli import algorithms
from quantcli.algorithms import default_rounding, gptq
from quantcli.algorithms.base import by_rows
from quantcli.blocks.activations import Activations
from quantcli.blocks.calls import Call
from quantcli.core.dtypes import torch_dtype
from quantcli.core.numerics import error_powers, in_groups
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor, RoundedTensor, Rounding
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.ptq.observe import LinearStats

#: Algorithms that need nothing of the data.
_NEED_NO_DATA = ("rtn", "mse")


def round_block(
    block: nn.Module,
    layers: Mapping[str, LayerPlan],
    calls: Sequence[Call],
    targets: Activations | None,
    stats: Mapping[str, LinearStats],
    plan: Plan,
    seed: int,
    report: Callable[[float], None],
) -> dict[str, RoundedTensor]:
    """Codes of every layer of a block, by the layer's name in it.

    Args:
        block: its weights, already transformed; they are not changed.
        layers: linear layers of the block by name.
        calls: the block's calibration inputs, one batch each.
        targets: what the original block returns for each of them, for algorithms that learn from it.
        stats: what was observed of the layers' inputs.
        plan: steps and dtypes.
        seed: what is drawn at random is drawn by it.
        report: told the fraction that is done.
    """
    rounded: dict[str, RoundedTensor] = {}
    dtype = torch_dtype(plan.scale_dtype)
    weights = {name: _weight(block, name) for name in layers}
    by_algorithm: dict[str, dict[str, LayerPlan]] = {}
    for name, layer in layers.items():
        # An expert, say, that no token was sent to.
        unseen = layer.algorithm not in _NEED_NO_DATA and not stats[name].tokens
        by_algorithm.setdefault("" if unseen else layer.algorithm or "", {})[name] = layer
    for algorithm, own in by_algorithm.items():
        if algorithm == "gptq":
            rounded |= _gptq(own, weights, stats, dtype, plan.steps.options("gptq").damping, report)
        elif algorithm == "awq":
            rounded |= _awq(own, weights, stats, dtype)
        elif algorithm == "autoround":
            from quantcli.algorithms import autoround

            assert targets is not None
            formats = {name: _format(layer) for name, layer in own.items()}
            options = plan.steps.options("autoround")
            tensors = autoround.run(block, formats, calls, targets, dtype, options, seed, report)
            rounded |= {name: RoundedTensor(tensor, Rounding(algorithm)) for name, tensor in tensors.items()}
        else:
            for name, layer in own.items():
                rounded[name] = _round_without_data(weights[name].cpu(), layer, dtype, "no token seen")
    return {name: _measured(rounded[name], weights[name].cpu()) for name in layers}


def round_unobserved(weight: Tensor, layer: LayerPlan, plan: Plan) -> RoundedTensor:
    """Codes of a weight, float32 as it is stored, whose inputs are not known: it is in no linear layer of torch's."""
    matrix = weight.reshape(layer.matrix_shape)
    return _measured(_round_without_data(matrix, layer, torch_dtype(plan.scale_dtype), "inputs not observed"), matrix)


def without_data(layer: LayerPlan, because: str) -> Rounding:
    """What chooses a layer's codes where its inputs are not known; if that was not the plan, ``because`` tells why."""
    planned = layer.algorithm or ""
    algorithm = planned if planned in _NEED_NO_DATA else default_rounding(_format(layer))
    return Rounding(algorithm, None if algorithm == planned else f"{because}: {algorithm} in place of {planned}")


def _round_without_data(matrix: Tensor, layer: LayerPlan, dtype: torch.dtype, because: str) -> RoundedTensor:
    rounding = without_data(layer, because)
    return RoundedTensor(by_rows(algorithms.rounding(rounding.algorithm).run, matrix, _format(layer), dtype), rounding)


def _measured(rounded: RoundedTensor, matrix: Tensor) -> RoundedTensor:
    """The same with what the codes cost of the weight, float32 ``[rows, columns]``."""
    signal, noise = error_powers(in_groups(matrix, rounded.tensor.number_format), rounded.tensor)
    return RoundedTensor(rounded.tensor, replace(rounded.rounding, signal=signal, noise=noise))


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _format(layer: LayerPlan) -> NumberFormat:
    assert layer.scheme is not None
    return layer.scheme.weights


def _awq(
    layers: Mapping[str, LayerPlan],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LinearStats],
    dtype: torch.dtype,
) -> dict[str, RoundedTensor]:
    from quantcli.algorithms import awq

    rounded = {}
    for name, layer in layers.items():
        gram = stats[name].gram
        assert gram is not None
        tensor = awq.run(weights[name], _format(layer), dtype, gram=gram)
        rounded[name] = RoundedTensor(_rows_of(tensor, slice(None), tensor.shape), Rounding("awq"))
    return rounded


def _gptq(
    layers: Mapping[str, LayerPlan],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LinearStats],
    dtype: torch.dtype,
    damping: float,
    report: Callable[[float], None],
) -> dict[str, RoundedTensor]:
    """Layers that share an input share a Hessian, and are solved as one matrix: rows do not depend on each other."""
    groups: dict[tuple[int, str, NumberFormat], list[str]] = {}
    for name, layer in layers.items():
        alone = name if _format(layer).granularity.kind == "tensor" else ""
        groups.setdefault((id(stats[name].gram), alone, _format(layer)), []).append(name)
    rounded: dict[str, RoundedTensor] = {}
    # What a weight takes grows with its size times its columns.
    total = sum(weights[name].numel() * weights[name].shape[1] for name in layers)
    left = Counter(id(stats[names[0]].gram) for names in groups.values())
    for (number, _, number_format), names in groups.items():
        gram = stats[names[0]].gram
        assert gram is not None
        matrix = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
        solved = gptq.run(matrix, number_format, dtype, hessian=gram, damping=damping)
        left[number] -= 1
        if not left[number]:
            stats[names[0]].gram = None  # no layer needs it any more
        start = 0
        for name in names:
            rows = slice(start, start := start + len(weights[name]))
            rounded[name] = _outcome(solved, rows, tuple(weights[name].shape), damping)
        report(sum(weights[name].numel() * weights[name].shape[1] for name in rounded) / total)
    return rounded


def _outcome(solved: gptq.Solved, rows: slice, shape: tuple[int, ...], damping: float) -> RoundedTensor:
    tensor = _rows_of(solved.tensor, rows, shape)
    if solved.damping is None:
        fallback = default_rounding(tensor.number_format)
        return RoundedTensor(tensor, Rounding(fallback, f"singular Hessian: {fallback} in place of gptq"))
    note = f"damping {solved.damping:g} for a Hessian that is nearly singular" if solved.damping > damping else None
    return RoundedTensor(tensor, Rounding("gptq", note))


def _rows_of(whole: QuantizedTensor, rows: slice, shape: tuple[int, ...]) -> QuantizedTensor:
    """Some rows of a quantized matrix, in main memory."""
    scale = whole.scale if len(whole.scale) == 1 else whole.scale[rows]
    zero_point = None if whole.zero_point is None else whole.zero_point[rows].cpu()
    return QuantizedTensor(whole.codes[rows].cpu(), scale.cpu(), zero_point, shape, whole.number_format)
