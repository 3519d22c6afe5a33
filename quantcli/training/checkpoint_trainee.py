"""A checkpoint's quantized model in training: weights, scales, ranges of inputs, norms and biases learn together.

In memory are some twenty-five bytes per quantized weight: the weight, its gradient, two moments of the optimizer, the
best state so far, and the original model. Layers outside the blocks are as they will be stored, and stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from quantcli.algorithms.fake_quantize import LearnedRange, LearnedValues, LearnedWeight, dynamic_range
from quantcli.algorithms.qat import Options as QatOptions
from quantcli.blocks.capture import main_output, replaced_forward, without_cache
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import BlockList
from quantcli.core.dtypes import torch_dtype
from quantcli.core.numerics import decoded
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor
from quantcli.errors import InputError
from quantcli.models import hugging_face
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.ptq.rounding import round_unobserved
from quantcli.system.devices import products
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.text import format_bytes
from quantcli.training.parameters import Parameters

#: Bytes in memory for each quantized weight, and for every other one: of the trained model and of the original.
_BYTES_LEARNED, _BYTES_KEPT = 25, 8
#: What the one output of a model without logits is called.
_OUTPUT = "output"


class _FrozenLinear:
    """A linear layer that stays as it is, and whose inputs are rounded."""

    def __init__(self, inputs: Callable[[Tensor], Tensor], module: nn.Module) -> None:
        self.inputs, self._module = inputs, module

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layer's output for ``[..., columns]``."""
        parameters = self._module._parameters
        weight = parameters["weight"]
        assert weight is not None
        return torch.nn.functional.linear(self.inputs(inputs), weight, parameters.get("bias"))


class _LearnedLinear:
    """A linear layer whose weight, and whose inputs' range, are learned."""

    def __init__(self, weight: LearnedWeight, inputs: Callable[[Tensor], Tensor] | None, module: nn.Module) -> None:
        self.weight, self.inputs, self._module = weight, inputs, module

    @property
    def input_range(self) -> LearnedRange | None:
        """The range of its inputs, where it is learned."""
        return self.inputs if isinstance(self.inputs, LearnedRange) else None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layer's output for ``[..., columns]``."""
        values = inputs if self.inputs is None else self.inputs(inputs)
        bias = self._module._parameters.get("bias")
        return torch.nn.functional.linear(values, self.weight.values(), bias)


