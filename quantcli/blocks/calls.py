"""A call of a block: what a transformer layer is given when the model runs."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError, QuantcliError
from quantcli.system.child import raise_if_out_of_memory
from quantcli.system.devices import products
from quantcli.system.text import first_line


class Interruption(Exception):
    """What a hook raises to end a call on purpose."""


class BlockError(InputError):
    """A block's own code failed."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(
            f"A block of this model ({kind}) cannot be run by itself: {reason}.",
            hint="Use an algorithm without data, such as mse, or --skip its layers.",
        )


@dataclass
class Call:
    """One batch of samples on its way through a block.

    ``hidden``: the block's first argument, float32 ``[batch, tokens, channels]``. ``args`` and ``kwargs``: all others,
    such as masks and position embeddings, which are the same for every block of a model. ``per_sample``: of those,
    by place or name, whose rows are known to belong to samples, how many belong to each; 0 where none do.
    """

    hidden: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    per_sample: Mapping[int | str, int] = field(default_factory=dict)

    def run(self, block: Callable[..., Any]) -> Tensor:
        """The block's hidden output, float32 ``[batch, tokens, channels]``: what it returns, or that tuple's first.

        Raises InputError where that is no tensor.
        """
        try:
            with products(self.hidden.device):
                output = block(self.hidden, *self.args, **self.kwargs)
        except (Interruption, QuantcliError, MemoryError):
            raise
        except Exception as error:  # whatever the model's code raises
            raise_if_out_of_memory(error)
            raise BlockError(type(block).__name__, first_line(error)) from error
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
        args = tuple(self._of(value, chosen, self.per_sample.get(at)) for at, value in enumerate(self.args))
        kwargs = {name: self._of(value, chosen, self.per_sample.get(name)) for name, value in self.kwargs.items()}
        return Call(self.hidden[chosen], args, kwargs)

    def _of(self, value: Any, chosen: Sequence[int], per_sample: int | None = None) -> Any:
        """What belongs to some samples: rows of tensors that have one for each, such as a mask; the rest is shared.

        ``per_sample``: how many rows belong to a sample (with alibi, one for each head), where that is known.
        """
        if isinstance(value, Tensor) and per_sample:
            return value[[row * per_sample + part for row in chosen for part in range(per_sample)]]
        own = isinstance(value, Tensor) and per_sample is None and value.ndim > 1 and len(value) == len(self.hidden)
        return value[chosen] if own else mapped(value, partial(self._of, chosen=chosen))

    def in_float32(self) -> Call:
        """The same call with everything that is floating point in float32, such as states that other blocks left."""
        return Call(self.hidden.float(), mapped(self.args, _float), mapped(self.kwargs, _float), self.per_sample)

    def to(self, device: torch.device) -> Call:
        """The same call with every tensor on a device."""
        if device.type == "cpu":
            return self
        move = partial(moved, device=device)
        return Call(move(self.hidden), mapped(self.args, move), mapped(self.kwargs, move), self.per_sample)


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return mapped(value, _float)


def moved(value: Any, device: torch.device) -> Any:
    """A value with every tensor in it on a device."""
    return value.to(device) if isinstance(value, Tensor) else mapped(value, partial(moved, device=device))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple, list or mapping of changed members; anything else as it is."""
    if isinstance(value, tuple | list):
        return type(value)(change(each) for each in value)
    if isinstance(value, UserDict):  # how transformers shares keys and values between blocks
        changed = copy.copy(value)
        changed.data = {key: change(each) for key, each in value.items()}
        return changed
    return {key: change(each) for key, each in value.items()} if isinstance(value, dict) else value
