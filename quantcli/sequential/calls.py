"""A call of a block: what a transformer layer is given when the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.sequential.precision import products


@dataclass
class Call:
    """One batch of samples on its way through a block.

    ``hidden``: the block's first argument, float32 ``[batch, tokens, channels]``. ``args`` and ``kwargs``: all others,
    such as masks and position embeddings, which are the same for every block of a model.
    """

    hidden: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, block: Callable[..., Any]) -> Tensor:
        """The block's hidden output, float32 ``[batch, tokens, channels]``: what it returns, or that tuple's first.

        Raises InputError where that is no tensor.
        """
        with products(self.hidden.device):
            output = block(self.hidden, *self.args, **self.kwargs)
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if not isinstance(output, Tensor):
            raise InputError(
                f"A block of this model ({type(block).__name__}) returns {type(output).__name__}, not a tensor.",
                hint="Its layers cannot be quantized in sequence; use an algorithm without data, such as mse.",
            )
        return output.float()

    def to(self, device: torch.device) -> Call:
        """The same call with every tensor on a device."""
        if device.type == "cpu":
            return self
        return Call(_moved(self.hidden, device), _moved(self.args, device), _moved(self.kwargs, device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, device) for each in value)
    return {key: _moved(each, device) for key, each in value.items()} if isinstance(value, dict) else value
