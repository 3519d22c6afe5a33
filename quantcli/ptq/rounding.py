"""Choosing the codes of a block's layers, each by its own algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcli import algorithms
from quantcli.algorithms import default_rounding, needs_no_data
from quantcli.algorithms.base import BlockLayers, LinearStats, by_rows
from quantcli.blocks.activations import Activations
from quantcli.blocks.calls import Call
from quantcli.core.dtypes import torch_dtype
from quantcli.core.numerics import error_powers, in_groups
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor
from quantcli.planning.plan import LayerPlan, Plan


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
        unseen = not needs_no_data(layer.algorithm) and not stats[name].tokens
        by_algorithm.setdefault("" if unseen else layer.algorithm or "", {})[name] = layer
    for algorithm, own in by_algorithm.items():
        if not algorithm or needs_no_data(algorithm):
            coded |= {name: _plain(weights[name].cpu(), layer, dtype, "no token seen") for name, layer in own.items()}
            continue
        work = BlockLayers(
            block,
            {name: weights[name] for name in own},
            {name: _format(layer) for name, layer in own.items()},
            stats,
            calls,
            targets,
            dtype,
            seed,
            report,
        )
        rounded = algorithms.calibrated_rounding(algorithm).round_layers(work, plan.steps.options(algorithm))
        for name, each in rounded.items():
            coded[name] = Coded(each.tensor, each.rounding.algorithm, note=each.rounding.note)
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
    algorithm = planned if needs_no_data(planned) else default_rounding(number_format)
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
