"""Steps of training: a descent normalized by tensor, the schedule of rates, the bounds of factors."""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

#: Of a step's direction, what is kept for the next one.
_MOMENTUM = 0.9


class NormalizedSGD(torch.optim.Optimizer):
    """Gradient descent with momentum, whose steps have the length ``lr`` in the root mean square over each tensor.

    Adam moves all values alike, however small their gradients; here those move that matter. It holds half as much.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, for which every gradient is given."""
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is None:
                    continue
                state = self.state[values]
                size = float(values.grad.square().mean().sqrt())
                if "direction" not in state:
                    state["direction"] = torch.zeros_like(values)
                direction = state["direction"].mul_(_MOMENTUM)
                direction.add_(values.grad, alpha=(1 - _MOMENTUM) / max(size, 1e-30))
                values.add_(direction, alpha=-group["lr"])


#: Share of all steps in which the learning rate rises to its full height.
WARM_UP = 0.1
#: The least that may be left of a value, or be added to it, as a factor.
FACTOR_RANGE = (0.5, 2.0)


@torch.no_grad()
def clamp_factors(factors: Iterable[Tensor]) -> None:
    """Keep learned factors from running away."""
    for factor in factors:
        factor.clamp_(*FACTOR_RANGE)


def rate_share(step: int, total: int, warm_up: float = WARM_UP) -> float:
    """Share of the full learning rate in a step: up in a line over ``warm_up`` of all, down in half a cosine."""
    rise = max(1, round(warm_up * total))
    return (step + 1) / rise if step < rise else 0.5 * (1 + cos(pi * (step - rise) / max(1, total - rise)))
