"""The part of a conversion that looks at calibration data: blocks in sequence, then scales learned for the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantcli.blocks.batches import CalibrationBatches, load_batches
from quantcli.blocks.model import SequentialModel, hugging_face, plain_module
from quantcli.blocks.structure import WHOLE, BlockList
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.conversion.checkpoint.layout import Destination
from quantcli.conversion.checkpoint.observable import (
    names_inside,
    ordered_blocks,
    without_unobserved,
    without_unreached,
)
from quantcli.conversion.checkpoint.writer import (
    LayerResult,
    Output,
    read_codes,
    write_codes,
    write_scales,
    write_values,
)
from quantcli.conversion.staging import Staging
from quantcli.core.numerics import error_powers, in_groups
from quantcli.core.tensors import QuantizedTensor, RoundedTensor, Rounding
from quantcli.data.fingerprint import fingerprint
from quantcli.data.request import DataRequest
from quantcli.errors import InputError, UsageError
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.targets import for_target
from quantcli.ptq.block import BlockOutcome, linear_layers
from quantcli.ptq.engine import BlockEngine, Chain
from quantcli.ptq.memory_demand import Demand, foresee
from quantcli.ptq.whole import quantize_whole
from quantcli.system import ranks
from quantcli.system.devices import check_device
from quantcli.system.files import whole_file
from quantcli.system.hardware import free_memory_bytes, resident_bytes
from quantcli.system.parallel import torch_threads
from quantcli.system.ranks import on_this_machine
from quantcli.system.text import format_bytes
from quantcli.training.checkpoint import load_trained, save_trained, train_checkpoint
from quantcli.training.loop import History
from quantcli.training.parameters import Parameters
from quantcli.training.run import Run

#: Of the memory that the heaviest block leaves, one part in so many is for hidden states; others go to disk.
_HIDDEN_SHARE = 2
#: Of the time a tuned model takes, roughly what its blocks take and what tuning does.
_BLOCKS, _TUNE = 0.4, 0.6
#: Of the time a trained model takes, roughly what training does.
_TRAINING = 0.7
#: What tuning has learned, until it is in the output; where it exists the blocks are all done.
_LEARNED = "tuned.safetensors"


def prepare_calibration(
    checkpoint: Checkpoint,
    plan: Plan,
    request: DataRequest,
    *,
    function: str | None = None,
    device: str,
    memory_limit: int | None,
) -> CalibratedWork:
    """Get ready to quantize blocks: lay the model out, read the data, find the blocks, and count memory.

    Args:
        checkpoint: a Hugging Face folder, or the weights of the module of ``function``.
        plan: what becomes of its tensors; static ranges of inputs outside the blocks' layers are taken out.
        request: what data to calibrate on.
        function: ``package.module:function``, if that makes the module.
        device: ``cpu`` or ``cuda``.
        memory_limit: bytes that this process must not exceed.

    Raises:
        UsageError: a recipe's list of blocks is none, or the memory allowed is too little for a block.
        InputError: the model cannot be run, its blocks are not found, the data does not suit it, or the machine has too
            little memory for a block.
        MissingExtraError: transformers is not installed.
    """
    check_device(device)
    if "original" in plan.steps.needs or plan.steps.final:
        ranks.go_on_alone(f"{plan.steps}, which learns from what the original model returns,")
    model = _open_model(checkpoint, function)
    data = load_batches(model, request, trains=_learns(plan, "qat"))
    linear = linear_layers(model.skeleton, plan)
    plan, blocks, unreached = ordered_blocks(plan, model.skeleton, linear, data.batches[0])
    plan, leave = without_unreached(plan, checkpoint, model.skeleton, blocks, unreached)
    model.require_own_weights(blocks, {layer.info.name for layer in plan.layers if layer.has_codes})
    inside = names_inside(model.skeleton, blocks)
    plan = without_unobserved(plan, checkpoint, inside, {layer.info.name for layer in linear.values()} & inside, leave)
    plan = for_target(replace(plan, warnings=(*plan.warnings, *data.samples.warnings)))
    hidden_bytes = spare_memory(foresee(model.skeleton, plan, blocks, data.batches), memory_limit) // _HIDDEN_SHARE
    return CalibratedWork(checkpoint, plan, model, blocks, data, function, device, request.seed, hidden_bytes)


def _open_model(checkpoint: Checkpoint, function: str | None) -> SequentialModel:
    return plain_module(function, checkpoint) if function else hugging_face(checkpoint)


def _learns(plan: Plan, name: str) -> bool:
    """Whether the plan's chain ends with the algorithm of this name."""
    return any(step.name == name for step in plan.steps.final)


