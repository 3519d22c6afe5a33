"""What torch's exporter needs of a model: a module, inputs of two shapes to trace and check it with, free axes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quantcli import models, runners
from quantcli.checkpoints.folder import load_json
from quantcli.errors import InputError
from quantcli.functions import is_function, load_function
from quantcli.graph.model import Port
from quantcli.samples import load_samples

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: Inputs of one pass, by name, in the order of the module's parameters.
Example = dict[str, Tensor]

#: What a model is to be traced with: DATA, or samples as arrays by input name.
Data = str | Sequence[Mapping[str, np.ndarray]] | None

#: Samples of DATA that are looked at.
_SAMPLES = 8

#: Classes whose head is what the model is for; others are exported without one.
_HEADED = ("ForSequenceClassification", "ForImageClassification", "ForTokenClassification", "ForQuestionAnswering")

_IMAGE_SIZE = 224


@dataclass
class Source:
    """A model ready to be traced.

    ``examples`` are two where shapes are free, the first being the one to trace. ``prefix`` stands in front of the
    names of a wrapped module. With ``may_be_fixed`` tracing can be tried again for fixed shapes.
    """

    name: str
    module: nn.Module | ExportedProgram
    run: Callable[[Example], dict[str, np.ndarray]]
    examples: list[Example]
    dynamic: Any
    output_names: list[str]
    prefix: str = ""
    may_be_fixed: bool = False
    plain: Example = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_program(self) -> bool:
        """Whether the model has been traced already, by torch.export."""
        return not isinstance(self.module, nn.Module)

    def fix_shapes(self) -> None:
        """Fall back to the example as it was given."""
        lively = {name: _lively(value) for name, value in self.plain.items()}
        self.examples, self.dynamic, self.may_be_fixed = [lively], None, False


def read_source(model: str | Path, data: Data, preprocess: Path | None, weights: Path | None) -> Source:
    """Load a torch model of any kind. Arguments and errors are those of `quantcli.export.export_to_onnx`."""
    if not is_function(str(model)) and Path(model).suffix != ".pt2":
        return _hugging_face(Path(model))
    if is_function(str(model)):
        runner = runners.open_runner(str(model), weights=weights)
        assert isinstance(runner, runners.TorchRunner)
        return _function(str(model), runner, _samples(data, preprocess, runner.inputs, str(model)))
    program = runners.ProgramRunner(Path(model))
    return _program(Path(model), program, _samples(data, preprocess, program.inputs, str(model)))


def _samples(data: Data, preprocess: Path | None, inputs: Sequence[Port], name: str) -> list[Example]:
    """A few samples as a model takes them."""
    if isinstance(data, str):
        found = load_samples(data, inputs, folder=None, preprocess=preprocess, samples=_SAMPLES)
        data = [sample.inputs for sample in found]
    feeds = [runners.fit(sample, inputs, name) for sample in data or ()]
    return [{key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in each.items()} for each in feeds]


class _Outputs(nn.Module):
    """A Hugging Face model that takes and returns only what these names say."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str], options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model

        def forward(**given: Tensor) -> tuple[Tensor, ...]:
            found = model(**given, **options)
            return tuple(found[name] for name in outputs)

        # torch.export matches free axes with the parameters' names, and confuses those of a plain **given.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])  # type: ignore[attr-defined]
        self.forward = forward


def _hugging_face(path: Path) -> Source:
    config = load_json(models.require_folder(path) / "config.json")
    headed = any(str(name).endswith(_HEADED) for name in config.get("architectures") or [])
    runner = runners.open_runner(path, headed=headed, decoded=True)
    assert isinstance(runner, runners.TorchRunner)
    module = runner.module
    if hasattr(module, "set_attn_implementation"):
        # Plain products and a Softmax: fewer nodes, and what runtimes know how to fuse.
        module.set_attn_implementation("eager")  # type: ignore[operator]
    names = [port.name for port in runner.inputs]
    examples = _images(module, path) if names == ["pixel_values"] else _tokens(module, path, names)
    options = {"return_dict": True} | ({"use_cache": False} if models.is_causal(path) else {})
    outputs = _output_names(module, examples[0], options, path)
    axes = {0: "batch"} if names == ["pixel_values"] else {0: "batch", 1: "sequence"}
    wrapped = _Outputs(module, names, outputs, options).eval()

    def run(example: Example) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in zip(outputs, wrapped(**example), strict=True)}

    dynamic = dict.fromkeys(names, axes)
    return Source(str(path), wrapped, run, examples, dynamic, outputs, prefix="model.")


def _output_names(module: nn.Module, example: Example, options: dict[str, Any], path: Path) -> list[str]:
    with torch.inference_mode():
        found = module(**example, **options)
    names = [name for name in found if name == "logits" or name.endswith("_logits")]
    names = names or [name for name in found if name == "last_hidden_state"]
    if not names:
        raise InputError(f"{path} returns {', '.join(found)}, neither logits nor a last_hidden_state.")
    return names


def _tokens(module: nn.Module, path: Path, names: list[str]) -> list[Example]:
    """Two batches of tokens, some padded; any tokens do, as only torch and its own export are compared."""
    embeddings: Any = module.get_input_embeddings()  # type: ignore[operator]
    words, longest = embeddings.num_embeddings, models.longest_sequence(path)
    examples = []
    for batch, length in ((2, min(12, longest)), (3, min(7, longest))):
        ids = (torch.arange(batch * length).reshape(batch, length) * 37 + 5) % words
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        examples.append({name: every[name] for name in names})
    return examples


