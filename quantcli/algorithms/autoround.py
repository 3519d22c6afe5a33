"""AutoRound: learn, block by block, which way each weight is rounded and how far each group's range reaches.

Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, arXiv:2309.05516.
A weight becomes ``scale * clamp(round(weight / scale + offset))`` with an offset in -0.5..0.5 and a scale of up to
half as much again or as little as its first choice. Both follow the sign of the gradient of the squared difference
between what the block returns and what the original block returned, with a rate that falls to zero.

As in the authors' code scales start from the full range, the largest weight being the lowest code: from a clip search
a model becomes as good on text like that which it is calibrated on, and worse on other text. Differences from it: what
is taken is the best of a few states, the first one among them, by the loss over more samples than one batch; and
gradients of rounding are written out, since they follow from the weight's gradient alone and need no graph of their
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from quantcli.algorithms import mse
from quantcli.algorithms.base import AlgorithmOptions, BlockLayers, Call, Targets
from quantcli.core.numerics import choose_qparams, code_range, in_groups, stored_scale
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor, RoundedTensor, Rounding

NEEDS = frozenset({"original"})

#: Samples over which states are compared, about.
_MEASURED_SAMPLES = 32
#: How far a scale may move from its first choice.
SCALE_RANGE = (0.5, 1.5)


def supports(number_format: NumberFormat) -> str | None:
    """Integer codes with a scale per tensor, channel or group."""
    if number_format.dtype == "nf4":
        return "autoround rounds to an even grid, which nf4 is not; use gptq or awq"
    return None


@dataclass
class LearnedRounding:
    """One weight's rounding while it is learned. All but ``original`` change.

    ``offset``: float32 like the weight in groups, -0.5..0.5. ``factor``: of each group's scale, ``[..., 1]``.
    """

    original: Tensor
    number_format: NumberFormat
    scale_dtype: torch.dtype
    base: Tensor
    zero_point: Tensor | None
    offset: Tensor = field(init=False)
    factor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.offset = torch.zeros_like(self.original)
        self.factor = torch.ones_like(self.base)
        self._low, self._high = self._bounds()

    @classmethod
    def start(cls, weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> LearnedRounding:
        """Nearest rounding of ``weight``, float32 ``[rows, columns]``, in its full range."""
        groups = in_groups(weight, number_format)
        low, high = mse.group_range(groups, number_format)
        if mse.has_signed_scales(number_format):
            qmin, qmax = code_range(number_format)
            high = high * ((qmax - qmin) / (-2 * qmin))
        scale, offset = choose_qparams(low, high, number_format, scale_dtype)
        zero_point = None if offset is None else offset.float().unsqueeze(-1)
        return cls(groups, number_format, scale_dtype, scale.unsqueeze(-1), zero_point)

    def _bounds(self) -> tuple[Any, Any]:
        """Smallest and largest multiple of the scale."""
        low, high = code_range(self.number_format)
        return (low, high) if self.zero_point is None else (low - self.zero_point, high - self.zero_point)

    @property
    def scale(self) -> Tensor:
        """Scales as they will be stored, ``[..., 1]``."""
        coarse = self.number_format.coarse and self.zero_point is not None
        return stored_scale(self.base * self.factor, self.scale_dtype, coarse=coarse)

    def steps(self, scale: Tensor) -> Tensor:
        """Whole multiples of the scale, before they are limited to the codes there are."""
        return torch.addcdiv(self.offset, self.original, scale).round_()

    def weight(self) -> Tensor:
        """The rounded weight, float32 like the original in groups."""
        scale = self.scale
        return self.steps(scale).clamp_(self._low, self._high).mul_(scale)

    def learn(self, gradient: Tensor, rate: float) -> None:
        """Follow the sign of the loss's gradient by the rounded weight; shapes as of the weight.

        Rounding counts as having slope one, and clamping as having none where it cuts (straight-through). By
        the scale a rounded value then has the slope ``steps - weight / scale``, and a cut one its code.
        """
        scale = self.scale
        # Offset and factor count in multiples of the scale, which may be negative.
        gradient = gradient.reshape(self.original.shape) * self.base.sign()
        steps = self.steps(scale)
        inside = (steps >= self._low) & (steps <= self._high)
        slope = steps.clamp_(self._low, self._high).addcdiv_(self.original * inside, scale, value=-1)
        by_scale = (slope.mul_(gradient)).sum(-1, keepdim=True)
        self.offset.sub_(gradient.sign().mul_(inside), alpha=rate).clamp_(-0.5, 0.5)
        self.factor.sub_(by_scale.sign(), alpha=rate).clamp_(*SCALE_RANGE)

    def tensor(self, shape: torch.Size) -> QuantizedTensor:
        """The codes chosen."""
        scale = self.scale
        steps = self.steps(scale).clamp_(self._low, self._high)
        codes = steps if self.zero_point is None else steps + self.zero_point
        zero_point = None if self.zero_point is None else self.zero_point.squeeze(-1).to(torch.int8).cpu()
        return QuantizedTensor(
            codes.to(torch.int8).reshape(shape).cpu(),
            scale.squeeze(-1).cpu(),
            zero_point,
            tuple(shape),
            self.number_format,
        )


def round_layers(layers: BlockLayers, options: Options) -> dict[str, RoundedTensor]:
    """As a calibrated rounding; see `run`."""
    assert layers.targets is not None
    block, formats, scale_dtype = layers.block, layers.formats, layers.scale_dtype
    tensors = run(block, formats, layers.calls, layers.targets, scale_dtype, options, layers.seed, layers.report)
    return {name: RoundedTensor(tensor, Rounding("autoround")) for name, tensor in tensors.items()}


def run(
    block: nn.Module,
    formats: Mapping[str, NumberFormat],
    calls: Sequence[Call],
    targets: Targets,
    scale_dtype: torch.dtype,
    options: Options,
    seed: int,
    report: Callable[[float], None],
) -> dict[str, QuantizedTensor]:
    """Codes of a block's linear layers, by name.

    Args:
        block: its weights are changed meanwhile, and put back.
        formats: number format of each layer, by its name in the block.
        calls: the block's inputs, one batch each.
        targets: what the original block returned for each of them.
        scale_dtype: what scales are rounded to.
        options: iterations and learning rate.
        seed: batches are drawn by it.
        report: told the fraction that is done.
    """
    weights = {name: _weight(block, name) for name in formats}
    originals = {name: weight.data for name, weight in weights.items()}
    learned = {name: LearnedRounding.start(originals[name], form, scale_dtype) for name, form in formats.items()}
    rate = options.learning_rate or 1.0 / options.iterations
    batches = _drawn(calls, options.batch_size, seed)
    best = _Best(block, calls, targets)
    for weight in weights.values():
        weight.requires_grad_(True)
    for iteration in range(options.iterations + 1):
        for name, rounding in learned.items():
            weights[name].data = rounding.weight().reshape(originals[name].shape)
        if iteration in _measured(options.iterations):
            best.consider(learned, originals)
        if iteration == options.iterations:
            break
        for weight in weights.values():
            weight.grad = None
        for number, rows in next(batches).items():
            call, wanted = calls[number].rows(rows), targets[number][rows]
            with torch.enable_grad():
                output = call.run(block)
                torch.nn.functional.mse_loss(output, wanted.to(output.device), reduction="sum").backward()  # type: ignore[no-untyped-call]
        left = 1 - iteration / options.iterations
        for name, rounding in learned.items():
            gradient = weights[name].grad
            if gradient is not None:
                rounding.learn(gradient, rate * left)
        report((iteration + 1) / options.iterations)
    for name, weight in weights.items():
        weight.requires_grad_(False)
        weight.data, weight.grad = originals[name], None
    return best.tensors


class _Best:
    """The codes with which the block came closest to what it returned originally, over a part of the calls."""

    def __init__(self, block: nn.Module, calls: Sequence[Call], targets: Targets) -> None:
        self.tensors: dict[str, QuantizedTensor] = {}
        self._loss = math.inf
        self._block, self._calls, self._targets = block, calls, targets
        most = max(1, _MEASURED_SAMPLES // max(1, len(calls[0].hidden))) if len(calls) else 0
        step = max(1, -(-len(calls) // max(1, most)))
        self._chosen = range(0, len(calls), step)

    def consider(self, learned: Mapping[str, LearnedRounding], originals: Mapping[str, Tensor]) -> None:
        """Measure the block, whose weights are the learned ones now, and keep the codes if it is better than before."""
        loss = 0.0
        with torch.no_grad():
            for number in self._chosen:
                output = self._calls[number].run(self._block)
                wanted = self._targets[number].to(output.device)
                loss += float(torch.nn.functional.mse_loss(output, wanted, reduction="sum"))
        if loss < self._loss or not self.tensors:
            self._loss = loss
            self.tensors = {name: rounding.tensor(originals[name].shape) for name, rounding in learned.items()}


def _measured(iterations: int) -> set[int]:
    """After how many iterations the block is measured: none, half, three quarters, all."""
    return {0, iterations // 2, iterations * 3 // 4, iterations}


def _drawn(calls: Sequence[Call], batch_size: int, seed: int) -> Iterator[dict[int, list[int]]]:
    """Batches of samples without end, each sample once before any comes again: rows by the number of their call."""
    samples = [(number, row) for number in range(len(calls)) for row in range(len(calls[number].hidden))]
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    while True:
        while len(left) < batch_size:
            left = torch.randperm(len(samples), generator=generator).tolist() + left
        chosen, left = sorted(left[-batch_size:]), left[:-batch_size]
        yield {
            number: [row for _, row in rows]
            for number, rows in groupby(map(samples.__getitem__, chosen), itemgetter(0))
        }


def _weight(block: nn.Module, name: str) -> nn.Parameter:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


class Options(AlgorithmOptions):
    """How long rounding is learned in each block, and on how many sequences at a time.

    ``learning_rate`` is that of the first iteration; by default 1 / ``iterations``.
    """

    iterations: int = Field(default=200, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
