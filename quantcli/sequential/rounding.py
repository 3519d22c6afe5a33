"""Choosing the codes of a block's layers, each by its own algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcli import plugins
from quantcli.algorithms import gptq
from quantcli.numerics import TORCH_DTYPES, error_powers, in_groups
from quantcli.plan import LayerPlan, Plan
from quantcli.scheme import NumberFormat, QuantizedTensor
from quantcli.sequential.activations import Activations
from quantcli.sequential.calls import Call
from quantcli.sequential.observe import LinearStats

#: Elements worked on at a time by algorithms that take rows one by one.
_CHUNK = 1 << 18


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
    calls: Callable[[], Iterable[Call]],
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
        calls: gives the block's calibration inputs anew each time.
        targets: what the original block returns for each of them, for algorithms that learn from it.
        stats: what was observed of the layers' inputs.
        plan: steps and dtypes.
        seed: what is drawn at random is drawn by it.
        report: told the fraction that is done.
    """
    coded: dict[str, Coded] = {}
    dtype = TORCH_DTYPES[plan.scale_dtype]
    by_algorithm: dict[str, dict[str, LayerPlan]] = {}
    for name, layer in layers.items():
        by_algorithm.setdefault(layer.algorithm or "", {})[name] = layer
    for algorithm, own in by_algorithm.items():
        weights = {name: _weight(block, name) for name in own}
        if algorithm == "gptq":
            coded |= _gptq(own, weights, stats, dtype, plan.steps.options("gptq").damping)
        elif algorithm == "awq":
            from quantcli.algorithms import awq

            coded |= {
                name: Coded(awq.run(weights[name], _format(layer), dtype, gram=stats[name].gram), algorithm)
                for name, layer in own.items()
            }
        elif algorithm == "autoround":
            from quantcli.algorithms import autoround

            assert targets is not None
            formats = {name: _format(layer) for name, layer in own.items()}
            tensors = autoround.run(
                block, formats, list(calls()), targets, dtype, plan.steps.options("autoround"), seed, report
            )
            coded |= {name: Coded(tensor, algorithm) for name, tensor in tensors.items()}
        else:
            coded |= {
                name: Coded(_by_rows(algorithm, weights[name], _format(layer), dtype), algorithm)
                for name, layer in own.items()
            }
        for name in own:
            each = coded[name]
            each.signal, each.noise = error_powers(in_groups(weights[name].cpu(), _format(own[name])), each.tensor)
    return coded


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _format(layer: LayerPlan) -> NumberFormat:
    assert layer.scheme is not None
    return layer.scheme.weights


def _by_rows(algorithm: str, weight: Tensor, number_format: NumberFormat, dtype: torch.dtype) -> QuantizedTensor:
    weight = weight.cpu()
    rounding = plugins.rounding(algorithm)
    if number_format.granularity.kind not in ("channel", "group"):
        return rounding.run(weight, number_format, dtype)
    step = max(1, _CHUNK // weight.shape[1])
    parts = [rounding.run(rows, number_format, dtype) for rows in torch.split(weight, step)]
    return _joined(parts, weight.shape)


def _gptq(
    layers: Mapping[str, LayerPlan],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LinearStats],
    dtype: torch.dtype,
    damping: float,
) -> dict[str, Coded]:
    """Layers that share an input share a Hessian, and are solved as one matrix: rows do not depend on each other."""
    groups: dict[tuple[int, NumberFormat], list[str]] = {}
    for name, layer in layers.items():
        alone = id(layer) if _format(layer).granularity.kind == "tensor" else 0
        groups.setdefault((id(stats[name].gram) ^ alone, _format(layer)), []).append(name)
    coded: dict[str, Coded] = {}
    for (_, number_format), names in groups.items():
        gram = stats[names[0]].gram
        if gram is None:  # an expert that no token was sent to
            gram = torch.zeros(weights[names[0]].shape[1], weights[names[0]].shape[1])
        matrix = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
        solved = gptq.run(matrix, number_format, dtype, hessian=gram, damping=damping)
        start = 0
        for name in names:
            rows = slice(start, start := start + len(weights[name]))
            coded[name] = _outcome(solved, rows, tuple(weights[name].shape), damping)
    return coded


def _outcome(solved: gptq.Solved, rows: slice, shape: tuple[int, ...], damping: float) -> Coded:
    whole = solved.tensor
    scale = whole.scale if len(whole.scale) == 1 else whole.scale[rows]
    zero_point = None if whole.zero_point is None else whole.zero_point[rows].cpu()
    tensor = QuantizedTensor(whole.codes[rows].cpu(), scale.cpu(), zero_point, shape, whole.number_format)
    if solved.damping is None:
        fallback = "mse" if whole.number_format.bits == 4 else "rtn"
        seen = "saw no token" if solved.dead == whole.codes.shape[1] else "has a singular Hessian"
        return Coded(tensor, fallback, note=f"it {seen}: {fallback} in place of gptq")
    note = f"damping {solved.damping:g}: its Hessian is nearly singular" if solved.damping > damping else None
    return Coded(tensor, "gptq", note=note)


def _joined(parts: Sequence[QuantizedTensor], shape: torch.Size) -> QuantizedTensor:
    codes, scale = (torch.cat([getattr(part, field) for part in parts]) for field in ("codes", "scale"))
    zero_point = None if parts[0].zero_point is None else torch.cat([p.zero_point for p in parts])  # type: ignore[misc]
    return QuantizedTensor(codes, scale, zero_point, tuple(shape), parts[0].number_format)
