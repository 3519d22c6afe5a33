"""What a block's linear layers are given while it runs: the statistics that algorithms choose by."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.algorithms.base import LinearStats
from quantcli.algorithms.gptq import add_hessian
from quantcli.blocks.calls import Call, Interruption
from quantcli.errors import InputError

#: Tokens kept as they are, at the most.
SAMPLE_TOKENS = 512
#: Tokens worked on at a time.
_CHUNK_TOKENS = 4096
#: Its multiples, modulo one, spread evenly over 0..1 however many there are: tokens picked by them are spread evenly
#: too, but not in step with the length of a sequence, whose first token is often unlike all others.
_GOLDEN = 0.6180339887498949


def observe(
    block: nn.Module, calls: Iterable[Call], linears: Collection[str], needs: Collection[str]
) -> dict[str, LinearStats]:
    """Run a block and gather statistics of the inputs of some of its linear layers.

    Args:
        block: one transformer layer.
        calls: what to run it with; each is run once.
        linears: names of layers in the block.
        needs: fields of `LinearStats`; others are ignored.

    Returns:
        Statistics by layer. Layers that are always given the same tensor (query, key and value) share one object.

    Raises:
        InputError: a layer's inputs are not finite, or two layers share their input in some calls only.
    """
    apart: set[str] = set()
    gathering = _Gathering(frozenset(needs), linears, apart)
    with torch.no_grad():
        for run, numbers in ranks.runs(len(calls)):
            gathering.begin_run(run)
            for number in numbers:
                while True:
                    try:
                        gathering.begin(first=not gathering.seen)
                        with _hooked(block, linears, gathering), suppress(_SeenAll):
                            calls[number].run(block)
                        gathering.require_shared()
                        break
                    except _NotSharedError as error:
                        if gathering.seen or error.name in apart:
                            raise error.told() from error
                        # One of the two is given more than the other (DeBERTa: positions, too): it counts for itself.
                        apart.add(error.name)
                        gathering = _Gathering(frozenset(needs), linears, apart)
                        gathering.begin_run(run)
                gathering.seen += 1
                report((number + 1) / len(calls))
            gathering.end_run()
            if not gathering.needs and gathering.every_layer_saw_a_token:
                break  # all that was asked for is whether every layer sees a token
    return gathering.results(linears)


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

    def __init__(self, needs: frozenset[str], linears: Collection[str], apart: Collection[str]) -> None:
        self.needs, self.linears, self.apart = needs, linears, apart
        self.owners: dict[str, str] = {}
        self.sums: dict[str, _Sums] = {}
        self.tokens: dict[str, int] = {}
        # Weak, so that a block's inputs do not all stay in memory until the call ends.
        self.latest: dict[str, weakref.ref[Tensor]] = {}
        self.order: list[str] = []
        self.first = True

    def begin(self, *, first: bool) -> None:
        """A call begins."""
        self.first = first

    def take(self, name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """The hook before a layer."""
        inputs: Tensor = arguments[0]
        with torch.autocast(inputs.device.type, enabled=False):
            self._add(name, inputs)
        if self.first:
            self.order.append(name)
        elif name == self.order[-1] and self.every_call_is_alike:
            raise _SeenAll

    @cached_property
    def every_call_is_alike(self) -> bool:
        """Whether the first call reached every layer just once: then so do the others, in the same order."""
        return sorted(self.order) == sorted(self.linears)

    def _add(self, name: str, inputs: Tensor) -> None:
        if name not in self.owners:
            alone = name in self.apart
            first = (owner for owner, sums in self.sums.items() if sums.updates == 1 and not alone)
            self.owners[name] = next((owner for owner in first if self.latest[owner]() is inputs), name)
        owner = self.owners[name]
        self.tokens[name] = self.tokens.get(name, 0) + inputs.shape[:-1].numel()
        if owner == name:
            self.latest[name] = weakref.ref(inputs)
            self.sums.setdefault(name, _Sums(self.needs)).add(inputs)
        elif self.latest[owner]() is not inputs:
            raise _NotSharedError(owner, name)

    @property
    def every_layer_saw_a_token(self) -> bool:
        """Whether there is something to say of every layer."""
        return len(self.tokens) == len(self.linears) and all(sums.tokens for sums in self.sums.values())

    def require_shared(self) -> None:
        """Raise where one of two layers that share their input was given more."""
        for name, owner in self.owners.items():
            if self.tokens[name] != self.tokens[owner]:
                raise _NotSharedError(owner, name)

    def results(self, linears: Collection[str]) -> dict[str, LinearStats]:
        """Statistics by layer, once every call is through."""
        results = {owner: sums.result(owner) for owner, sums in self.sums.items()}
        return {name: results[self.owners[name]] if name in self.owners else LinearStats() for name in linears}


class _Sums:
    """Running statistics of one tensor."""

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs
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
        numbers = torch.arange(self.tokens, self.tokens + len(rows), dtype=torch.float64, device=rows.device)
        keys = numbers * _GOLDEN % 1.0
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
