"""A ``.pt2`` program as something torch can export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.export.source import Example, ExportSource, arrays, named, non_constant
from quantcli.models.program_file import load_program
from quantcli.models.runner import ProgramRunner


def program_source(path: Path, runner: ProgramRunner, samples: list[Example]) -> ExportSource:
    """A ``.pt2`` program, with samples, or its own example, as inputs."""
    program = load_program(path)
    names = [port.name for port in runner.inputs]
    if samples:
        example = samples[0]
    elif program.example_inputs is not None:
        arguments, keywords = program.example_inputs
        flat = torch.utils._pytree.tree_leaves((arguments, keywords))
        example = named(flat, names, str(path))
    else:
        raise InputError(f"{path} brings no example inputs to check its export with.", "Give --data.")
    example = {name: non_constant(value) for name, value in example.items()}
    free = {str(symbol): limits.upper for symbol, limits in program.range_constraints.items()}
    doubled = {port.name: _doubled(example[port.name], port.shape or (), free) for port in runner.inputs}
    grown = any(doubled[name].shape != example[name].shape for name in names)
    outputs = list(runner.run(arrays(example)))
    return ExportSource(
        str(path), program, lambda each: runner.run(arrays(each)), [example, doubled] if grown else [example], None,
        outputs,
    )  # fmt: skip


def _doubled(value: Tensor, shape: Sequence[int | str | None], upper: Mapping[str, Any]) -> Tensor:
    """The same values twice along every free axis that may be twice as long."""
    for axis, dim in enumerate(shape):
        if isinstance(dim, str) and dim in upper and 2 * value.shape[axis] <= upper[dim]:
            value = torch.cat([value, value], axis)
    return value
