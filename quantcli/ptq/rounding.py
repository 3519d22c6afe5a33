"""Choosing the codes of a block's layers, each by its own algorithm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
from quantcli.core.tensors import QuantizedTensor
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.ptq.observe import LinearStats

#: Algorithms that need nothing of the data.
_PLAIN = ("rtn", "mse")


@dataclass
class Coded:
    """A layer's codes, by which algorithm, and what they cost: sums of squares of the weight and of its error."""

    tensor: QuantizedTensor
    algorithm: str
    signal: float = 0.0
    noise: float = 0.0
    note: str | None = None


def round_block(
    block: nn.Module,
    layers: Mapping[str, LayerPlan],
    calls: Sequence[Call],
    targets: Activations | None,
    stats: Mapping[str, LinearStats],
    plan: Plan,
    seed: int,
    report: Callable[[float], None],
) -> dict[str, Coded]:
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
    coded: dict[str, Coded] = {}
    dtype = torch_dtype(plan.scale_dtype)
    weights = {name: _weight(block, name) for name in layers}
    by_algorithm: dict[str, dict[str, LayerPlan]] = {}
    for name, layer in layers.items():
        # An expert, say, that no token was sent to.
        unseen = layer.algorithm not in _PLAIN and not stats[name].tokens
        by_algorithm.setdefault("" if unseen else layer.algorithm or "", {})[name] = layer
    for algorithm, own in by_algorithm.items():
        if algorithm == "gptq":
            coded |= _gptq(own, weights, stats, dtype, plan.steps.options("gptq").damping, report)
        elif algorithm == "awq":
            coded |= _awq(own, weights, stats, dtype)
        elif algorithm == "autoround":
            from quantcli.algorithms import autoround

            assert targets is not None
            formats = {name: _format(layer) for name, layer in own.items()}
            options = plan.steps.options("autoround")
            tensors = autoround.run(block, formats, calls, targets, dtype, options, seed, report)
            coded |= {name: Coded(tensor, algorithm) for name, tensor in tensors.items()}
        else:
            coded |= {name: _plain(weights[name].cpu(), layer, dtype, "no token seen") for name, layer in own.items()}
    for name, layer in layers.items():
        own_powers = error_powers(in_groups(weights[name].cpu(), _format(layer)), coded[name].tensor)
        coded[name].signal, coded[name].noise = own_powers
    return {name: coded[name] for name in layers}


def round_unobserved(weight: Tensor, layer: LayerPlan, plan: Plan) -> Coded:
    """Codes of a weight, float32 as it is stored, whose inputs are not known: it is in no linear layer of torch's."""
    matrix = weight.reshape(layer.matrix_shape)
    coded = _plain(matrix, layer, torch_dtype(plan.scale_dtype), "inputs not observed")
    coded.signal, coded.noise = error_powers(in_groups(matrix, _format(layer)), coded.tensor)
    return coded


def _plain(matrix: Tensor, layer: LayerPlan, dtype: torch.dtype, because: str) -> Coded:
    """Codes chosen without data; where that was not the plan, ``because`` tells why."""
    number_format = _format(layer)
    planned = layer.algorithm or ""
    algorithm = planned if planned in _PLAIN else default_rounding(number_format)
    tensor = by_rows(algorithms.rounding(algorithm).run, matrix, number_format, dtype)
    note = None if algorithm == planned else f"{because}: {algorithm} in place of {planned}"
    return Coded(tensor, algorithm, note=note)


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
) -> dict[str, Coded]:
    from quantcli.algorithms import awq

    coded = {}
    for name, layer in layers.items():
        gram = stats[name].gram
        assert gram is not None
        tensor = awq.run(weights[name], _format(layer), dtype, gram=gram)
        coded[name] = Coded(_rows_of(tensor, slice(None), tensor.shape), "awq")
    return coded


def _gptq(
    layers: Mapping[str, LayerPlan],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LinearStats],
    dtype: torch.dtype,
    damping: float,
    report: Callable[[float], None],
) -> dict[str, Coded]:
    """Layers that share an input share a Hessian, and are solved as one matrix: rows do not depend on each other."""
    groups: dict[tuple[int, str, NumberFormat], list[str]] = {}
    for name, layer in layers.items():
        alone = name if _format(layer).granularity.kind == "tensor" else ""
        groups.setdefault((id(stats[name].gram), alone, _format(layer)), []).append(name)
    coded: dict[str, Coded] = {}
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
            coded[name] = _outcome(solved, rows, tuple(weights[name].shape), damping)
        report(sum(weights[name].numel() * weights[name].shape[1] for name in coded) / total)
    return coded


def _outcome(solved: gptq.Solved, rows: slice, shape: tuple[int, ...], damping: float) -> Coded:
    tensor = _rows_of(solved.tensor, rows, shape)
    if solved.damping is None:
        fallback = default_rounding(tensor.number_format)
        return Coded(tensor, fallback, note=f"singular Hessian: {fallback} in place of gptq")
    note = f"damping {solved.damping:g} for a Hessian that is nearly singular" if solved.damping > damping else None
    return Coded(tensor, "gptq", note=note)


def _rows_of(whole: QuantizedTensor, rows: slice, shape: tuple[int, ...]) -> QuantizedTensor:
    """Some rows of a quantized matrix, in main memory."""
    scale = whole.scale if len(whole.scale) == 1 else whole.scale[rows]
    zero_point = None if whole.zero_point is None else whole.zero_point[rows].cpu()
    return QuantizedTensor(whole.codes[rows].cpu(), scale.cpu(), zero_point, shape, whole.number_format)