def _move(module: nn.Module, device: torch.device) -> None:
    """Move what has memory; weights that are learned have none in their modules."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, values in part._buffers.items():
            part._buffers[name] = None if values is None else values.to(device)


class CheckpointTrainee:
    """The trainee that `quantcli.training.loop` trains."""

    def __init__(
        self,
        skeleton: Skeleton,
        original: Skeleton,
        plan: Plan,
        blocks: Sequence[BlockList],
        written: Parameters,
        device: torch.device,
        options: QatOptions,
    ) -> None:
        """Put both models together.

        Args:
            skeleton: what is trained; its weights are loaded here.
            original: the same model again, which it learns from.
            plan: dtypes of everything.
            blocks: the model's blocks.
            written: the blocks' parameters, quantized.
            device: where it is trained.
            options: whether norms and biases learn, too, and whether products take bfloat16 where that is faster.

        Raises:
            InputError: there is too little memory, or no layer that could learn.
        """
        self.skeleton, self.original, self.plan, self.device = skeleton, original, plan, device
        self._options = options
        self._layers = {layer.info.name: layer for layer in plan.layers}
        self._linears: dict[str, _LearnedLinear] = {}
        self._frozen: dict[str, _FrozenLinear] = {}
        self._values: dict[str, LearnedValues] = {}
        self._require_memory(written.quantized)
        inside_blocks = tuple(f"{path}." for block_list in blocks for path in block_list.blocks)
        skeleton.load_buffers()
        for name in skeleton.parameters():
            if name.startswith(inside_blocks):
                self._load(name, written)
            else:
                skeleton.set(name, self._as_stored(name))
                self._round_inputs(name)
        if not self._linears:
            raise InputError("No linear layer of the blocks is quantized, so that qat has nothing to train.")
        original.load("")
        for module in (skeleton.module, original.module):
            _move(module, device)

    def _require_memory(self, quantized: Mapping[str, QuantizedTensor]) -> None:
        learned = sum(tensor.codes.numel() for tensor in quantized.values())
        others = sum(layer.info.numel for layer in self.plan.layers) - learned
        needed, free = _BYTES_LEARNED * learned + _BYTES_KEPT * others, free_memory_bytes()
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        if needed > free:
            raise InputError(
                f"Training needs {format_bytes(needed)} of memory for the model and what it learns by, and "
                f"{format_bytes(free)} are free.",
                hint="Use tune in place of qat, which needs a byte per weight, or gptq alone.",
            )

    def _load(self, name: str, written: Parameters) -> None:
        """A parameter of a block: one that learns, or as it was written."""
        owner, _, leaf = name.rpartition(".")
        info, module = self.skeleton.info(name), self.skeleton.module.get_submodule(owner)
        layer, quantized = self._layers[info.name], written.quantized.get(info.name)
        if quantized is None:
            values = written.plain[info.name]
            self.skeleton.set(name, values)
            if self._options.norms and (layer.role == "norm" or leaf == "bias"):
                start = values.to(self.device)
                self._values[name] = LearnedValues(start, torch_dtype(layer.dtype), factors=leaf != "bias")
        elif leaf == "weight" and isinstance(module, nn.Linear):
            weight = LearnedWeight(quantized, torch_dtype(self.plan.scale_dtype), device=self.device)
            self._linears[owner] = _LearnedLinear(weight, self._inputs(layer, quantized.input_scale), module)
        else:
            self.skeleton.set(name, layer.as_weight(decoded(quantized)))

    def _inputs(self, layer: LayerPlan, scale: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """How a layer's inputs are rounded: in ranges found at inference, or in one of this scale, which is learned."""
        number_format = layer.scheme.inputs if layer.scheme else None
        if number_format is None:
            return None
        if number_format.dynamic:
            return partial(dynamic_range, number_format=number_format)
        assert scale is not None
        fixed = NumberFormat(number_format.dtype, symmetric=number_format.symmetric)
        return LearnedRange(scale.to(self.device), None, fixed, torch_dtype(self.plan.scale_dtype))

    def _as_stored(self, name: str) -> Tensor:
        """A parameter outside the blocks with the precision it will have."""
        info = self.skeleton.info(name)
        values = self.skeleton.checkpoint.read_rows(info, 0, info.rows).reshape(info.shape)
        layer = self._layers[info.name]
        if layer.has_codes:
            return layer.as_weight(decoded(round_unobserved(values.float(), layer, self.plan).tensor))
        return values.to(torch_dtype(layer.dtype)).float()

    def _round_inputs(self, name: str) -> None:
        """Round the inputs of a layer outside the blocks, in the ranges that are found at inference."""
        owner, _, leaf = name.rpartition(".")
        module, layer = self.skeleton.module.get_submodule(owner), self._layers[self.skeleton.info(name).name]
        number_format = layer.scheme.inputs if layer.scheme else None
        if number_format is not None and leaf == "weight" and isinstance(module, nn.Linear):
            self._frozen[owner] = _FrozenLinear(partial(dynamic_range, number_format=number_format), module)

    def weights(self) -> list[Tensor]:
        """Weights, in steps of their grids."""
        return [linear.weight.units for linear in self._linears.values()]

    def factors(self) -> list[Tensor]:
        """Factors of the scales of weights and inputs."""
        linears = self._linears.values()
        scales = [linear.weight.scales.factor for linear in linears]
        return scales + [linear.input_range.scale.factor for linear in linears if linear.input_range]

    def values(self) -> list[Tensor]:
        """Changes of norms and biases."""
        return [learned.change for learned in self._values.values()]

    def student(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The quantized model's output."""
        parameters = {name: learned.values() for name, learned in self._values.items()}
        layers: dict[str, _LearnedLinear | _FrozenLinear] = {**self._linears, **self._frozen}
        with ExitStack() as stack:
            for owner, linear in layers.items():
                stack.enter_context(replaced_forward(self.skeleton.module.get_submodule(owner), linear))
            return self._call(self.skeleton.module, parameters, inputs)

    def teacher(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The original model's output."""
        return self._call(self.original.module, {}, inputs)

    def _call(
        self, module: nn.Module, parameters: dict[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        with ExitStack() as stack:
            if self._options.mixed_precision:
                stack.enter_context(products(self.device))
            args, kwargs = hugging_face.arguments(module, inputs)
            outputs = torch.func.functional_call(module, parameters, args, {**kwargs, **without_cache(module)})
        output, classes = main_output(outputs)
        return {"logits" if classes else _OUTPUT: output.float()}

    @torch.no_grad()
    def result(self) -> Parameters:
        """What was learned."""
        trained = Parameters()
        for owner, linear in self._linears.items():
            tensor = linear.weight.tensor()
            if linear.input_range:
                tensor = replace(tensor, input_scale=linear.input_range.values().reshape(()).cpu())
            trained.quantized[self.skeleton.info(f"{owner}.weight").name] = tensor
        for name, values in self._values.items():
            trained.plain[self.skeleton.info(name).name] = values.values().cpu()
        return trained
