"""tune: with codes as they are, learn the scales (and norms) that bring a quantized model's outputs back.

Knowledge distillation (Hinton et al., arXiv:1503.02531) from the original model, of scales alone: the scales of one
weight in sixty-four can be learned on few tokens without forgetting what the model knows. mlx-lm calls it DWQ. The
loss is the Kullback-Leibler divergence of the outputs; a scale moves in proportion to itself and is rounded as it will
be stored in every step, the rounding counting as having slope one (straight-through).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from quantcli.algorithms.base import AlgorithmOptions
from quantcli.algorithms.fake_quantize import LearnedFactors
from quantcli.core.numerics import dequantize, in_groups
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor

NEEDS = frozenset({"original"})


def supports(number_format: NumberFormat) -> str | None:
    """Integer codes, whose scales are plain numbers."""
    return "tune learns the scales of integer codes; nf4 has none" if number_format.dtype == "nf4" else None


class TunedLinear:
    """A linear layer of fixed codes and learned scales."""

    def __init__(self, tensor: QuantizedTensor, scale_dtype: torch.dtype, bias: Tensor | None) -> None:
        self.tensor, self.bias = tensor, bias
        self.scales = LearnedFactors(tensor.scale, scale_dtype, scales=True)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layer's output for ``[..., columns]``."""
        output: Tensor = _QuantizedProduct.apply(inputs, self.scales.values(), self.tensor)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias


class _QuantizedProduct(torch.autograd.Function):
    """``inputs @ weight.T`` for a quantized weight, which is dequantized anew where it is needed.

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


class Options(AlgorithmOptions):
    """``epochs`` over the calibration data; the learning rate is relative to each scale."""

    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    norms: bool = True
