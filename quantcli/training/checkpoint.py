"""Quantization-aware training of a checkpoint whose blocks have just been quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantcli.blocks.batches import completed
from quantcli.blocks.model import SequentialModel
from quantcli.blocks.structure import BlockList
from quantcli.core.tensors import QuantizedTensor
from quantcli.data.samples import Samples
from quantcli.models.hugging_face import is_causal
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.training.checkpoint_trainee import CheckpointTraining, Trained
from quantcli.training.data import TrainingData, train
from quantcli.training.loop import Defaults, History

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
    written: tuple[Mapping[str, QuantizedTensor], Mapping[str, Tensor]],
    samples: Samples,
    *,
    seed: int,
    device: str,
    checkpoint: Path,
    tick: Callable[[float], None],
    say: Callable[[str], None],
) -> tuple[Trained, History]:
    """Train a quantized model; returns what was learned, and how it went.

    Args:
        model: what is trained.
        original: the same model again, which it learns from.
        plan: its steps say how.
        blocks: the model's blocks.
        written: their quantized weights and their other parameters, by the names of tensors.
        samples: what it learns from.
        seed: what is held out and the order of samples are drawn by it.
        device: ``cpu`` or ``cuda``.
        checkpoint: file that an interrupted training is continued from.
        tick: told the fraction that is done.
        say: told how it goes, in words.

    Raises:
        InputError: there is too little memory, the data does not suit the model, or the loss is not finite.
        UsageError: the recipe asks for labels that are not there.
    """
    options, place = plan.steps.options("qat"), torch.device(device)
    trainee = CheckpointTraining(
        model.skeleton,
        original.skeleton,
        plan,
        blocks,
        *written,
        place,
        norms=options.norms,
        mixed_precision=options.mixed_precision,
    )
    data = TrainingData(samples, place, lambda batch: completed(model, batch))
    causal = model.folder is not None and (model.folder / "config.json").is_file() and is_causal(model.folder)
    history = train(
        trainee,
        data,
        options,
        LANGUAGE if causal else OTHERS,
        seed=seed,
        checkpoint=checkpoint,
        tick=tick,
        say=say,
    )
    return trainee.result(), history


def save_trained(path: Path, trained: Trained, history: History) -> None:
    """Keep what was learned in a file, whole or not at all."""
    tensors = {name: values.contiguous() for name, values in trained.plain.items()}
    for name, tensor in trained.coded.items():
        parts = {_CODES: tensor.codes, _SCALE: tensor.scale}
        parts |= {} if tensor.zero_point is None else {_ZERO_POINT: tensor.zero_point}
        parts |= {} if tensor.input_scale is None else {_INPUT_SCALE: tensor.input_scale}
        tensors |= {f"{name}/{part}": values.contiguous() for part, values in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    save_file(tensors, unfinished, {_HISTORY: json.dumps(vars(history))})
    unfinished.replace(path)


def load_trained(path: Path, layers: Mapping[str, LayerPlan]) -> tuple[Trained, History]:
    """What `save_trained` kept."""
    trained = Trained()
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
        trained.coded[name] = QuantizedTensor(
            codes,
            tensors[f"{name}/{_SCALE}"],
            tensors.get(f"{name}/{_ZERO_POINT}"),
            layers[name].matrix_shape,
            scheme.weights,
            tensors.get(f"{name}/{_INPUT_SCALE}"),
        )
    return trained, history
