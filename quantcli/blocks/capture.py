"""What the blocks of a list are called with, found by running the model around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.blocks.calls import Call, Interruption
from quantcli.blocks.structure import HIDDEN_STATES, NotSequentialError
from quantcli.errors import InputError, QuantcliError
from quantcli.models import hugging_face
from quantcli.system.child import raise_if_out_of_memory
from quantcli.system.text import first_line


class _ReachedLast(Interruption):
    """All blocks of the list were reached, or not the first one first; the rest of the model need not run."""


@dataclass
class Arguments:
    """What a block takes beside its hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def call(self, hidden: Tensor, per_sample: Mapping[int | str, int] | None = None) -> Call:
        """The whole call."""
        return Call(hidden, self.args, self.kwargs, per_sample or {})

    def per_sample(self, one: Arguments, samples: int) -> dict[int | str, int]:
        """Of these arguments, of several samples, how many rows belong to each, by those of ``one`` of the samples."""
        theirs: dict[int | str, Any] = dict([*enumerate(one.args), *one.kwargs.items()])
        found: dict[int | str, int] = {}
        mine: dict[int | str, Any] = dict([*enumerate(self.args), *self.kwargs.items()])
        for key, value in mine.items():
            other = theirs.get(key)
            if not isinstance(value, Tensor) or not isinstance(other, Tensor):
                continue
            if value.ndim != other.ndim or not value.ndim:
                continue
            if len(value) == len(other):
                found[key] = 0
            elif len(value) == len(other) * samples:
                found[key] = len(other)
        return found


@dataclass
class Captured:
    """One batch at the door of a list of blocks.

    ``hidden`` goes into the first block; ``arguments`` are the others, block by block. ``returned`` is what a block
    returns beside its hidden states, or None where it returns no tuple.
    """

    hidden: Tensor
    arguments: list[Arguments]
    returned: tuple[Any, ...] | None


class Capture:
    """Runs a model with the blocks of one list replaced, and keeps what each was called with."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model, self.blocks = model, blocks
        self._only_hidden = False
        # A block that is the only one might be called again (ALBERT): once the model runs on, to see.
        self._runs_on = len(blocks) == 1

    def run(self, batch: Mapping[str, Tensor]) -> Captured:
        """What the model does with its blocks for one batch.

        The first block runs for real where it returns more than hidden states, since that may go into the
        others (T5's position bias). Its weights, and those around the list, must be loaded.

        Raises:
            InputError: the model does not call its blocks one after the other, or cannot be run on the batch.
        """
        log: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
        returned: list[Any] = []
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, self._recorder(index, block.forward, log, returned)))
            with suppress(_ReachedLast):
                try:
                    forward(self.model, batch)
                except InputError:
                    if len(log) < len(self.blocks):
                        raise  # else it was what comes after the blocks
        self._require_chain([index for index, _, _ in log])
        self._runs_on = False
        calls = [(args, kwargs) for _, args, kwargs in log]
        hidden, output = _hidden_of(calls[0][0]), returned[0]
        self._require_alike(hidden, output)
        self._only_hidden = isinstance(output, Tensor)
        more = tuple(output[1:]) if isinstance(output, tuple) else None
        return Captured(hidden, [Arguments(args[1:], kwargs) for args, kwargs in calls], more)

    def _recorder(
        self, index: int, original: Callable[..., Any], log: list[Any], returned: list[Any]
    ) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = hidden_first(original, args, kwargs)
            args, kwargs = kept(args), {name: kept(value) for name, value in kwargs.items()}
            log.append((index, args, kwargs))
            if index == 0:
                returned.append(_hidden_of(args) if self._only_hidden else original(*args, **kwargs))
            reached = index == len(self.blocks) - 1 and not (self._runs_on and len(log) == 1)
            if reached or not returned:
                raise _ReachedLast
            return returned[0]

        return record

    def _require_chain(self, called: list[int]) -> None:
        """Raise InputError where the blocks were not called one after the other, each once."""
        if called == list(range(len(self.blocks))):
            return
        order = f"{', '.join(map(str, called[:4])) or 'none'}{', ...' * (len(called) > 4)}"
        raise NotSequentialError(
            f"The blocks found in this model ({len(self.blocks)}) are not called one after the other, each once: "
            f"it calls {order}.",
            hint="Use an algorithm without data, such as mse."
            if len(set(called)) < len(called)
            else "Name its list of blocks in a recipe, as in blocks: [model.layers].",
        )

    def _require_alike(self, hidden: Tensor, output: Any) -> None:
        """Raise InputError where the first block changes the shape, so that the others saw something else."""
        states = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(states, Tensor) and states.shape != hidden.shape:
            raise InputError(
                f"The blocks that were found ({type(self.blocks[0]).__name__}) change the shape of hidden states, from "
                f"{list(hidden.shape)} to {list(states.shape)}, and may be stages rather than blocks.",
                hint="Name the lists within them in a recipe, as in blocks: ['encoder.layers.*.blocks'].",
            )


@contextmanager
def replaying(blocks: Sequence[nn.Module], hidden: Tensor, returned: tuple[Any, ...] | None) -> Iterator[None]:
    """Meanwhile these blocks return the last one's hidden states; their weights are not needed."""
    output = hidden if returned is None else (hidden, *returned)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, lambda *_, **__: output))
        yield


