"""Mixtures of experts in a form that can be traced: every expert computes every token, and counts where it was chosen.

transformers multiplies by the experts that tokens were sent to, which depends on values, so that no graph can hold it,
or by one gathered weight for each token. Here each expert is a pair of linear layers of its own, as a graph's
quantizer knows them. That costs time where many experts are idle, and computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def can_be_taken_apart(module: nn.Module) -> bool:
    """Whether a module is fused experts of transformers' common form."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "down_proj"))


def take_apart(model: nn.Module) -> None:
    """Let the fused experts of a model of transformers compute so; those of another form stay."""
    for module in list(model.modules()):
        if can_be_taken_apart(module):
            module.forward = partial(_forward, module, *_layers(module))


def _layers(module: Any) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The layers of all experts, into and out of the nonlinear function, in place of the fused parameters."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    made = {"into": nn.ModuleList(_linears(module, first)), "out_of": nn.ModuleList(_linears(module, "down_proj"))}
    for name in (first, "down_proj"):
        for leaf in (name, f"{name}_bias"):
            module._parameters.pop(leaf, None)
    for name, layers in made.items():
        module.add_module(name, layers)
    return made["into"], made["out_of"]


def _linears(module: Any, name: str) -> Iterator[nn.Linear]:
    weights = getattr(module, name).detach()
    biases = getattr(module, f"{name}_bias").detach() if module.has_bias else [None] * len(weights)
    for weight, bias in zip(weights, biases, strict=True):
        matrix = weight.T if module.is_transposed else weight
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(matrix.contiguous(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
        yield layer


def _forward(
    module: Any, into: nn.ModuleList, out_of: nn.ModuleList, hidden: Tensor, chosen: Tensor, shares: Tensor
) -> Tensor:
    """What the experts make of tokens ``[tokens, channels]``, by those ``chosen`` for each and their ``shares``."""
    total = torch.zeros_like(hidden)
    for number, (first, last) in enumerate(zip(into, out_of, strict=True)):
        inner = first(hidden)
        outer = last(module._apply_gate(inner) if module.has_gate else module.act_fn(inner))
        outer = module.post_expert_norm(outer) if module.has_post_expert_norm else outer
        share = torch.where(chosen == number, shares, torch.zeros_like(shares)).sum(-1, keepdim=True)
        total = total + outer * share.to(outer.dtype)
    return total.to(hidden.dtype)
