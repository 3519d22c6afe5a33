"""The part of a conversion that looks at calibration data: blocks in sequence, then scales learned for the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quantcli.blocks.batches import CalibrationBatches, load_batches
from quantcli.blocks.model import hugging_face, plain_module
from quantcli.blocks.structure import find_blocks
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.conversion.checkpoint.layout import Destination
from quantcli.conversion.checkpoint.writer import (
    LayerResult,
    Output,
    place_codes,
    place_scales,
    place_values,
    read_codes,
)
from quantcli.core.numerics import error_powers, in_groups
from quantcli.core.tensors import QuantizedTensor
from quantcli.data.fingerprint import fingerprint
from quantcli.data.request import Calibration
from quantcli.errors import InputError, UsageError
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.resolve import resolve
from quantcli.ptq.engine import BlockEngine, BlockOutcome, Chain, linear_layers
from quantcli.ptq.memory_demand import foresee
from quantcli.ptq.rounding import Coded
from quantcli.system.devices import check_device
from quantcli.system.hardware import free_memory_bytes, resident_bytes
from quantcli.system.parallel import torch_threads
from quantcli.system.text import format_bytes
from quantcli.training.checkpoint import load_trained, save_trained, train_checkpoint
from quantcli.training.loop import History

#: Of the memory that the heaviest block leaves, one part in so many is for hidden states; others go to disk.
_HIDDEN_SHARE = 2
#: Of the time a tuned model takes, roughly what its blocks take and what tuning does.
_BLOCKS, _TUNE = 0.4, 0.6
#: Of the time a trained model takes, roughly what training does.
_TRAINING = 0.7
#: What tuning has learned, until it is in the output; where it exists the blocks are all done.
_LEARNED = "tuned.safetensors"


class CalibratedWork:
    """Quantizes the blocks of a model with the data at hand.

    ``plan`` is the one it was given, without what only the blocks' layers can have, and with warnings of the data.

    Raises (when made):
        UsageError: a recipe's list of blocks is none, or the memory allowed is too little for a block.
        InputError: the model cannot be run, its blocks are not found, the data does not suit it, or the machine has too
            little memory for a block.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        given: Calibration,
        *,
        function: str | None = None,
        device: str,
        memory_limit: int | None,
    ) -> None:
        """Get ready. The checkpoint is a Hugging Face folder, or holds the weights of the module of ``function``."""
        check_device(device)
        self.checkpoint, self.plan, self.given, self.device = checkpoint, plan, given, device
        model = plain_module(function, checkpoint) if function else hugging_face(checkpoint)
        self._function, self._model, self.skeleton = function, model, model.skeleton
        self.history: History | None = None
        self.data: CalibrationBatches = load_batches(model, given, trains=self._trains)
        linear = linear_layers(self.skeleton, plan)
        self._blocks = find_blocks(self.skeleton.module, linear, plan.recipe.blocks)
        model.require_own_weights(self._blocks, {layer.info.name for layer in plan.layers if layer.is_coded})
        inside = self.names()
        seen = {layer.info.name for layer in linear.values()} & inside
        unseen = {layer.info.name for layer in plan.quantized if layer.scheme and layer.scheme.is_static} - seen
        if unseen:
            places = {name: "in no layer of its own" if name in inside else "outside the blocks" for name in unseen}
            leave = {name: f"{place}, where the range of inputs is not observed" for name, place in places.items()}
            self.plan = resolve(plan.recipe, checkpoint.infos(), checkpoint.config, data=True, leave=leave)
        self.plan = replace(self.plan, warnings=(*self.plan.warnings, *self.data.samples.warnings))
        self._by_name: dict[str, LayerPlan] = {layer.info.name: layer for layer in self.plan.layers}
        self._hidden_bytes = self._spare_memory(memory_limit) // _HIDDEN_SHARE

    def _spare_memory(self, limit: int | None) -> int:
        """Bytes that the heaviest block leaves.

        Raises:
            UsageError: it does not fit into ``limit``, bytes that this process must not exceed.
            InputError: it does not fit into the memory that is free.
        """
        demand = foresee(self.skeleton, self.plan, self._blocks, self.data.batches)
        taken, free = resident_bytes(), free_memory_bytes()
        if limit is not None and taken + demand.nbytes > limit:
            raise UsageError(
                f"--max-memory {format_bytes(limit)} is too little: with {demand.block}, its Hessians and what goes "
                f"through it, {format_bytes(taken + demand.nbytes)} are needed.",
                hint="Raise the limit, or use an algorithm without data, such as mse.",
            )
        if demand.nbytes > free:
            raise InputError(
                f"{demand.block}, its Hessians and what goes through it need {format_bytes(demand.nbytes)} of memory, "
                f"and {format_bytes(free)} are free.",
                hint="Free some, or use an algorithm without data, such as mse.",
            )
        return (free if limit is None else min(free, limit - taken)) - demand.nbytes

    def names(self) -> set[str]:
        """Tensors that belong to blocks."""
        paths = (path for each in self._blocks for path in each.blocks)
        return {info.name for path in paths for info in self.skeleton.parameters(path).values()}

    def fingerprint(self) -> dict[str, Any]:
        """What of the data, and of how it goes through the model, decides the output."""
        function = {"function": self._function} if self._function else {}
        return {"data_sha256": self.data.samples.sha256, "seed": self.given.seed, "device": self.device} | function

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

    def run(self, output: Output) -> None:
        """Quantize and write every block whose tensors are not in the output's results yet, then tune."""
        learned = output.scratch / _LEARNED
        with torch_threads():
            if not learned.exists():
                chain = self._run_blocks(output)
                if self._tunes:
                    self._tune(output, chain, learned)
                elif self._trains:
                    self._train(output, learned)
        if self._tunes:
            self._place_tuned(output, learned)
        elif self._trains:
            self._place_trained(output, learned)

    def _run_blocks(self, output: Output) -> Chain:
        """Quantize and write block after block; returns what comes out of the last one."""
        share = _BLOCKS if self._tunes else 1 - _TRAINING if self._trains else 1.0
        engine = BlockEngine(
            self.skeleton,
            self.plan,
            self._blocks,
            self.data.batches,
            scratch=output.scratch,
            memory_limit=self._hidden_bytes,
            device=self.device,
            seed=self.given.seed,
            tick=lambda done: output.tick(share * done),
        )
        artifact = open_checkpoint(output.folder) if output.results else None
        for outcome in engine.run(lambda path: self._finished(path, artifact, output.results)):
            for name, result in self._place(outcome, output.destinations).items():
                output.record(name, result)
        return engine.final["original" if self._tunes else "quantized"]

    @property
    def _tunes(self) -> bool:
        return any(step.name == "tune" for step in self.plan.steps.final)

    @property
    def _trains(self) -> bool:
        return any(step.name == "qat" for step in self.plan.steps.final)

    def _written(self, output: Output) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        """What was written of the blocks: codes, and other parameters in float32, by the names of tensors."""
        artifact = open_checkpoint(output.folder)
        outcomes = [self._finished(path, artifact, output.results) for each in self._blocks for path in each.blocks]
        coded = {name: each.tensor for outcome in outcomes if outcome for name, each in outcome.coded.items()}
        return coded, {name: values for outcome in outcomes if outcome for name, values in outcome.plain.items()}

    def _train(self, output: Output, learned: Path) -> None:
        """Train what was written, into a file of its own: what is written stays whole."""
        again = plain_module(self._function, self.checkpoint) if self._function else hugging_face(self.checkpoint)
        trained, history = train_checkpoint(
            self._model,
            again,
            self.plan,
            self._blocks,
            self._written(output),
            self.data.samples,
            seed=self.given.seed,
            device=self.device,
            checkpoint=output.scratch / "training.pt",
            tick=lambda done: output.tick(1 - _TRAINING + _TRAINING * done),
            say=output.say,
        )
        self.skeleton.drop()
        save_trained(learned, trained, history)

    def _place_trained(self, output: Output, learned: Path) -> None:
        trained, self.history = load_trained(learned, self._by_name)
        for name, values in trained.plain.items():
            output.record(name, place_values(self._by_name[name], values, output.destinations))
        for name, tensor in trained.coded.items():
            layer = self._by_name[name]
            result = place_codes(layer, tensor, self.plan, output.destinations)
            # Where an interrupted run placed it already, that is said already.
            before = output.results[name]
            result.algorithm, result.note = f"{before.algorithm.removesuffix(' + qat')} + qat", before.note
            result.signal, result.noise = self._powers(layer, tensor)
            output.record(name, result)

    def _powers(self, layer: LayerPlan, tensor: QuantizedTensor) -> tuple[float, float]:
        """Sums of squares of a weight and of its error; zeros where scales moved between layers.

        There the weight that the codes stand for is none of the checkpoint's.
        """
        if self.plan.steps.transforms:
            return 0.0, 0.0
        weight = self.checkpoint.load(layer.info.name).float().reshape(layer.matrix_shape)
        return error_powers(in_groups(weight, tensor.number_format), tensor)

    def _tune(self, output: Output, teacher: Chain, learned: Path) -> None:
        """Learn scales and norms of the written blocks, into a file of their own: what is written stays whole."""
        from safetensors.torch import save_file

        from quantcli.training.tuning import ModelTuning

        coded, plain = self._written(output)
        options = self.plan.steps.options("tune")
        tuning = ModelTuning(self.skeleton, self.plan, self._blocks, coded, plain, options)
        seed = self.given.seed
        tuned = tuning.run(self.data.batches, teacher, seed, lambda done: output.tick(_BLOCKS + _TUNE * done))
        self.skeleton.drop()
        output.scratch.mkdir(parents=True, exist_ok=True)
        unfinished = learned.with_suffix(".partial")
        save_file({name: each.contiguous() for name, each in (tuned.scales | tuned.norms).items()}, unfinished)
        unfinished.replace(learned)

    def _place_tuned(self, output: Output, learned: Path) -> None:
        from safetensors.torch import load_file

        artifact = open_checkpoint(output.folder)
        for name, values in load_file(learned).items():
            layer = self._by_name[name]
            if not layer.is_coded:
                output.record(name, place_values(layer, values, output.destinations))
                continue
            tensor = replace(read_codes(layer, self.plan, artifact), scale=values)
            signal, noise = self._powers(layer, tensor)
            result = replace(output.results[name], signal=signal, noise=noise)
            output.record(name, place_scales(layer, tensor, self.plan, output.destinations, result))

    def _place(self, outcome: BlockOutcome, destinations: Mapping[str, Destination]) -> dict[str, LayerResult]:
        placed = {}
        for name, coded in outcome.coded.items():
            result = placed[name] = place_codes(self._by_name[name], coded.tensor, self.plan, destinations)
            result.signal, result.noise = coded.signal, coded.noise
            result.algorithm, result.note = coded.algorithm, coded.note or ""
        for name, values in outcome.plain.items():
            placed[name] = place_values(self._by_name[name], values, destinations)
        return placed

    def _finished(
        self, path: str, artifact: Checkpoint | None, results: Mapping[str, LayerResult]
    ) -> BlockOutcome | None:
        """A block whose every tensor was done when this run began, read back from the files; None for another."""
        names = [info.name for info in self.skeleton.parameters(path).values()]
        if artifact is None or not all(name in results for name in names):
            return None
        outcome = BlockOutcome(path)
        for name in names:
            layer = self._by_name[name]
            if layer.is_coded:
                outcome.coded[name] = Coded(read_codes(layer, self.plan, artifact), results[name].algorithm)
            else:
                outcome.plain[name] = artifact.load(name).float()
        return outcome
