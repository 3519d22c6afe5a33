"""What a block's linear layers are given while it runs: the statistics that algorithms choose by."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.algorithms.base import LinearStats
from quantcli.algorithms.gptq import add_hessian
from quantcli.blocks.calls import Call, Interruption
from quantcli.errors import InputError
from quantcli.system import ranks

#: Tokens kept as they are, at the most.
SAMPLE_TOKENS = 512
#: Tokens worked on at a time.
_CHUNK_TOKENS = 4096
#: Its multiples, modulo one, spread evenly over 0..1 however many there are: tokens picked by them are spread evenly
#: too, but not in step with the length of a sequence, whose first token is often unlike all others.
_GOLDEN = 0.6180339887498949
#: Tokens of each run of calls are counted on from the run's number times this: the counts of others are not known yet.
_RUN_TOKENS = 1 << 22


def observe(
    block: nn.Module,
    calls: Iterable[Call],
    linears: Collection[str],
    needs: Collection[str],
    runs: Iterable[tuple[int, int | None]] = ((0, None),),
    path: str = "",
) -> dict[str, LinearStats]:
    """Run a block and gather statistics of the inputs of some of its linear layers.

    Args:
        block: one transformer layer.
        calls: what to run it with; each is run once. Of ranks that share the work, each has calls of its own.
        linears: names of layers in the block.
        needs: fields of `LinearStats`; others are ignored.
        runs: number of each run of calls, and how many they are; None: all. What a run adds up to is added to the rest
            in the order of the runs: see `quantcli.system.ranks.runs`.
        path: the block's name in the model, for messages.

    Returns:
        Statistics by layer. Layers that are always given the same tensor (query, key and value) share one object.

    Raises:
        InputError: a layer's inputs are not finite, or two layers share their input in some calls only.
    """
    gathering, left = _Gathering(frozenset(needs), linears), iter(calls)
    with torch.no_grad():
        for number, count in runs:
            gathering.begin_run(number)
            for call in islice(left, count):
                gathering = _gathered(block, call, gathering)
                if not gathering.needs and gathering.every_layer_saw_a_token:
                    break
            gathering.end_run()
            if not gathering.needs and gathering.every_layer_saw_a_token:
                break  # all that was asked for is whether every layer sees a token
    return gathering.results(path)


def _gathered(block: nn.Module, call: Call, gathering: _Gathering) -> _Gathering:
    """Run a block once; at the first call, two layers may turn out to share no input, and it is gathered anew."""
    while True:
        try:
            gathering.begin_call()
            with _hooked(block, gathering.linears, gathering), suppress(_SeenAll):
                call.run(block)
            gathering.end_call()
            return gathering
        except _NotSharedError as error:
            if gathering.calls or error.name in gathering.apart:
                raise error.told() from error
            # One of the two is given more than the other (DeBERTa: positions, too): it counts for itself.
            gathering = gathering.anew(error.name)


@contextmanager
def _hooked(block: nn.Module, linears: Collection[str], gathering: _Gathering) -> Iterator[None]:
    handles = [block.get_submodule(name).register_forward_pre_hook(partial(gathering.take, name)) for name in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _SeenAll(Interruption):
    """The last layer has its input; what the block does with its output is not needed."""


class _NotSharedError(Interruption):
    """Two layers that were taken to share their input do not."""

    def __init__(self, owner: str, name: str) -> None:
        super().__init__(name)
        self.owner, self.name = owner, name

    def told(self) -> InputError:
        """What is said where that changes from sample to sample."""
        return InputError(
            f"{self.owner} and {self.name} read the same input in one sample and different ones in another.",
            hint=f"Leave one of them as it is, with --skip '*.{self.name}'.",
        )


class _Gathering:
    """Which layer adds to which statistics: the one that is given a tensor first, on behalf of all others."""

    def __init__(self, needs: frozenset[str], linears: Collection[str], apart: frozenset[str] = frozenset()) -> None:
        self.needs, self.linears, self.apart = needs, linears, apart
        self.owners: dict[str, str] = {}
        self.totals: dict[str, _Sums] = {}
        self.tokens: Counter[str] = Counter()
        # Weak, so that a block's inputs do not all stay in memory until the call ends.
        self.latest: dict[str, weakref.ref[Tensor]] = {}
        self.order: list[str] = []
        self.calls = 0
        self.begin_run(0)

    def anew(self, name: str) -> _Gathering:
        """The same before its first call, with a layer that shares its input with none."""
        other = _Gathering(self.needs, self.linears, self.apart | {name})
        other.begin_run(self.run)
        return other

    def begin_run(self, number: int) -> None:
        """Some neighbouring calls begin, whose sums are made on their own."""
        self.run = number
        self.sums: dict[str, _Sums] = {}

    def begin_call(self) -> None:
        """A call begins."""
        self._updates: Counter[str] = Counter()

    def take(self, name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """The hook before a layer."""
        inputs: Tensor = arguments[0]
        with torch.autocast(inputs.device.type, enabled=False):
            self._add(name, inputs)
        if not self.calls:
            self.order.append(name)
        elif name == self.order[-1] and self.every_call_is_alike:
            raise _SeenAll

    @cached_property
    def every_call_is_alike(self) -> bool:
        """Whether the first call reached every layer just once: then so do the others, in the same order."""
        return sorted(self.order) == sorted(self.linears)

    def _add(self, name: str, inputs: Tensor) -> None:
        if name not in self.owners:
            self.owners[name] = next((owner for owner in self._fresh(name) if self._is_latest(owner, inputs)), name)
        owner = self.owners[name]
        self.tokens[name] += inputs.shape[:-1].numel()
        if owner == name:
            self.latest[name] = weakref.ref(inputs)
            self._updates[name] += 1
            self.sums.setdefault(name, _Sums(self.needs, self.run)).add(inputs)
        elif not self._is_latest(owner, inputs):
            raise _NotSharedError(owner, name)

    def _fresh(self, name: str) -> Iterator[str]:
        """Layers that were given their first tensor by this call, as the one that asks is now."""
        if name not in self.apart:
            new = (owner for owner, seen in self._updates.items() if seen == 1)
            yield from (owner for owner in new if self.sums[owner].updates == 1 and owner not in self.totals)

    def _is_latest(self, owner: str, inputs: Tensor) -> bool:
        return owner in self.latest and self.latest[owner]() is inputs

    def end_call(self) -> None:
        """Raise where one of two layers that share their input was given more."""
        for name, owner in self.owners.items():
            if self.tokens[name] != self.tokens[owner]:
                raise _NotSharedError(owner, name)
        self.calls += 1

    def end_run(self) -> None:
        """Add what this run came to, and those that other ranks have come to meanwhile.

        Raises:
            InputError: layers share their input on one rank only.
        """
        for owners in ranks.gather(self.owners):
            for name, owner in owners.items():
                if self.owners.setdefault(name, owner) != owner:
                    raise _NotSharedError(owner, name).told()
        for name, sums in ranks.in_order(self.sums):
            if name in self.totals:
                self.totals[name].merge(sums)
            else:
                self.totals[name] = sums
        self.sums = {}

    @property
    def every_layer_saw_a_token(self) -> bool:
        """Whether there is something to say of every layer."""
        saw = {name for seen in (self.totals, self.sums) for name, sums in seen.items() if sums.tokens}
        return all(self.owners.get(name) in saw for name in self.linears)

    def results(self, path: str) -> dict[str, LinearStats]:
        """Statistics by layer of the block of this name, once every call is through.

        Raises:
            InputError: they are not finite, or a layer that shares its input with another saw less of it.
        """
        tokens = sum(ranks.gather(self.tokens), Counter[str]())
        for name, owner in self.owners.items():
            if tokens[name] != tokens[owner]:
                raise _NotSharedError(owner, name).told()
        inside = f"{path}." if path else ""
        results = {owner: sums.result(f"{inside}{owner}") for owner, sums in self.totals.items()}
        return {name: results[self.owners[name]] if name in self.owners else LinearStats() for name in self.linears}


class _Sums:
    """Running statistics of one tensor."""

    def __init__(self, needs: frozenset[str], run: int) -> None:
        self.needs, self._first_number = needs, run * _RUN_TOKENS
        self.updates = self.tokens = 0
        self.gram = self.absmax = self.sum_abs = torch.empty(0)
        self.sample, self.keys, self.share = torch.empty(0), torch.empty(0), 1.0

    def add(self, inputs: Tensor) -> None:
        """Take in ``[..., columns]``; rows of zeros say nothing, as of tokens that a router sends elsewhere."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not self.updates:
            self._allocate(rows)
        told = rows.any(1)
        rows = rows if bool(told.all()) else rows[told]
        for chunk in torch.split(rows, _CHUNK_TOKENS):
            if "gram" in self.needs:
                add_hessian(self.gram, chunk)
            if self.needs & {"absmax", "mean_abs"} and len(chunk):
                magnitudes = chunk.abs()
                torch.maximum(self.absmax, magnitudes.amax(0), out=self.absmax)
                self.sum_abs += magnitudes.sum(0)
        if "sample" in self.needs:
            self._keep(rows)
        self.updates += 1
        self.tokens += len(rows)

    def merge(self, other: _Sums) -> None:
        """Add those of calls that come after these."""
        if "gram" in self.needs:
            self.gram += other.gram
        torch.maximum(self.absmax, other.absmax, out=self.absmax)
        self.sum_abs += other.sum_abs
        if other.share < self.share:
            self.share, chosen = other.share, self.keys < other.share
            self.sample, self.keys = self.sample[chosen], self.keys[chosen]
        self._take_sample(other.sample, other.keys)
        self.updates += other.updates
        self.tokens += other.tokens

    def _allocate(self, rows: Tensor) -> None:
        columns, device = rows.shape[1], rows.device
        if "gram" in self.needs:
            self.gram = torch.zeros(columns, columns, device=device)
        self.absmax = torch.zeros(columns, device=device)
        self.sum_abs = torch.zeros(columns, dtype=torch.float64, device=device)
        self.sample = rows.new_empty(0, columns)  # no view, which would keep a whole batch in memory
        self.keys = torch.zeros(0, dtype=torch.float64, device=device)

    def _keep(self, rows: Tensor) -> None:
        """Keep the tokens whose key is below a limit, which is halved whenever that leaves too many."""
        first = self._first_number + self.tokens
        numbers = torch.arange(first, first + len(rows), dtype=torch.float64, device=rows.device)
        self._take_sample(rows, numbers * _GOLDEN % 1.0)

    def _take_sample(self, rows: Tensor, keys: Tensor) -> None:
        chosen = keys < self.share
        self.sample = torch.cat([self.sample, rows[chosen]])
        self.keys = torch.cat([self.keys, keys[chosen]])
        while len(self.keys) > SAMPLE_TOKENS:
            self.share /= 2
            chosen = self.keys < self.share
            self.sample, self.keys = self.sample[chosen], self.keys[chosen]

    def result(self, name: str) -> LinearStats:
        """What was asked for. Raises InputError where it is not finite."""
        stats = LinearStats(
            self.tokens,
            self.gram if "gram" in self.needs else None,
            self.absmax if "absmax" in self.needs else None,
            (self.sum_abs / max(1, self.tokens)).float() if "mean_abs" in self.needs else None,
            self.sample if "sample" in self.needs else None,
        )
        for values in (self.absmax, self.gram.diagonal() if self.gram.ndim == 2 else self.absmax, self.sample):
            if not bool(torch.isfinite(values).all()):
                raise InputError(
                    f"{name} is given values that are not finite: the model overflows on the calibration data.",
                    hint="Check the model with quantcli eval, or calibrate with other data.",
                )
        return stats
