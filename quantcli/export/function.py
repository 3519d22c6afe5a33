"""A function's module as something torch can export."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantcli.errors import InputError
from quantcli.export.source import Example, ExportSource, arrays, named, non_constant
from quantcli.models.runner import TorchRunner
from quantcli.system.user_functions import load_function


def function_source(spec: str, runner: TorchRunner, samples: list[Example]) -> ExportSource:
    """The module that a function returns, with samples, or its own example, as inputs."""
    if not samples:
        names = [port.name for port in runner.inputs]
        samples = [named(_own_example(spec, runner.module), names, spec)]
    examples, dynamic = _varied(samples)
    outputs = list(runner.run(arrays(samples[0])))
    return ExportSource(
        spec, runner.module, lambda example: runner.run(arrays(example)), examples, dynamic, outputs,
        may_be_fixed=True, plain=samples[0],
    )  # fmt: skip


def _own_example(spec: str, module: nn.Module) -> Any:
    for owner, name in ((load_function(spec), "example_inputs"), (module, "example_input_array")):
        example = getattr(owner, name, None)
        if example is not None:
            return example() if callable(example) else example
    raise InputError(
        f"Nothing tells what inputs {spec} is to be traced with.",
        "Set the function's attribute example_inputs, such as function.example_inputs = "
        "(torch.zeros(1, 3, 224, 224),), or give --data to a command that takes it.",
    )


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
    return [{name: non_constant(value) for name, value in example.items()} for example in examples], dynamic
