"""What is known beside the graph itself when the codes of its weights are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from quantcli.core.tensors import Hessian, QuantizedTensor, Rounding
from quantcli.onnx.plan.plan import NodePlan

if TYPE_CHECKING:
    import onnx_ir as ir


class Statistics(Protocol):
    """What calibration knows of activations, as far as quantization asks."""

    def range(self, name: str) -> tuple[float, float]:
        """Lowest and highest value to be represented."""

    def sqnr_db(self, name: str, low: float, high: float, levels: int = 256) -> float | None:
        """Signal to quantization noise of a tensor on a grid over a range."""

    def channel_levels(self, name: str, low: float, high: float) -> float | None:
        """How many of 256 levels over a range the median channel spans."""

    def channel_mean(self, name: str) -> np.ndarray | None:
        """Mean of each channel."""


class Hessians(Protocol):
    """What calibration knows of the inputs of layers, as far as gptq asks."""

    def of(self, node: NodePlan) -> Hessian:
        """The Hessian of a layer, read when it is asked for."""

    def problem(self, node: NodePlan) -> str | None:
        """Why a layer's inputs tell nothing, or None."""


class Codes(Protocol):
    """Codes that exist already."""

    def of(self, node: NodePlan) -> QuantizedTensor:
        """Those of a node's weight, in the groups of its scheme."""


@dataclass(frozen=True)
class Made:
    """Codes and scales of a weight by their part, how they came about, and how many channels were narrowed."""

    tensors: Mapping[str, np.ndarray | ir.TensorProtocol]
    rounding: Rounding
    narrowed: int = 0

    def array(self, part: str) -> np.ndarray:
        """The values of one of the tensors."""
        tensor = self.tensors[part]
        return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()


class Journal(Protocol):
    """What was made of weights, by this conversion or by the one that was interrupted and is continued."""

    def of(self, key: str, make: Callable[[], Made]) -> Made:
        """What is noted under a key, which is made and noted where it is not; weights are asked for in equal order."""


@dataclass(frozen=True)
class Evidence:
    """What layers are quantized by.

    - ``statistics``: needed where a layer's inputs have fixed ranges; elsewhere biases profit from them.
    - ``hessians``: needed where a layer is quantized by gptq.
    - ``codes``: those of n-bit layers, where they are not to be chosen.
    - ``journal``: where that which is made of weights alone is noted, if anywhere.
    """

    statistics: Statistics | None = None
    hessians: Hessians | None = None
    codes: Codes | None = None
    journal: Journal | None = None

    def hessian(self, layer: NodePlan) -> Hessian | None:
        """The Hessian of a layer that gptq quantizes, else None."""
        if layer.input is None:
            return None
        assert self.hessians is not None
        return self.hessians.of(layer)

    def input_mean(self, layer: NodePlan) -> np.ndarray | None:
        """Means of a layer's input channels, where its bias can be corrected by them and calibration knows them."""
        if self.statistics is None or layer.node.op_type not in ("Conv", "Gemm") or layer.data is None:
            return None
        return self.statistics.channel_mean(layer.data)
