"""Block after block: load, observe, transform, round, hand on, drop.

Each block sees what the already quantized ones return (GPTQ, arXiv:2210.17323, section 4), so that it can make up for
their errors. In memory are one block, what is known of its inputs, and the hidden states between two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.numerics import TORCH_DTYPES, decoded
from quantcli.plan import LayerPlan, Plan
from quantcli.roles import module_of
from quantcli.sequential.activations import Activations
from quantcli.sequential.calls import Call
from quantcli.sequential.capture import Arguments, Capture, Captured, alike, replaying
from quantcli.sequential.inputs import fix_input_scales, quantized_inputs
from quantcli.sequential.observe import observe
from quantcli.sequential.rounding import Coded, round_block
from quantcli.sequential.skeleton import Skeleton
from quantcli.sequential.structure import BlockList
from quantcli.sequential.transforms import Transforms

#: Calibration inputs by name, batch by batch.
Batches = Sequence[Mapping[str, Tensor]]
#: Called with the fraction of all blocks that is done.
Tick = Callable[[float], None]


@dataclass
class BlockOutcome:
    """A finished block: what its layers became, by the names of their tensors.

    ``plain``: parameters that are not quantized, as float32 holding what their stored dtype can.
    """

    path: str
    coded: dict[str, Coded] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)


class _Chain:
    """Hidden states on their way through a list of blocks, and what else its blocks are called with."""

    def __init__(self, hidden: Activations) -> None:
        self.hidden = hidden
        self.arguments: list[list[Arguments]] = []
        self.returned: list[tuple[Any, ...] | None] = []

    def enter(self, batch: int, captured: Captured) -> None:
        """Take one batch in."""
        self.hidden[batch] = captured.hidden
        # Masks and positions mostly are those of the batch before: then they are held once.
        same = self.arguments and alike(self.arguments[-1], captured.arguments)
        self.arguments.append(self.arguments[-1] if same else captured.arguments)
        self.returned.append(captured.returned)

    @contextmanager
    def replaying(self, modules: Sequence[nn.Module], batch: int) -> Iterator[None]:
        """Let blocks that are finished return what they returned for a batch."""
        with replaying(modules, self.hidden[batch], self.returned[batch]):
            yield

    def calls(self, block: int, device: torch.device) -> Iterator[Call]:
        """Every batch's call of one block."""
        for batch, arguments in enumerate(self.arguments):
            yield arguments[block].call(self.hidden[batch]).to(device)


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
        self.layers, self.lists = linear_layers(skeleton, plan), lists
        self._keeps_original = "original" in plan.steps.needs
        self._transforms = Transforms(plan)
        self.final: dict[str, Activations] = {}

    def run(self, finished: Mapping[str, BlockOutcome]) -> Iterator[BlockOutcome]:
        """Quantize block after block; those already ``finished`` only run, so that the next sees what they return.

        Yields the outcome of each block that was not finished, once the block after it may begin.
        """
        total = sum(len(each.blocks) for each in self.lists)
        done = 0
        before: dict[str, list[tuple[list[nn.Module], _Chain]]] = {}
        for blocks in self.lists:
            modules = [self.skeleton.module.get_submodule(path) for path in blocks.blocks]
            names = ("quantized", "original") if self._keeps_original else ("quantized",)
            chains = self._enter(blocks, modules, names, before)
            for index, path in enumerate(blocks.blocks):
                report = partial(self._report, done, total)
                outcome = self._block(index, path, chains, finished.get(path), report)
                done += 1
                self._report(done, total, 0.0)
                if path not in finished:
                    yield outcome
            for name, chain in chains.items():
                before.setdefault(name, []).append((modules, chain))
        self.final = {name: found[-1][1].hidden for name, found in before.items()}

    def _report(self, done: int, total: int, part: float) -> None:
        self.tick((done + part) / total)

    def _enter(
        self,
        blocks: BlockList,
        modules: list[nn.Module],
        names: Sequence[str],
        before: Mapping[str, list[tuple[list[nn.Module], _Chain]]],
    ) -> dict[str, _Chain]:
        """Run what comes before a list of blocks, and keep what its blocks are called with."""
        everything = tuple(path for each in self.lists for path in each.blocks)
        self.skeleton.load_except(everything)
        self.skeleton.load(blocks.blocks[0])
        chains: dict[str, _Chain] = {}
        share = self._limit // len(names)
        chains = {name: _Chain(Activations(self._scratch, f"{blocks.path}-{name}", share)) for name in names}
        capture = Capture(self.skeleton.module, modules)
        for number, batch in enumerate(self.batches):
            captured = None
            for name, chain in chains.items():
                # Before the first list the chains are one, and only their hidden states part later.
                if captured is None or before:
                    with ExitStack() as stack:
                        for earlier, finished in before.get(name, ()):
                            stack.enter_context(finished.replaying(earlier, number))
                        captured = capture.run(batch)
                chain.enter(number, captured)
        self.skeleton.drop()
        return chains

    def _block(
        self, index: int, path: str, chains: Mapping[str, _Chain], finished: BlockOutcome | None, report: Tick
    ) -> BlockOutcome:
        block = self.skeleton.load(path).to(self.device)
        quantized, original = chains["quantized"], chains.get("original")
        if original:
            self._advance(index, block, original)
        outcome = finished
        if outcome is None:
            outcome = self._quantize(index, path, block, quantized, original, report)
        for name, coded in outcome.coded.items():
            self._set(block, path, name, decoded(coded.tensor))
        for name, values in outcome.plain.items():
            self._set(block, path, name, values)
        with quantized_inputs(block, self._inside(path), outcome.coded):
            self._advance(index, block, quantized)
        block.to("cpu")
        self.skeleton.drop(path)
        return outcome

    def _quantize(
        self, index: int, path: str, block: nn.Module, chain: _Chain, original: _Chain | None, report: Tick
    ) -> BlockOutcome:
        layers = self._inside(path)
        calls = partial(chain.calls, index, self.device)
        targets = original.hidden if original else None
        stats = observe(block, calls(), layers, self._needs(layers))
        if self._transforms.names:
            self._transforms.apply(block, layers, next(calls()), stats)
        coded = round_block(block, layers, calls, targets, stats, self.plan, self.seed + index, report)
        fix_input_scales(coded, layers, stats, TORCH_DTYPES[self.plan.scale_dtype])
        parameters = self.skeleton.parameters(path)
        outcome = BlockOutcome(path, {layers[name].info.name: each for name, each in coded.items()})
        by_name = {layer.info.name: layer for layer in self.plan.layers}
        for name, values in block.named_parameters():
            info = parameters[f"{path}.{name}"]
            if info.name not in outcome.coded:
                stored = TORCH_DTYPES[by_name[info.name].dtype]
                outcome.plain[info.name] = values.detach().to("cpu").to(stored).float()
        return outcome

    def _inside(self, path: str) -> dict[str, LayerPlan]:
        """Layers of a block by their names in it."""
        start = f"{path}."
        return {name.removeprefix(start): layer for name, layer in self.layers.items() if name.startswith(start)}

    def _needs(self, layers: Mapping[str, LayerPlan]) -> frozenset[str]:
        """What is to be observed of the layers' inputs."""
        static = any(layer.scheme is not None and layer.scheme.is_static for layer in layers.values())
        return (self.plan.steps.needs | ({"absmax"} if static else set())) - {"original"}

    def _advance(self, index: int, block: nn.Module, chain: _Chain) -> None:
        """Run a block on every batch; its outputs take the place of its inputs."""
        with torch.no_grad():
            for number, call in enumerate(chain.calls(index, self.device)):
                chain.hidden[number] = call.run(block).cpu()

    def _set(self, block: nn.Module, path: str, tensor: str, values: Tensor) -> None:
        for name, info in self.skeleton.parameters(path).items():
            if info.name == tensor:
                owner, _, leaf = name.removeprefix(f"{path}.").rpartition(".")
                found = getattr(block.get_submodule(owner), leaf)
                found.data = values.reshape(found.shape).to(found.device)


def linear_layers(skeleton: Skeleton, plan: Plan) -> dict[str, LayerPlan]:
    """Layers that get codes and are linear modules of the model, by the module's name."""
    coded = {layer.info.name: layer for layer in plan.layers if layer.is_coded}
    found = {}
    for parameter, info in skeleton.parameters().items():
        path = module_of(parameter)
        linear = isinstance(skeleton.module.get_submodule(path), nn.Linear)
        if linear and info.name in coded and parameter.endswith(".weight"):
            found[path] = coded[info.name]
    return found
