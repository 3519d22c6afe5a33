"""What torch's exporter needs of a model: a module, inputs of two shapes to trace and check it with, free axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from quantcli.errors import InputError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from quantcli.data.request import DataRequest

#: Inputs of one pass, by name, in the order of the module's parameters.
Example = dict[str, Tensor]

#: What a model is to be traced with: DATA, or samples as arrays by input name.
Data: TypeAlias = "DataRequest | Sequence[Mapping[str, np.ndarray]] | None"


@dataclass
class ExportSource:
    """A model ready to be traced.

    ``examples`` are two where shapes are free, the first being the one to trace. ``prefix`` stands in front of the
    names of a wrapped module. With ``may_be_fixed`` tracing can be tried again for fixed shapes. ``input_names`` are
    what the graph calls its inputs, where that is not what the module does.
    """

    name: str
    module: nn.Module | ExportedProgram
    run: Callable[[Example], dict[str, np.ndarray]]
    examples: list[Example]
    dynamic: Any
    output_names: list[str]
    prefix: str = ""
    input_names: list[str] | None = None
    may_be_fixed: bool = False
    plain: Example = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_program(self) -> bool:
        """Whether the model has been traced already, by torch.export."""
        return not isinstance(self.module, nn.Module)

    def fix_shapes(self) -> None:
        """Fall back to the example as it was given."""
        example = {name: non_constant(value) for name, value in self.plain.items()}
        self.examples, self.dynamic, self.may_be_fixed = [example], None, False


def named(example: Any, names: list[str], spec: str) -> Example:
    """A tensor, a sequence of them in order, or a mapping, by the module's parameter names."""
    if isinstance(example, Mapping):
        tensors = dict(example)
    else:
        tensors = dict(zip(names, [example] if isinstance(example, Tensor) else list(example), strict=False))
    if set(tensors) != set(names) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(
            f"The example inputs of {spec} are {', '.join(tensors) or 'empty'}; its module takes {', '.join(names)}.",
            "Give one tensor for each.",
        )
    return {name: tensors[name] for name in names}


def non_constant(value: Tensor) -> Tensor:
    """A float tensor of one value, such as torch.zeros, with a wave on it: else nothing would be compared."""
    if not value.is_floating_point() or value.numel() < 2 or bool((value != value.reshape(-1)[0]).any()):
        return value
    return value + wave(value.shape).to(value.dtype)


def wave(shape: Sequence[int]) -> Tensor:
    """Values in -1..1 without a pattern that a batch, a row or a channel would repeat."""
    return torch.sin(torch.arange(math.prod(shape)) * 0.37).reshape(*shape)


def arrays(example: Example) -> dict[str, np.ndarray]:
    """An example's tensors as arrays."""
    return {name: value.numpy() for name, value in example.items()}
