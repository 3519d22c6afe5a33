"""A whole model called as if it were one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.blocks.calls import Call, mapped, moved
from quantcli.blocks.capture import failing_on, main_output, without_cache
from quantcli.models import hugging_face


@dataclass
class ModelCall(Call):
    """One batch on its way through a whole model: ``args`` and ``kwargs`` are all of it, ``hidden`` its first input."""

    @classmethod
    def of(cls, model: nn.Module, batch: Mapping[str, Tensor]) -> ModelCall:
        """The call of a model for a batch of its inputs; it builds no cache."""
        args, kwargs = hugging_face.arguments(model, batch)
        return cls(next(iter(batch.values())), args, {**kwargs, **without_cache(model)})

    def run(self, block: Callable[..., Any]) -> Tensor:
        """The model's main output, float32. Raises InputError where the model fails, or its output is no tensor."""
        with failing_on(self.kwargs, "The model"):
            output = block(*self.args, **self.kwargs)
        return main_output(output)[0].float()

    def in_float32(self) -> ModelCall:
        """The same call: a model's inputs are float32, or integers."""
        return self

    def to(self, device: torch.device) -> ModelCall:
        """The same call with every tensor on a device."""
        move = partial(moved, device=device)
        return ModelCall(move(self.hidden), mapped(self.args, move), mapped(self.kwargs, move))
