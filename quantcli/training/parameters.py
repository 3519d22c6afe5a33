"""A model's parameters as they are written, trained and read back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from quantcli.core.tensors import QuantizedTensor


@dataclass
class Parameters:
    """By the names of tensors: quantized weights, and others (biases, norms) in float32."""

    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
