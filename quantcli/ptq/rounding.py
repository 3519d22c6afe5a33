"""Choosing the codes of a block's layers, each by its own algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantcli import algorithms
from quantcli.algorithms import default_rounding, needs_no_data
from quantcli.algorithms.base import BlockLayers, LinearStats, by_rows
from quantcli.blocks.activations import Activations
from quantcli.blocks.calls import Call
from quantcli.core.dtypes import torch_dtype
from quantcli.core.numerics import as_stored, error_powers, in_groups
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import RoundedTensor, Rounding
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.ptq.folds import matrix
from quantcli.system import ranks


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
    """Codes of every layer of a block, by the layer's name in it. Ranks share the layers, and tell each other.

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
    weights = {name: matrix(block.get_submodule(name)).detach().contiguous() for name in layers}
    by_algorithm: dict[str, dict[str, LayerPlan]] = {}
    tokens = _tokens_of_experts({name: stats[name] for name, layer in layers.items() if layer.role == "expert"})
    for name, layer in layers.items():
        # An expert, say, that no token was sent to.
        unseen = not needs_no_data(layer.algorithm) and not stats[name].tokens
        by_algorithm.setdefault("" if unseen else layer.algorithm or "", {})[name] = layer
    mine = _shared(layers, weights, stats)
    for algorithm, planned in by_algorithm.items():
        own = {name: layer for name, layer in planned.items() if name in mine}
        if not algorithm or needs_no_data(algorithm):
            for name, layer in own.items():
                rounded[name] = _round_without_data(weights[name].cpu(), layer, dtype, "no token seen")
        elif own:
            own_weights = {name: weights[name] for name in own}
            # Blocks divide rows here: every container of data-driven codes wants that.
            formats = {name: _format(layer).in_rows for name, layer in own.items()}
            work = BlockLayers(block, own_weights, formats, stats, calls, targets, dtype, seed, report)
            chosen = algorithms.calibrated_rounding(algorithm).round_layers(work, plan.steps.options(algorithm))
            rounded |= {name: _as_asked(found, _format(own[name])) for name, found in chosen.items()}
    measured = {name: _measured(found, weights[name].cpu()) for name, found in rounded.items()}
    everywhere = {name: found for part in ranks.gather(measured) for name, found in part.items()}
    return {name: _counted(everywhere[name], tokens.get(name)) for name in layers}


def _shared(
    layers: Mapping[str, LayerPlan], weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]
) -> set[str]:
    """The layers that this rank rounds: those that share an input, and so a Hessian, stay together."""
    together: dict[int, list[str]] = {}
    for name in layers:
        together.setdefault(id(stats[name]), []).append(name)
    # What a weight takes grows with its size times its columns.
    cost = {name: weight.numel() * weight.shape[1] for name, weight in weights.items()}
    costs = {tuple(names): sum(cost[name] for name in names) for names in together.values()}
    return {name for names in ranks.share(costs) for name in names}


def _tokens_of_experts(stats: Mapping[str, LinearStats]) -> dict[str, int]:
    """How many tokens each expert's layer was given, where all data was run to gather statistics of them."""
    gathered = any(
        seen.gram is not None or seen.absmax is not None or seen.sample is not None for seen in stats.values()
    )
    return {name: seen.tokens for name, seen in stats.items()} if gathered else {}


def _counted(rounded: RoundedTensor, tokens: int | None) -> RoundedTensor:
    return RoundedTensor(rounded.tensor, replace(rounded.rounding, tokens=tokens))


def round_unobserved(weight: Tensor, layer: LayerPlan, plan: Plan) -> RoundedTensor:
    """Codes of a weight, float32 as it is stored, whose inputs are not known: it is in no linear layer of torch's."""
    rows = layer.as_matrix(weight)
    return _measured(_round_without_data(rows, layer, torch_dtype(plan.scale_dtype), "inputs not observed"), rows)


def without_data(layer: LayerPlan, because: str) -> Rounding:
    """What chooses a layer's codes where its inputs are not known; if that was not the plan, ``because`` tells why."""
    planned = layer.algorithm or ""
    algorithm = planned if needs_no_data(planned) else default_rounding(_format(layer))
    return Rounding(algorithm, None if algorithm == planned else f"{because}: {algorithm} in place of {planned}")


def _round_without_data(weight: Tensor, layer: LayerPlan, dtype: torch.dtype, because: str) -> RoundedTensor:
    rounding = without_data(layer, because)
    return RoundedTensor(by_rows(algorithms.rounding(rounding.algorithm).run, weight, _format(layer), dtype), rounding)


def _measured(rounded: RoundedTensor, weight: Tensor) -> RoundedTensor:
    """The same with what the codes cost of the weight, float32 ``[rows, columns]``."""
    signal, noise = error_powers(in_groups(weight, rounded.tensor.number_format), as_stored(rounded.tensor))
    return RoundedTensor(rounded.tensor, replace(rounded.rounding, signal=signal, noise=noise))


def _as_asked(rounded: RoundedTensor, number_format: NumberFormat) -> RoundedTensor:
    """Codes in the plan's own number format, which has a flat list of scales where it has blocks."""
    if rounded.tensor.number_format == number_format:
        return rounded
    tensor = replace(rounded.tensor, scale=rounded.tensor.scale.reshape(-1), number_format=number_format)
    return RoundedTensor(tensor, rounded.rounding)


def _format(layer: LayerPlan) -> NumberFormat:
    assert layer.scheme is not None
    return layer.scheme.weights
