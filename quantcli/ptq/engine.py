"""Block after block: load, observe, transform, round, hand on, drop.

Each block sees what the already quantized ones return (GPTQ, arXiv:2210.17323, section 4), so that it can make up for
their errors. In memory are one block, what is known of its inputs, and the hidden states between two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.blocks.activations import Activations
from quantcli.blocks.calls import BlockError, Call
from quantcli.blocks.capture import Arguments, Capture, Captured, alike, replaying
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import BlockList
from quantcli.core.numerics import as_stored, decoded
from quantcli.errors import InputError
from quantcli.planning.plan import Plan
from quantcli.ptq.block import ROUNDED, BlockOutcome, BlockQuantizer, Tick, counted, part_of
from quantcli.ptq.input_quantization import quantized_inputs
from quantcli.system import ranks
from quantcli.system.devices import full_precision, has_bfloat16
from quantcli.system.hardware import release_freed

#: Calibration inputs by name, batch by batch.
Batches = Sequence[Mapping[str, Tensor]]
#: A finished block by its path, or None.
Finished = Callable[[str], "BlockOutcome | None"]


class Chain:
    """Hidden states on their way through a list of blocks, and what else its blocks are called with."""

    def __init__(self, hidden: Activations) -> None:
        self.hidden = hidden
        #: By number of batch: those that this rank has.
        self.arguments: dict[int, list[Arguments]] = {}
        #: For each block, what is known of which arguments' rows belong to which samples; see `Call`.
        self.per_sample: list[Mapping[int | str, int]] = []
        self.returned: dict[int, tuple[Any, ...] | None] = {}

    def enter(self, batch: int, captured: Captured) -> None:
        """Take one batch in."""
        self.hidden[batch] = captured.hidden
        # Masks and positions mostly are those of the batch before: then they are held once.
        before = next(reversed(self.arguments), None)
        same = before is not None and alike(self.arguments[before], captured.arguments)
        self.arguments[batch] = self.arguments[before] if before is not None and same else captured.arguments
        same = before is not None and alike(self.returned[before], captured.returned)
        self.returned[batch] = self.returned[before] if before is not None and same else captured.returned

    @contextmanager
    def replaying(self, modules: Sequence[nn.Module], batch: int, rows: slice | None = None) -> Iterator[None]:
        """Let blocks that are finished return what they returned for a batch, or for some ``rows`` of it."""
        hidden, returned = self.hidden[batch], self.returned[batch]
        if rows is not None:
            hidden, returned = hidden[rows], None if returned is None else ()
        with replaying(modules, hidden, returned):
            yield


class _Calls(Sequence[Call]):
    """Every batch's call of one block, made when it is asked for: hidden states may lie on disk.

    Of ranks that share the work, each can make those of its own batches.
    """

    def __init__(self, chain: Chain, block: int, count: int, device: torch.device) -> None:
        self._chain, self._block, self._count, self._device = chain, block, count, device

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, batch: Any) -> Any:
        arguments = self._chain.arguments[batch][self._block]
        per_sample = self._chain.per_sample[self._block] if self._chain.per_sample else {}
        return arguments.call(self._chain.hidden[batch], per_sample).to(self._device)


class BlockEngine:
    """Quantizes the layers of a plan that are in blocks."""

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        lists: Sequence[BlockList],
        batches: Batches,
        *,
        scratch: Path,
        memory_limit: int,
        device: str = "cpu",
        seed: int = 0,
        tick: Tick | None = None,
    ) -> None:
        """Get ready.

        Args:
            skeleton: the model.
            plan: what its layers become, and by which steps.
            lists: its blocks.
            batches: calibration inputs of the model.
            scratch: where hidden states go that do not fit into ``memory_limit`` bytes.
            memory_limit: bytes of hidden states held in memory.
            device: where blocks run.
            seed: what sequences are drawn by where an algorithm learns.
            tick: told of progress.
        """
        self.skeleton, self.plan, self.batches = skeleton, plan, batches
        self.device, self.seed, self.tick = torch.device(device), seed, tick or (lambda _: None)
        self._scratch, self._limit = scratch, memory_limit
        self._hidden: list[Activations] = []
        self.lists = lists
        self._keeps_original = "original" in plan.steps.needs
        self._quantizer = BlockQuantizer(skeleton, plan)
        self._layers = {layer.info.name: layer for layer in plan.layers}
        #: What came out of the last list of blocks, ``original`` where the plan's steps need that.
        self.final: dict[str, Chain] = {}

    def run(self, finished: Finished) -> Iterator[BlockOutcome]:
        """Quantize block after block; those already ``finished`` only run, so that the next sees what they return.

        Yields the outcome of each block that was not finished, once the block after it may begin.
        """
        try:
            yield from self._run(finished)
        except BaseException:
            # What is interrupted goes on from whole blocks; hidden states would only take room on disk.
            for states in self._hidden:
                states.clear()
            raise

    def _run(self, finished: Finished) -> Iterator[BlockOutcome]:
        everything = [path for block_list in self.lists for path in block_list.blocks]
        total = len(everything)
        done = 0
        before: dict[str, list[tuple[list[nn.Module], Chain]]] = {}
        for blocks in self.lists:
            modules = [self.skeleton.module.get_submodule(path) for path in blocks.blocks]
            names = ("quantized", "original") if self._keeps_original else ("quantized",)
            chains = self._enter(blocks, modules, names, before)
            for index, path in enumerate(blocks.blocks):
                report = part_of(self.tick, done / total, (done + 1) / total)
                earlier = finished(path)
                with self.skeleton.reading_others(everything):
                    outcome = self._block(index, path, chains, earlier, report)
                done += 1
                report(1.0)
                if earlier is None:
                    yield outcome
            for name, chain in chains.items():
                chain.arguments.clear()
                before.setdefault(name, []).append((modules, chain))
        self.final = {name: lists[-1][1] for name, lists in before.items()}
        for states in self._hidden:
            if all(states is not chain.hidden for chain in self.final.values()):
                states.clear()

    def _enter(
        self,
        blocks: BlockList,
        modules: list[nn.Module],
        names: Sequence[str],
        before: Mapping[str, list[tuple[list[nn.Module], Chain]]],
    ) -> dict[str, Chain]:
        """Run what comes before a list of blocks, and keep what its blocks are called with."""
        everything = [path for block_list in self.lists for path in block_list.blocks]
        share = self._limit // len(names)
        chains = {name: Chain(Activations(self._scratch, f"{blocks.path}-{name}", share)) for name in names}
        self._hidden += [chain.hidden for chain in chains.values()]
        capture = Capture(self.skeleton.module, modules)
        with self.skeleton.loading_others(everything):
            self.skeleton.load(blocks.blocks[0])
            for number in ranks.own_batches(len(self.batches)):
                batch = self.batches[number]
                captured = None
                for name, chain in chains.items():
                    # Before the first list the chains are one, and only their hidden states part later.
                    if captured is None or before:
                        with ExitStack() as stack:
                            for earlier, finished in before.get(name, ()):
                                stack.enter_context(finished.replaying(earlier, number))
                            captured = capture.run(batch)
                    self._require_samples_first(captured.hidden, batch)
                    chain.enter(number, captured)
                if self._keeps_original and number == 0:
                    self._tell_samples_apart(capture, batch, chains, before)
        release_freed()
        return chains

    def _tell_samples_apart(
        self,
        capture: Capture,
        batch: Mapping[str, Tensor],
        chains: Mapping[str, Chain],
        before: Mapping[str, list[tuple[list[nn.Module], Chain]]],
    ) -> None:
        """See by a batch of one sample which of the blocks' arguments have rows for every sample, and how many."""
        samples = len(next(iter(batch.values())))
        # A later list's arguments come of blocks that are replayed; what they return beside is not split by samples.
        if before or samples == 1 or any(len(values) != samples for values in batch.values()):
            return
        single = capture.run({key: values[:1] for key, values in batch.items()})
        for chain in chains.values():
            pairs = zip(chain.arguments[0], single.arguments, strict=True)
            chain.per_sample = [several.per_sample(one, samples) for several, one in pairs]

    def _require_samples_first(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Raise InputError where single samples are to be drawn from hidden states whose first axis is another."""
        samples = len(next(iter(batch.values())))
        if self._keeps_original and len(hidden) != samples:
            raise InputError(
                f"The blocks are given hidden states of shape {list(hidden.shape)} for {samples} samples, and "
                f"{self.plan.steps} learns from single samples: their axis must be the first.",
                hint="In torch's own layers that is batch_first=True; or use gptq or awq, which look at all together.",
            )

    def _block(
        self, index: int, path: str, chains: Mapping[str, Chain], finished: BlockOutcome | None, report: Tick
    ) -> BlockOutcome:
        block = self.skeleton.load(path).to(self.device)
        with self._precision(block, self._calls(chains["quantized"], index)):
            return self._run_block(index, path, block, chains, finished, report)

    def _precision(self, block: nn.Module, calls: Sequence[Call]) -> AbstractContextManager[None]:
        """Full precision where a block's own code fails on bfloat16 products, as one that adds in place may."""
        fails = has_bfloat16(self.device) and ranks.first(lambda: _fails(block, calls[0]))
        return full_precision() if fails else nullcontext()

    def _calls(self, chain: Chain, index: int) -> _Calls:
        return _Calls(chain, index, len(self.batches), self.device)

    def _run_block(
        self,
        index: int,
        path: str,
        block: nn.Module,
        chains: Mapping[str, Chain],
        finished: BlockOutcome | None,
        report: Tick,
    ) -> BlockOutcome:
        quantized, original = chains["quantized"], chains.get("original")
        if original:
            self._advance(index, block, original)
        outcome = finished
        if outcome is None:
            calls, targets = self._calls(quantized, index), original.hidden if original else None
            outcome = self._quantizer.run(path, block, calls, targets, self.seed + index, report)
        for name, info in self.skeleton.parameters(path).items():
            if info.name in outcome.quantized:
                tensor = outcome.quantized[info.name].tensor
                # What was read back from the files has its scales as they are stored.
                values = self._layers[info.name].as_weight(decoded(tensor if finished else as_stored(tensor)))
            else:
                values = outcome.plain[info.name]
            parameter = block.get_parameter(name.removeprefix(f"{path}."))
            parameter.data = values.reshape(parameter.shape).to(self.device)
        tensors = {name: rounded.tensor for name, rounded in outcome.quantized.items()}
        with quantized_inputs(block, self._quantizer.inside(path), tensors):
            self._advance(index, block, quantized, part_of(report, ROUNDED, 1.0))
        block.to("cpu")
        self.skeleton.drop(path)
        release_freed()
        return outcome

    def _advance(self, index: int, block: nn.Module, chain: Chain, report: Tick | None = None) -> None:
        """Run a block on every batch; its outputs take the place of its inputs."""
        own = ranks.own_batches(len(self.batches))
        with torch.no_grad():
            for number, call in zip(own, counted(self._calls(chain, index), report), strict=True):
                chain.hidden[number] = call.run(block).cpu()


def _fails(block: nn.Module, call: Call) -> bool:
    try:
        with torch.no_grad():
            call.run(block)
    except BlockError:
        return True
    return False
