"""Quantization-aware training of a graph that has just been quantized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.algorithms.qat import Options as QatOptions
from quantcli.planning.recipe import Recipe
from quantcli.training.data import TrainingData, train
from quantcli.training.loop import Defaults, History
from quantcli.training.run import Run
from quantcli.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.data.samples import Samples
    from quantcli.onnx.graph.model import OnnxModel
    from quantcli.onnx.plan.plan import LayerOutcome

#: What does well for small models on a CPU; a learning rate is in steps of a weight's grid.
DEFAULTS = Defaults(epochs=5, batch_size=64, learning_rate=0.02, scale_learning_rate=2e-3)


def fingerprint(
    recipe: Recipe, model: OnnxModel, samples: Samples, statistics: Path | None, seed: int, device: str
) -> str:
    """Hash of all that decides what a training becomes; ``statistics`` is a STATS file."""
    identity = {
        "quantcli": __version__,
        "recipe": recipe.model_dump(),
        "model": model.sha256(),
        "data": samples.sha256,
        "statistics": hashlib.sha256(statistics.read_bytes()).hexdigest() if statistics else None,
        "seed": seed,
        "device": device,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def train_layers(
    original: ir.Model,
    quantized: ir.Model,
    outcomes: Sequence[LayerOutcome],
    samples: Samples,
    options: QatOptions,
    run: Run,
) -> tuple[list[LayerOutcome], History]:
    """Train a quantized graph in place; returns what became of each layer, and how it went.

    Args:
        original: the prepared graph in floating point.
        quantized: the same graph, quantized.
        outcomes: what became of its layers when it was.
        samples: what it learns from, with or without labels.
        options: of the recipe.
        run: its seed, device and checkpoint, and who is told how it goes.

    Raises:
        InputError: the graph cannot be trained, or the data does not suit it.
        UsageError: the recipe asks for labels that are not there.
    """
    import torch

    from quantcli.training.onnx_trainee import GraphTrainee

    device = torch.device(run.device)
    trainee = GraphTrainee(original, quantized, device, norms=options.norms)
    history = train(trainee, TrainingData(samples, device), options, DEFAULTS, run)
    losses = trainee.write_back()

    def trained(outcome: LayerOutcome) -> LayerOutcome:
        plan = outcome.plan
        if plan.name not in losses:
            return outcome
        assert outcome.rounding is not None
        algorithm, (signal, noise) = f"{plan.algorithm} + qat", losses[plan.name]
        rounding = replace(outcome.rounding, algorithm=algorithm, signal=signal, noise=noise)
        return replace(outcome, plan=replace(plan, algorithm=algorithm), rounding=rounding)

    return [trained(outcome) for outcome in outcomes], history
