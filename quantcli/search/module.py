"""A checkpoint's model in memory, some of whose weights are, for a moment, what codes of theirs would stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quantcli import algorithms
from quantcli.algorithms.base import by_rows
from quantcli.blocks.batches import completed
from quantcli.blocks.capture import main_output, without_cache
from quantcli.blocks.model import SequentialModel
from quantcli.checkpoint.roles import module_of
from quantcli.core.dtypes import torch_dtype
from quantcli.core.numerics import decoded
from quantcli.core.tensors import QuantizedTensor
from quantcli.data.samples import Samples
from quantcli.models import hugging_face
from quantcli.planning.plan import LayerPlan
from quantcli.ptq.rounding import without_data
from quantcli.system.devices import products
from quantcli.training.objective import divergence, relative_error

#: What is kept of the original's outputs, in bytes.
_KEPT_BYTES = 256 << 20


class SearchedModel:
    """The original in float32, and the samples that a search looks at."""

    def __init__(self, model: SequentialModel, samples: Samples) -> None:
        """Load the weights. Raises InputError where a sample cannot be read."""
        self.module, self._skeleton, self.ports = model.skeleton.module, model.skeleton, model.ports
        arrays = ({name: torch.from_numpy(each) for name, each in sample.inputs.items()} for sample in samples)
        self.samples = [completed(model, sample) for sample in arrays]
        self._skeleton.load("")
        parameters = self._skeleton.parameters()
        # A tied weight is a parameter of several modules.
        self._parameters: dict[str, list[str]] = {}
        for parameter, info in parameters.items():
            self._parameters.setdefault(info.name, []).append(parameter)

    @cached_property
    def measure(self) -> str:
        """What `distance` is: ``kl_nats`` for a model with logits, else ``relative_error`` of its first output."""
        with torch.no_grad():
            return "kl_nats" if self.output(self.samples[0])[1] else "relative_error"

    def output(self, sample: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        """What the model returns first, float32 ``[1, ...]``, and whether these are logits over classes."""
        args, kwargs = hugging_face.arguments(self.module, sample)
        with products(torch.device("cpu")):
            found, classes = main_output(self.module(*args, **{**kwargs, **without_cache(self.module)}))
        return found.float(), classes

    def linear(self, tensor: str) -> nn.Linear | None:
        """The linear layer that a tensor of the checkpoint is the weight of, if it is one's."""
        parameter = self._parameters.get(tensor, [""])[0]
        module = self.module.get_submodule(module_of(parameter)) if parameter.endswith(".weight") else None
        is_called = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
        return module if is_called else None  # type: ignore[return-value]

    def values(self, tensor: str) -> Tensor | None:
        """A tensor of the checkpoint as the model holds it, float32; None where the model holds no such one."""
        parameters = self._parameters.get(tensor)
        return None if parameters is None else self.module.get_parameter(parameters[0]).detach()

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Meanwhile these tensors of the checkpoint have other values, of the same shapes."""
        held = {parameter: each for name, each in values.items() for parameter in self._parameters.get(name, ())}
        before = {name: self.module.get_parameter(name).data for name in held}
        try:
            for name, each in held.items():
                self.module.get_parameter(name).data = each
            yield
        finally:
            for name, each in before.items():
                self.module.get_parameter(name).data = each

    @torch.no_grad()
    def distance(self, values: Mapping[str, Tensor]) -> float:
        """How far outputs move where tensors have these values, on average over samples whose outputs can be kept."""
        found = []
        for sample, (expected, classes) in zip(self.samples, self._expected, strict=False):
            with self.holding(values):
                got, _ = self.output(sample)
            found.append(float((divergence if classes else relative_error)(expected, got)))
        return sum(found) / len(found)

    @cached_property
    def _expected(self) -> list[tuple[Tensor, bool]]:
        """The original's outputs for the first samples, as many as there is room for."""
        kept = [self.output(self.samples[0])]
        most = max(1, _KEPT_BYTES // max(1, kept[0][0].nbytes))
        return kept + [self.output(sample) for sample in self.samples[1:most]]


def codes_of(values: Tensor, layer: LayerPlan, scale_dtype: str) -> QuantizedTensor:
    """A weight as codes, rounded without data."""
    assert layer.scheme is not None
    rounding = algorithms.rounding(without_data(layer, "").algorithm)
    return by_rows(rounding.run, layer.as_matrix(values), layer.scheme.weights, torch_dtype(scale_dtype))


def values_of(codes: QuantizedTensor, layer: LayerPlan) -> Tensor:
    """What codes stand for: float32 in the weight's own shape."""
    return layer.as_weight(decoded(codes))
