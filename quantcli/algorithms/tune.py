"""tune: with codes as they are, learn the scales (and norms) that bring a quantized model's outputs back.

Knowledge distillation (Hinton et al., arXiv:1503.02531) from the original model, of scales alone: the scales of one
weight in sixty-four can be learned on few tokens without forgetting what the model knows. mlx-lm calls it DWQ. The
loss is the Kullback-Leibler divergence of the outputs; a scale moves in proportion to itself and is rounded as it will
be stored in every step, the rounding counting as having slope one (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi
from typing import Any, Protocol

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.numerics import dequantize, in_groups, stored_scale
from quantcli.scheme import NumberFormat, QuantizedTensor

NEEDS = frozenset({"original"})

#: Share of all steps in which the learning rate rises to its full height.
WARM_UP = 0.1
#: The least that may be left of a value, or be added to it, as a factor.
FACTOR_RANGE = (0.5, 2.0)


class Options(Protocol):
    """How long and how fast is learned; the rate is that of factors, which start from one."""

    epochs: int
    learning_rate: float


def supports(number_format: NumberFormat) -> str | None:
    """Integer codes, whose scales are plain numbers."""
    return "tune learns the scales of integer codes; nf4 has none" if number_format.dtype == "nf4" else None


class Factors:
    """Positive values that are learned as factors of what they start from, and stored in a dtype of their own."""

    def __init__(self, start: Tensor, dtype: torch.dtype, *, scales: bool) -> None:
        """``scales``: values that divide, and so must not be rounded to zero."""
        self._start, self._dtype, self._scales = start, dtype, scales
        self.factor = torch.ones_like(start, requires_grad=True)

    def values(self) -> Tensor:
        """The values as they will be stored, float32, shaped like the start."""
        exact = self._start * self.factor
        with torch.no_grad():
            stored = stored_scale(exact, self._dtype) if self._scales else exact.to(self._dtype).float()
        return exact + (stored - exact).detach()


class TunedLinear:
    """A linear layer of fixed codes and learned scales."""

    def __init__(self, tensor: QuantizedTensor, scale_dtype: torch.dtype, bias: Tensor | None) -> None:
        self.tensor, self.bias = tensor, bias
        self.scales = Factors(tensor.scale, scale_dtype, scales=True)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layer's output for ``[..., columns]``."""
        output: Tensor = _CodedProduct.apply(inputs, self.scales.values(), self.tensor)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias


class _CodedProduct(torch.autograd.Function):
    """``inputs @ weight.T`` for a weight of codes and scales, which is decoded anew where it is needed.

    So a whole model in training holds a byte per weight, and no gradient as large as a weight but one.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, inputs: Tensor, scale: Tensor, tensor: QuantizedTensor) -> Tensor:
        ctx.save_for_backward(inputs, scale)
        ctx.tensor = tensor
        return inputs @ _weight(tensor, scale).T

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        inputs, scale = ctx.saved_tensors
        by_input = gradient @ _weight(ctx.tensor, scale) if ctx.needs_input_grad[0] else None
        by_scale = None
        if ctx.needs_input_grad[1]:
            rows = gradient.reshape(-1, gradient.shape[-1])
            by_weight = (rows.T @ inputs.reshape(-1, inputs.shape[-1])).float()
            steps = _weight(ctx.tensor, torch.ones_like(scale))
            number_format = ctx.tensor.number_format
            by_scale = in_groups(by_weight.mul_(steps), number_format).sum(-1)
        return by_input, by_scale, None


def _weight(tensor: QuantizedTensor, scale: Tensor) -> Tensor:
    codes = in_groups(tensor.codes, tensor.number_format)
    return dequantize(codes, scale, tensor.zero_point, tensor.number_format).reshape(tensor.codes.shape)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence in nats of logits ``[..., classes]``, a scalar."""
    ours, theirs = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return torch.nn.functional.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1).mean()


def relative_error(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared error of ``[..., channels]`` relative to the teacher's power, a scalar: for outputs without classes."""
    teacher, student = teacher.float(), student.float()
    return (teacher - student).square().sum() / teacher.square().sum()


def run(
    learned: Sequence[Factors],
    loss: Callable[[int], Tensor],
    samples: int,
    options: Options,
    seed: int,
    report: Callable[[float], None],
) -> list[float]:
    """Learn factors with Adam, one sample a step, and return the loss of every step.

    Args:
        learned: what is learned.
        loss: of one sample, by its number; it depends on ``learned``.
        samples: how many there are.
        options: epochs and learning rate.
        seed: the order of the samples is drawn by it.
        report: told the fraction that is done.

    Raises:
        InputError: a loss is not finite.
    """
    factors = [each.factor for each in learned]
    optimizer = torch.optim.Adam(factors, lr=options.learning_rate, betas=(0.9, 0.99))
    total = options.epochs * samples
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, total))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(options.epochs):
        for sample in torch.randperm(samples, generator=generator).tolist():
            with torch.enable_grad():
                found = loss(sample)
                if not bool(torch.isfinite(found)):
                    raise InputError(
                        f"tune: the loss became {found.item()} in step {len(losses) + 1} of {total}.",
                        hint="Lower its learning_rate in the recipe.",
                    )
                optimizer.zero_grad(set_to_none=True)
                found.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for factor in factors:
                    clamp_factors(factor)
            losses.append(found.item())
            report(len(losses) / total)
    return losses


def clamp_factors(factor: Tensor) -> None:
    """Keep a learned factor from running away."""
    factor.clamp_(*FACTOR_RANGE)


def rate_share(step: int, total: int, warm_up: float = WARM_UP) -> float:
    """Share of the full learning rate in a step: up in a line over ``warm_up`` of all, down in half a cosine."""
    rise = max(1, round(warm_up * total))
    return (step + 1) / rise if step < rise else 0.5 * (1 + cos(pi * (step - rise) / max(1, total - rise)))
