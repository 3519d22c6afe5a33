"""A call of a block: what a transformer layer is given when the model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.system.devices import products


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

    def rows(self, chosen: Sequence[int]) -> Call:
        """The same call with some of its samples."""
        return Call(self.hidden[chosen], self._of(self.args, chosen), self._of(self.kwargs, chosen))

    def _of(self, value: Any, chosen: Sequence[int]) -> Any:
        """What belongs to some samples: rows of tensors that have one for each, such as a mask; the rest is shared."""
        own = isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(self.hidden)
        return value[chosen] if own else _mapped(value, partial(self._of, chosen=chosen))

    def to(self, device: torch.device) -> Call:
        """The same call with every tensor on a device."""
        if device.type == "cpu":
            return self
        move = partial(_moved, device=device)
        return Call(move(self.hidden), _mapped(self.args, move), _mapped(self.kwargs, move))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else _mapped(value, partial(_moved, device=device))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple, list or dict of changed members; anything else as it is."""
    if isinstance(value, tuple | list):
        return type(value)(change(each) for each in value)
    return {key: change(each) for key, each in value.items()} if isinstance(value, dict) else value