def _images(module: nn.Module, path: Path) -> list[Example]:
    channels = getattr(module.config, "num_channels", 3)
    height, width = _image_size(module, path)
    pattern = _wave((3, channels, height, width))
    return [{"pixel_values": pattern[:2]}, {"pixel_values": pattern}]


def _image_size(module: nn.Module, path: Path) -> tuple[int, int]:
    """Height and width that the model is made for, else those that its preprocessor makes."""
    size = getattr(module.config, "image_size", None)
    preprocessor = path / "preprocessor_config.json"
    if size is None and preprocessor.is_file():
        found = load_json(preprocessor)
        size = found.get("crop_size") or found.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    return (int(size),) * 2 if size else (_IMAGE_SIZE, _IMAGE_SIZE)


def _function(spec: str, runner: runners.TorchRunner, samples: list[Example]) -> Source:
    if not samples:
        names = [port.name for port in runner.inputs]
        samples = [_named(_own_example(spec, runner.module), names, spec)]
    examples, dynamic = _varied(samples)
    outputs = list(runner.run(_arrays(samples[0])))
    return Source(
        spec, runner.module, lambda example: runner.run(_arrays(example)), examples, dynamic, outputs,
        may_be_fixed=True, plain=samples[0],
    )  # fmt: skip


def _own_example(spec: str, module: nn.Module) -> Any:
    for owner, name in ((load_function(spec), "example_inputs"), (module, "example_input_array")):
        found = getattr(owner, name, None)
        if found is not None:
            return found() if callable(found) else found
    raise InputError(
        f"Nothing tells what inputs {spec} is to be traced with.",
        "Give --data, or set the function's attribute example_inputs, for example "
        "function.example_inputs = (torch.zeros(1, 3, 224, 224),).",
    )


def _named(example: Any, names: list[str], spec: str) -> Example:
    """A tensor, a sequence of them in order, or a mapping, by the module's parameter names."""
    if isinstance(example, Mapping):
        found = dict(example)
    else:
        found = dict(zip(names, [example] if isinstance(example, Tensor) else list(example), strict=False))
    if set(found) != set(names) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(
            f"The example inputs of {spec} are {', '.join(found) or 'empty'}; its module takes {', '.join(names)}.",
            "Give one tensor for each.",
        )
    return {name: found[name] for name in names}


def _varied(samples: list[Example]) -> tuple[list[Example], dict[str, dict[int, str]]]:
    """Batches of two shapes, and the axes that are free: the batch, and those along which samples differ.

    The batch is the first axis of every input that is as long there as the first input is.
    """
    first, *others = samples
    batch = next(iter(first.values())).shape[:1]
    batched = {name for name, value in first.items() if value.dim() and value.shape[:1] == batch}
    dynamic: dict[str, dict[int, str]] = {name: {0: "batch"} if name in batched else {} for name in first}
    second = first
    for other in others:
        for name, value in other.items():
            for axis, (a, b) in enumerate(zip(first[name].shape, value.shape, strict=True)):
                if a != b and not (axis == 0 and name in batched):
                    dynamic[name][axis], second = f"{name}_{axis}", other

    def repeated(example: Example, times: int) -> Example:
        return {name: torch.cat([value] * times) if name in batched else value for name, value in example.items()}

    examples = [repeated(first, 2), repeated(second, 3)]
    return [{name: _lively(value) for name, value in example.items()} for example in examples], dynamic


def _lively(value: Tensor) -> Tensor:
    """A float tensor of one value, such as torch.zeros, with a wave on it: else nothing would be compared."""
    if not value.is_floating_point() or value.numel() < 2 or bool((value != value.reshape(-1)[0]).any()):
        return value
    return value + _wave(value.shape).to(value.dtype)


def _wave(shape: Sequence[int]) -> Tensor:
    """Values in -1..1 without a pattern that a batch, a row or a channel would repeat."""
    return torch.sin(torch.arange(math.prod(shape)) * 0.37).reshape(*shape)


def _program(path: Path, runner: runners.ProgramRunner, samples: list[Example]) -> Source:
    program = torch.export.load(path)
    names = [port.name for port in runner.inputs]
    if samples:
        example = samples[0]
    elif program.example_inputs is not None:
        arguments, keywords = program.example_inputs
        flat = torch.utils._pytree.tree_leaves((arguments, keywords))
        example = _named(flat, names, str(path))
    else:
        raise InputError(f"{path} brings no example inputs to check its export with.", "Give --data.")
    example = {name: _lively(value) for name, value in example.items()}
    free = {str(symbol): limits.upper for symbol, limits in program.range_constraints.items()}
    doubled = {port.name: _doubled(example[port.name], port.shape or (), free) for port in runner.inputs}
    grown = any(doubled[name].shape != example[name].shape for name in names)
    outputs = list(runner.run(_arrays(example)))
    return Source(
        str(path), program, lambda each: runner.run(_arrays(each)), [example, doubled] if grown else [example], None,
        outputs,
    )  # fmt: skip


def _doubled(value: Tensor, shape: Sequence[int | str | None], upper: Mapping[str, Any]) -> Tensor:
    """The same values twice along every free axis that may be twice as long."""
    for axis, dim in enumerate(shape):
        if isinstance(dim, str) and dim in upper and 2 * value.shape[axis] <= upper[dim]:
            value = torch.cat([value, value], axis)
    return value


def _arrays(example: Example) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in example.items()}
