"""A Hugging Face folder as something torch can export: module, example inputs, names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantcli.checkpoint.config_file import read_config
from quantcli.checkpoint.hugging_face import load_json
from quantcli.errors import InputError
from quantcli.export.experts import take_apart
from quantcli.export.source import Example, ExportSource, wave
from quantcli.models import hugging_face
from quantcli.models.positions import longest_sequence
from quantcli.models.runner import TorchRunner, open_runner
from quantcli.models.stored_parameters import vocabulary_of
from quantcli.system.text import first_line

#: Classes whose head is what the model is for; others are exported without one.
_HEADED = ("ForSequenceClassification", "ForImageClassification", "ForTokenClassification", "ForQuestionAnswering")

_IMAGE_SIZE = 224


class _Outputs(nn.Module):
    """A Hugging Face model that takes and returns only what these names say."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str], options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model

        def forward(**given: Tensor) -> tuple[Tensor, ...]:
            returned = model(**given, **options)
            return tuple(returned[name] for name in outputs)

        # torch.export matches free axes with the parameters' names, and confuses those of a plain **given.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])  # type: ignore[attr-defined]
        self.forward = forward


def hugging_face_source(path: Path) -> ExportSource:
    """The model of a folder, with made-up tokens or images as inputs."""
    config = read_config(hugging_face.require_folder(path) / "config.json")
    headed = any(str(name).endswith(_HEADED) for name in config.get("architectures") or [])
    runner = open_runner(path, headed=headed, decoded=True)
    assert isinstance(runner, TorchRunner)
    module = runner.module
    if hasattr(module, "set_attn_implementation"):
        # Plain products and a Softmax: fewer nodes, and what runtimes know how to fuse.
        module.set_attn_implementation("eager")  # type: ignore[operator]
    take_apart(module)
    if runner.inputs[0].shape is None:
        raise InputError(
            f"{path} takes {runner.inputs[0].name}, and only models of text and images are exported.",
            "Export it by hand, and give quantcli the .onnx file.",
        )
    # What may come beside the main input, of any shape, is left out.
    names = [port.name for port in runner.inputs if port.shape is not None]
    if names != ["pixel_values"] and hugging_face.decoder_start(module) is not None:
        names += [port.name for port in runner.inputs if port.name == "decoder_input_ids"]
    examples = _images(module, path) if names == ["pixel_values"] else _tokens(module, path, names)
    options = {"return_dict": True} | ({"use_cache": False} if hugging_face.is_causal(path) else {})
    outputs = _output_names(module, examples[0], options, path)
    wrapped = _Outputs(module, names, outputs, options).eval()

    def run(example: Example) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in zip(outputs, wrapped(**example), strict=True)}

    dynamic = {name: _axes(name) for name in names}
    return ExportSource(str(path), wrapped, run, examples, dynamic, outputs, prefix="model.")


def _axes(name: str) -> dict[int, str]:
    """The free axes of an input."""
    if name == "pixel_values":
        return {0: "batch"}
    return {0: "batch", 1: "decoder_sequence" if name.startswith("decoder_") else "sequence"}


def _output_names(module: nn.Module, example: Example, options: dict[str, Any], path: Path) -> list[str]:
    try:
        with torch.inference_mode():
            returned = module(**example, **options)
    except Exception as error:  # whatever a class's own code raises on inputs that are made up for it
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in example.items())
        raise InputError(
            f"{path} cannot be run on made-up inputs ({shapes}): {first_line(error)}",
            "Export it by hand, and give quantcli the .onnx file.",
        ) from error
    names = [name for name in returned if name == "logits" or name.endswith("_logits")]
    names = names or [name for name in returned if name == "last_hidden_state"]
    if not names:
        raise InputError(f"{path} returns {', '.join(returned)}, neither logits nor a last_hidden_state.")
    return names


def _tokens(module: nn.Module, path: Path, names: list[str]) -> list[Example]:
    """Two batches of tokens, some padded; any tokens do, as only torch and its own export are compared."""
    words, longest = vocabulary_of(module), longest_sequence(path)
    examples = []
    for batch, length in ((2, min(12, longest)), (3, min(7, longest))):
        ids = (torch.arange(batch * length).reshape(batch, length) * 37 + 5) % words
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        every["decoder_input_ids"] = ids[:, 1:-1]  # of another length than the encoder's
        examples.append({name: every[name] for name in names})
    return examples


def _images(module: nn.Module, path: Path) -> list[Example]:
    channels = _of_vision(module, "num_channels") or 3
    height, width = _image_size(module, path)
    pattern = wave((3, channels, height, width))
    return [{"pixel_values": pattern[:2]}, {"pixel_values": pattern}]


def _of_vision(module: nn.Module, name: str) -> Any:
    """A setting of the part that sees, which may have a configuration of its own; None where there is none."""
    config: Any = module.config
    return getattr(config, name, None) or getattr(getattr(config, "vision_config", None), name, None)


def _image_size(module: nn.Module, path: Path) -> tuple[int, int]:
    """Height and width that the model is made for, else those that its preprocessor makes."""
    size = _of_vision(module, "image_size")
    preprocessor = path / "preprocessor_config.json"
    if size is None and preprocessor.is_file():
        settings = load_json(preprocessor)
        size = settings.get("crop_size") or settings.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    return (int(size),) * 2 if size else (_IMAGE_SIZE, _IMAGE_SIZE)
