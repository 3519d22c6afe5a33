"""Quantization-aware training of a checkpoint whose blocks have just been quantized."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantcli.blocks.batches import completed
from quantcli.blocks.model import SequentialModel
from quantcli.blocks.structure import BlockList
from quantcli.core.tensors import QuantizedTensor
from quantcli.data.samples import Samples
from quantcli.models.hugging_face import is_causal
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.system.files import whole_file
from quantcli.training.checkpoint_trainee import CheckpointTrainee
from quantcli.training.data import TrainingData, train
from quantcli.training.loop import Defaults, History
from quantcli.training.parameters import Parameters
from quantcli.training.run import Run

#: A language model learns from few, long samples, and forgets what it knew if it learns fast.
LANGUAGE = Defaults(epochs=1, batch_size=1, learning_rate=2e-2, scale_learning_rate=1e-3, held_out=0.05)
OTHERS = Defaults(epochs=3, batch_size=16, learning_rate=2e-2, scale_learning_rate=1e-3)

#: Parts of a quantized weight, as they are kept until they are in the output.
_CODES, _SCALE, _ZERO_POINT, _INPUT_SCALE = "codes", "scale", "zero_point", "input_scale"
_HISTORY = "history"


def train_checkpoint(
    model: SequentialModel,
    original: SequentialModel,
    plan: Plan,
    blocks: Sequence[BlockList],
    written: Parameters,
    samples: Samples,
    run: Run,
) -> tuple[Parameters, History]:
    """Train a quantized model; returns what was learned, and how it went.

    Args:
        model: what is trained.
        original: the same model again, which it learns from.
        plan: its steps say how.
        blocks: the model's blocks.
        written: their parameters, quantized.
        samples: what it learns from.
        run: its seed, device and checkpoint, and who is told how it goes.

    Raises:
        InputError: there is too little memory, the data does not suit the model, or the loss is not finite.
        UsageError: the recipe asks for labels that are not there.
    """
    options, device = plan.steps.options("qat"), torch.device(run.device)
    trainee = CheckpointTrainee(model.skeleton, original.skeleton, plan, blocks, written, device, options)
    data = TrainingData(samples, device, lambda batch: completed(model, batch))
    causal = model.folder is not None and (model.folder / "config.json").is_file() and is_causal(model.folder)
    history = train(trainee, data, options, LANGUAGE if causal else OTHERS, run)
    return trainee.result(), history


def save_trained(path: Path, trained: Parameters, history: History) -> None:
    """Keep what was learned in a file, whole or not at all."""
    tensors = {name: values.contiguous() for name, values in trained.plain.items()}
    for name, tensor in trained.quantized.items():
        parts = {_CODES: tensor.codes, _SCALE: tensor.scale}
        parts |= {} if tensor.zero_point is None else {_ZERO_POINT: tensor.zero_point}
        parts |= {} if tensor.input_scale is None else {_INPUT_SCALE: tensor.input_scale}
        tensors |= {f"{name}/{part}": values.contiguous() for part, values in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, {_HISTORY: json.dumps(vars(history))})


def load_trained(path: Path, layers: Mapping[str, LayerPlan]) -> tuple[Parameters, History]:
    """What `save_trained` kept."""
    trained = Parameters()
    with safe_open(path, "pt") as file:
        history = History(**json.loads(file.metadata()[_HISTORY]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no mapping
    for name in {name.rpartition("/")[0] or name for name in tensors}:
        codes = tensors.get(f"{name}/{_CODES}")
        if codes is None:
            trained.plain[name] = tensors[name]
            continue
        scheme = layers[name].scheme
        assert scheme is not None
        trained.quantized[name] = QuantizedTensor(
            codes,
            tensors[f"{name}/{_SCALE}"],
            tensors.get(f"{name}/{_ZERO_POINT}"),
            layers[name].matrix_shape,
            scheme.weights,
            tensors.get(f"{name}/{_INPUT_SCALE}"),
        )
    return trained, history
