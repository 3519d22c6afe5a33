"""Which lists of blocks a model calls on the data at hand: a model that sees and reads, given text, only reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor

from quantcli.blocks.calls import Interruption
from quantcli.blocks.capture import forward, replaced_forward
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import BlockList
from quantcli.errors import InputError


class _SeenEnough(Interruption):
    """Every list was reached, and what is called after the last; the rest of the model need not run."""


def reached_lists(
    skeleton: Skeleton, lists: Sequence[BlockList], batch: Mapping[str, Tensor]
) -> tuple[list[BlockList], list[BlockList]]:
    """The lists whose blocks are called for a batch, in the order of their first calls, and all others.

    Only the first block of each list runs, and stands for the others. Where the model cannot be run so, every list
    counts as reached.

    Raises:
        InputError: no list is reached, two are called in turn, so that neither is a chain, or a block is called again.
    """
    if len(lists) == 1 and len(lists[0].blocks) > 1:
        return list(lists), []
    calls: list[int] = []
    returned: dict[int, Any] = {}
    with skeleton.loading_others([path for each in lists for path in each.blocks[1:]]), ExitStack() as stack:
        for number, block_list in enumerate(lists):
            for path in block_list.blocks:
                block = skeleton.module.get_submodule(path)
                call = partial(_stand_in, number, block.forward, calls, returned, len(lists))
                stack.enter_context(replaced_forward(block, call))
        try:
            with suppress(_SeenEnough):
                forward(skeleton.module, _one_sample(batch))
        except InputError:
            if len(set(calls)) < len(lists):
                return list(lists), []
    order = list(dict.fromkeys(calls))
    turns = [number for number, _ in groupby(calls)]
    if len(turns) > len(order):
        first, second = (lists[number].path for number in turns[-2:])
        raise InputError(
            f"The blocks of {first} and of {second} are called in turn, and blocks are quantized from data only where "
            "each is given what the one before it returned.",
            hint="Use an algorithm without data, such as mse.",
        )
    again = [lists[number].path for number in order if calls.count(number) > len(lists[number].blocks)]
    if again:
        raise InputError(
            f"The blocks of {again[0]} are called more than once, as where layers share their weights, and what is "
            "quantized from data is called once.",
            hint="Use an algorithm without data, such as mse.",
        )
    if not order:
        raise InputError(
            "None of the model's blocks is called for this data.",
            hint="Give data of another kind, or use an algorithm without data, such as mse.",
        )
    unreached = [block_list for number, block_list in enumerate(lists) if number not in order]
    return [lists[number] for number in order], unreached


def _one_sample(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The first sample of a batch, or all of it where rows count other things than samples, as parts of images do."""
    counts = {len(values) for values in batch.values()}
    return {name: values[:1] for name, values in batch.items()} if len(counts) == 1 else batch


def _stand_in(
    number: int,
    original: Callable[..., Any],
    calls: list[int],
    returned: dict[int, Any],
    lists: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a block of the list of this number does: the first one that is called computes, for the others, too."""
    seen_all = len(set(calls)) == lists
    calls.append(number)
    if seen_all:
        raise _SeenEnough
    if number not in returned:
        returned[number] = original(*args, **kwargs)
    return returned[number]