def spare_memory(demand: Demand, limit: int | None) -> int:
    """Bytes that the heaviest block leaves.

    Raises:
        UsageError: it does not fit into ``limit``, bytes that this process must not exceed.
        InputError: it does not fit into the memory that is free.
    """
    taken, free = resident_bytes(), free_memory_bytes()
    if limit is not None and taken + demand.nbytes > limit:
        raise UsageError(
            f"--max-memory {format_bytes(limit)} is too little: with {demand.block}, its Hessians and what goes "
            f"through it, {format_bytes(taken + demand.nbytes)} are needed.",
            hint="Raise the limit, or use an algorithm without data, such as mse.",
        )
    free //= on_this_machine()
    if demand.nbytes > free:
        raise InputError(
            f"{demand.block}, its Hessians and what goes through it need {format_bytes(demand.nbytes)} of memory, "
            f"and {format_bytes(free)} are free.",
            hint="Free some, or use an algorithm without data, such as mse.",
        )
    return (free if limit is None else min(free, limit - taken)) - demand.nbytes


@dataclass
class CalibratedWork:
    """Quantizes the blocks of a model with the data at hand. Use `prepare_calibration`.

    ``hidden_bytes``: memory for hidden states between blocks. ``history``: of training, once there was some.
    """

    checkpoint: Checkpoint
    plan: Plan
    model: SequentialModel
    blocks: Sequence[BlockList]
    data: CalibrationBatches
    function: str | None
    device: str
    seed: int
    hidden_bytes: int
    history: History | None = None

    @cached_property
    def _layers(self) -> dict[str, LayerPlan]:
        return {layer.info.name: layer for layer in self.plan.layers}

    def names(self) -> set[str]:
        """Tensors that belong to blocks, and are stored."""
        dropped = {name for name, layer in self._layers.items() if layer.dropped}
        return names_inside(self.model.skeleton, self.blocks) - dropped

    def fingerprint(self) -> dict[str, Any]:
        """What of the data, and of how it goes through the model, decides the output."""
        function = {"function": self.function} if self.function else {}
        return {"data_sha256": self.data.samples.sha256, "seed": self.seed, "device": self.device} | function

    def manifest(self) -> dict[str, Any]:
        """Entries of the manifest that tell of the data: hashes and counts, no path and no text."""
        samples = self.data.samples
        counts = {"data_sha256": samples.sha256, "samples": len(samples)}
        if self.data.tokens is not None:
            counts["tokens"] = self.data.tokens
        sketch = fingerprint(sample.inputs for sample in samples)
        if self.history is not None:
            counts["training"] = {key: getattr(self.history, key) for key in ("loss", "steps", "best_step", "stopped")}
        return {"calibration": counts} | ({"calibration_fingerprint": sketch} if sketch else {})

    def has_learned(self, staging: Staging) -> bool:
        """Whether an interrupted run has learned what all of its tensors will be."""
        return (staging.scratch / _LEARNED).exists()

    def run(self, output: Output) -> None:
        """Quantize and write every block whose tensors are not in the output's results yet, then learn."""
        learned = output.staging.scratch / _LEARNED
        if not learned.exists():
            with torch_threads():
                chain = self._run_blocks(output)
                if chain and self._tunes:
                    self._tune(output, chain, learned)
                elif self._trains:
                    self._train(output, learned)
        if self._tunes:
            self._write_tuned(output, learned)
        elif self._trains:
            self._write_trained(output, learned)
        self.data.samples.require_unchanged()

    def _run_blocks(self, output: Output) -> Chain | None:
        """Quantize and write block after block; returns what comes out of the last one, if there is an order."""
        if list(self.blocks) == [WHOLE]:
            self._run_whole(output)
            return None
        share = _BLOCKS if self._tunes else 1 - _TRAINING if self._trains else 1.0
        engine = BlockEngine(
            self.model.skeleton,
            self.plan,
            self.blocks,
            self.data.batches,
            scratch=output.staging.scratch,
            memory_limit=self.hidden_bytes,
            device=self.device,
            seed=self.seed,
            tick=lambda done: output.tick(share * done),
        )
        artifact = open_checkpoint(output.staging.out) if output.results else None
        for outcome in engine.run(lambda path: self._finished(path, artifact, output.results)):
            self._record(outcome, output)
        return engine.final["original" if self._tunes else "quantized"]

    def _run_whole(self, output: Output) -> None:
        if self.names() <= output.results.keys():
            return
        outcome = quantize_whole(
            self.model.skeleton,
            self.plan,
            self.data.batches,
            device=self.device,
            seed=self.seed,
            tick=output.tick,
        )
        self._record(outcome, output)

    def _record(self, outcome: BlockOutcome, output: Output) -> None:
        """Write a block, which every rank knows and the first one writes."""
        if ranks.is_first():
            for name, result in self._write(outcome, output.destinations).items():
                output.record(name, result)
            output.staging.note_calibrated()

    @property
    def _tunes(self) -> bool:
        return _learns(self.plan, "tune")

    @property
    def _trains(self) -> bool:
        return _learns(self.plan, "qat")

    def _written(self, output: Output) -> Parameters:
        """The blocks' parameters as they were written."""
        artifact = open_checkpoint(output.staging.out)
        paths = [path for block_list in self.blocks for path in block_list.blocks]
        outcomes = [outcome for path in paths if (outcome := self._finished(path, artifact, output.results))]
        quantized = {name: rounded.tensor for outcome in outcomes for name, rounded in outcome.quantized.items()}
        plain = {name: values for outcome in outcomes for name, values in outcome.plain.items()}
        return Parameters(quantized, plain)

    def _train(self, output: Output, learned: Path) -> None:
        """Train what was written, into a file of its own: what is written stays whole."""
        trained, history = train_checkpoint(
            self.model,
            _open_model(self.checkpoint, self.function),
            self.plan,
            self.blocks,
            self._written(output),
            self.data.samples,
            Run(
                self.seed,
                self.device,
                output.staging.scratch / "training.pt",
                tick=lambda done: output.tick(1 - _TRAINING + _TRAINING * done),
                say=output.say,
            ),
        )
        self.model.skeleton.drop()
        save_trained(learned, trained, history)

    def _write_trained(self, output: Output, learned: Path) -> None:
        trained, self.history = load_trained(learned, self._layers)
        for name, values in trained.plain.items():
            output.record(name, write_values(self._layers[name], values, output.destinations))
        for name, tensor in trained.quantized.items():
            # Where an interrupted run wrote it already, that is said already.
            algorithm = f"{output.results[name].rounding.algorithm.removesuffix(' + qat')} + qat"
            rounded = RoundedTensor(tensor, replace(self._measured(name, tensor, output), algorithm=algorithm))
            output.record(name, write_codes(self._layers[name], rounded, self.plan, output.destinations))

    def _measured(self, name: str, tensor: QuantizedTensor, output: Output) -> Rounding:
        """How a layer's codes came about so far, with what they cost now; zeros where scales moved between layers.

        There the weight that the codes stand for is none of the checkpoint's.
        """
        signal = noise = 0.0
        if not self.plan.steps.transforms:
            weight = self.checkpoint.load(name).float().reshape(self._layers[name].matrix_shape)
            signal, noise = error_powers(in_groups(weight, tensor.number_format), tensor)
        return replace(output.results[name].rounding, signal=signal, noise=noise)

    def _tune(self, output: Output, teacher: Chain, learned: Path) -> None:
        """Learn scales and norms of the written blocks, into a file of their own: what is written stays whole."""
        from safetensors.torch import save_file

        from quantcli.training.tuning import ModelTuning

        skeleton, options = self.model.skeleton, self.plan.steps.options("tune")
        tuning = ModelTuning(skeleton, self.plan, self.blocks, self._written(output), options)
        tuned = tuning.run(self.data.batches, teacher, self.seed, lambda done: output.tick(_BLOCKS + _TUNE * done))
        skeleton.drop()
        learned.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(learned) as unfinished:
            save_file({name: values.contiguous() for name, values in tuned.items()}, unfinished)

    def _write_tuned(self, output: Output, learned: Path) -> None:
        from safetensors.torch import load_file

        artifact = open_checkpoint(output.staging.out)
        for name, values in load_file(learned).items():
            layer = self._layers[name]
            if not layer.has_codes:
                output.record(name, write_values(layer, values, output.destinations))
                continue
            tensor = replace(read_codes(layer, self.plan, artifact), scale=values)
            checksums = write_scales(layer, tensor, self.plan, output.destinations)
            rounding = self._measured(name, tensor, output)
            output.record(name, LayerResult(output.results[name].checksums, *checksums, rounding))

    def _write(self, outcome: BlockOutcome, destinations: Mapping[str, Destination]) -> dict[str, LayerResult]:
        results = {}
        for name, rounded in outcome.quantized.items():
            results[name] = write_codes(self._layers[name], rounded, self.plan, destinations)
        for name, values in outcome.plain.items():
            results[name] = write_values(self._layers[name], values, destinations)
        return results

    def _finished(
        self, path: str, artifact: Checkpoint | None, results: Mapping[str, LayerResult]
    ) -> BlockOutcome | None:
        """A block whose every tensor was done when this run began, read back from the files; None for another."""
        names = [info.name for info in self.model.skeleton.parameters(path).values()]
        if artifact is None or not all(name in results for name in names):
            return None
        outcome = BlockOutcome(path)
        for name in names:
            layer = self._layers[name]
            if layer.has_codes:
                tensor = read_codes(layer, self.plan, artifact)
                outcome.quantized[name] = RoundedTensor(tensor, results[name].rounding)
            else:
                outcome.plain[name] = artifact.load(name).float()
        return outcome