@contextmanager
def replaced_forward(block: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile a module computes something else; its hooks stay."""
    # On the instance, so that attributes which models read off their layers stay there.
    block.forward = call
    try:
        yield
    finally:
        del block.forward


def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """One pass; a Hugging Face model builds no cache.

    Raises:
        InputError: the model fails on this batch.
    """
    args, kwargs = hugging_face.arguments(model, batch)
    with torch.no_grad(), failing_on(batch, type(model).__name__):
        return model(*args, **kwargs, **without_cache(model))


@contextmanager
def failing_on(batch: Mapping[str, Any], model: str) -> Iterator[None]:
    """Whatever a model's code raises meanwhile is told as an InputError, with the shapes of what it was given."""
    try:
        yield
    except (Interruption, QuantcliError, MemoryError):
        raise
    except Exception as error:
        raise_if_out_of_memory(error)
        shapes = ", ".join(f"{name} {list(given.shape)}" for name, given in batch.items() if isinstance(given, Tensor))
        raise InputError(
            f"{model} cannot be run on the calibration data ({shapes}): {first_line(error)}.",
            hint="Look whether sequences are longer than the model takes (--seq-len), or an input is missing.",
        ) from error


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Arguments that keep a Hugging Face model from building a key-value cache."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def main_output(outputs: Any) -> tuple[Tensor, bool]:
    """What a model returns first of all, ``[batch, ...]``, and whether these are logits over classes.

    Raises:
        InputError: it is no tensor.
    """
    logits = getattr(outputs, "logits", None)
    several = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    first = several[0] if isinstance(several, list | tuple) and several else outputs
    first = first if logits is None else logits
    if not isinstance(first, Tensor):
        raise InputError(f"The model returns {type(outputs).__name__}, which holds no tensor to learn from.")
    return first, logits is not None


def alike(one: Any, other: Any) -> bool:
    """Whether two batches' arguments hold equal tensors."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Arguments) and isinstance(other, Arguments):
        return alike(one.args, other.args) and alike(one.kwargs, other.kwargs)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one is other or bool(one == other)


def kept(value: Any) -> Any:
    """An argument as it is kept: without a cache, which running a block would fill, and with values of parameters.

    A parameter that is passed on may be none of the block's, and be let go of before the block runs.
    """
    if any(base.__name__ == "Cache" for base in type(value).__mro__):
        return None
    if isinstance(value, nn.Parameter):
        return value.detach()
    return tuple(map(kept, value)) if type(value) is tuple else value


def hidden_first(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with the hidden states by position, whatever name they are passed by.

    Raises:
        NotSequentialError: the first position is that of something else, as in a block with two streams (Reformer).
    """
    if args:
        return args, kwargs
    first = next(iter(inspect.signature(call).parameters.values()), None)
    name = HIDDEN_STATES if HIDDEN_STATES in kwargs or first is None else first.name
    if name not in kwargs:
        return (), kwargs
    if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD and first.name != name:
        raise NotSequentialError(f"The model's blocks take {first.name} before {name}, and hand on more than {name}.")
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def _hidden_of(args: tuple[Any, ...]) -> Tensor:
    hidden = args[0] if args else None
    if not isinstance(hidden, Tensor):
        raise InputError(
            "The model's blocks are not called with hidden states.", "Use an algorithm without data, such as mse."
        )
    return hidden
