"""Which lists of blocks a model calls on the data at hand: a model that sees and reads, given text, only reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from quantcli.blocks.calls import Interruption
from quantcli.blocks.capture import forward, hidden_first, replaced_forward
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import BlockList, NotSequentialError
from quantcli.errors import InputError
from quantcli.models import hugging_face


class _SeenEnough(Interruption):
    """What comes after the blocks is called; the rest of the model need not run."""


def reached_lists(
    skeleton: Skeleton, lists: Sequence[BlockList], batch: Mapping[str, Tensor]
) -> tuple[list[BlockList], list[BlockList]]:
    """The lists whose blocks are called for a batch, in the order of their first calls, and all others.

    Only the first block of each list runs, and stands for the others. Where the model cannot be run so, every list
    counts as reached.

    Raises:
        NotSequentialError: two lists are called in turn, blocks of one are not called one after the other, each once,
            change the shape of what they are given, or do not take hidden states first.
        InputError: no list is reached.
    """
    watched = _Watched(lists)
    with skeleton.loading_others([path for each in lists for path in each.blocks[1:]]), ExitStack() as stack:
        watched.replace(skeleton.module, stack)
        try:
            with suppress(_SeenEnough):
                forward(skeleton.module, _one_sample(batch))
        except NotSequentialError:
            raise
        except InputError:
            if not watched.complete:
                return list(lists), []
    order = watched.order
    if not order:
        raise InputError(
            "None of the model's blocks is called for this data.",
            hint="Give data of another kind, or use an algorithm without data, such as mse.",
        )
    watched.require_chains()
    unreached = [block_list for number, block_list in enumerate(lists) if number not in order]
    return [lists[number] for number in order], unreached


def _one_sample(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The first sample of a batch, or all of it where rows count other things than samples, as parts of images do."""
    counts = {len(values) for values in batch.values()}
    return {name: values[:1] for name, values in batch.items()} if len(counts) == 1 else batch


class _Watched:
    """Lists of blocks whose calls are noted: by the list's number and the block's number in it."""

    def __init__(self, lists: Sequence[BlockList]) -> None:
        self.lists = lists
        self.calls: list[tuple[int, int]] = []
        self._returned: dict[int, Any] = {}
        self._reshaped: set[int] = set()

    @property
    def order(self) -> list[int]:
        """Lists in the order of their first calls."""
        return list(dict.fromkeys(number for number, _ in self.calls))

    @property
    def complete(self) -> bool:
        """Whether every block of every list was called."""
        return len(set(self.calls)) == sum(len(each.blocks) for each in self.lists)

    def replace(self, model: nn.Module, stack: ExitStack) -> None:
        """Until the stack is left, note the calls of a model's blocks, and run nothing behind them."""
        for number, block_list in enumerate(self.lists):
            for index, path in enumerate(block_list.blocks):
                block = model.get_submodule(path)
                call = partial(self._stand_in, number, index, block.forward)
                stack.enter_context(replaced_forward(block, call))
        if head := hugging_face.output_head(model):
            stack.enter_context(replaced_forward(head, self._end))

    def _stand_in(self, number: int, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a block does: the first one of its list that is called computes, for the others, too."""
        self.calls.append((number, index))
        if number not in self._returned:
            returned = self._returned[number] = original(*args, **kwargs)
            given = next(iter(hidden_first(original, args, kwargs)[0]), None)
            states = returned[0] if isinstance(returned, tuple | list) and returned else returned
            if isinstance(given, Tensor) and isinstance(states, Tensor) and states.shape != given.shape:
                self._reshaped.add(number)
        return self._returned[number]

    def _end(self, *_: Any, **__: Any) -> Any:
        """What the output head does."""
        raise _SeenEnough

    def require_chains(self) -> None:
        """Raise NotSequentialError where a list that is called is no chain of blocks."""
        turns = [number for number, _ in groupby(number for number, _ in self.calls)]
        if len(turns) > len(self.order):
            again = next(at for at, number in enumerate(turns) if number in turns[:at])
            first, second = (self.lists[number].path for number in turns[again - 1 : again + 1])
            raise NotSequentialError(f"The blocks of {first} and of {second} are called in turn.")
        for number in self.order:
            path, blocks = self.lists[number].path, self.lists[number].blocks
            called = [index for each, index in self.calls if each == number]
            if len(set(called)) < len(called):
                raise NotSequentialError(
                    f"The blocks of {path} are called more than once, as layers that share weights."
                )
            if called != list(range(len(blocks))):
                raise NotSequentialError(f"The blocks of {path} are not called in their order, each once.")
            if number in self._reshaped:
                raise NotSequentialError(
                    f"The blocks of {path} change the shape of hidden states, and may be stages rather than blocks.",
                    hint=f"Lists within them can be named in a recipe, as in blocks: ['{path}.*.blocks'].",
                )
