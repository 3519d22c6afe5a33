"""The whole model once its blocks are quantized: scales and norms learned from what the original model returns.

In memory are a byte per quantized weight, all other weights in float32, and what one sample leaves in every layer for
its gradient. The original model is not run again: its last hidden states are those that its blocks returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.algorithms.fake_quantize import LearnedFactors
from quantcli.algorithms.tune import Options as TuneOptions
from quantcli.algorithms.tune import TunedLinear
from quantcli.blocks.capture import main_output, replaced_forward, without_cache
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import BlockList
from quantcli.core.dtypes import torch_dtype
from quantcli.errors import InputError
from quantcli.models import hugging_face
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.ptq.engine import Chain
from quantcli.ptq.input_quantization import quantized_inputs
from quantcli.system.devices import products
from quantcli.training import objective
from quantcli.training.optimization import clamp_factors, rate_share
from quantcli.training.parameters import Parameters


def learn_factors(
    learned: Sequence[LearnedFactors],
    loss: Callable[[int], Tensor],
    steps_per_epoch: int,
    options: TuneOptions,
    seed: int,
    tick: Callable[[float], None],
) -> list[float]:
    """Learn factors with Adam and return the loss of every step.

    Args:
        learned: what is learned.
        loss: of one step of an epoch, by its number; it depends on ``learned``.
        steps_per_epoch: how many there are.
        options: epochs, and the learning rate of factors, which start from one.
        seed: the order of the steps is drawn by it.
        tick: called with the fraction that is done.

    Raises:
        InputError: a loss is not finite.
    """
    # Not the loop of `training.loop`, which holds samples out and asks the original model for any of them together.
    # Here all data is learned from, the original is in memory no more, and what its blocks returned is kept by the
    # batches of calibration: a step is of rows of one of them.
    factors = [values.factor for values in learned]
    optimizer = torch.optim.Adam(factors, lr=options.learning_rate, betas=(0.9, 0.99))
    total = options.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, total))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(options.epochs):
        for number in torch.randperm(steps_per_epoch, generator=generator).tolist():
            with torch.enable_grad():
                step_loss = loss(number)
                losses.append(step_loss.item())
                if not isfinite(losses[-1]):
                    raise InputError(
                        f"tune: the loss became {losses[-1]} in step {len(losses)} of {total}.",
                        hint="Lower its learning_rate in the recipe.",
                    )
                optimizer.zero_grad(set_to_none=True)
                step_loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            clamp_factors(factors)
            tick(len(losses) / total)
    return losses


class ModelTuning:
    """A quantized model whose scales and norms are learned."""

    def __init__(
        self, skeleton: Skeleton, plan: Plan, blocks: Sequence[BlockList], written: Parameters, options: TuneOptions
    ) -> None:
        """Put the model together.

        Args:
            skeleton: the model; its weights are loaded here.
            plan: dtypes of everything.
            blocks: the model's blocks, one list of them.
            written: the blocks' parameters, quantized.
            options: what is learned, how long and how fast.

        Raises:
            InputError: the model has more than one list of blocks.
        """
        if len(blocks) != 1:
            paths = ", ".join(block_list.path for block_list in blocks)
            raise InputError(
                f"tune is for models with one list of blocks; this one has {len(blocks)}: {paths}.",
                hint="Leave tune out of the recipe's steps.",
            )
        self.skeleton, self.plan, self.options = skeleton, plan, options
        self._modules = [skeleton.module.get_submodule(path) for path in blocks[0].blocks]
        self._scale_dtype = torch_dtype(plan.scale_dtype)
        self._layers = {layer.info.name: layer for layer in plan.layers}
        self._linears: dict[str, TunedLinear] = {}
        self._norms: dict[str, LearnedFactors] = {}
        self._quantized = written.quantized
        self._load(blocks[0], written)

    def _load(self, blocks: BlockList, written: Parameters) -> None:
        inside_blocks = tuple(f"{path}." for path in blocks.blocks)
        self.skeleton.load_buffers()
        for name, info in self.skeleton.parameters().items():
            owner, _, leaf = name.rpartition(".")
            if info.name in written.quantized:
                module = self.skeleton.module.get_submodule(owner)
                if leaf == "weight" and isinstance(module, nn.Linear):
                    self._linears[owner] = TunedLinear(written.quantized[info.name], self._scale_dtype, None)
            elif name.startswith(inside_blocks):
                values, layer = written.plain[info.name], self._layers[info.name]
                self.skeleton.set(name, values)
                if self.options.norms and layer.role == "norm":
                    self._norms[name] = LearnedFactors(values, torch_dtype(layer.dtype), scales=False)
            else:
                self.skeleton.set(name, self._as_stored(name))
        for owner, linear in self._linears.items():
            bias = self.skeleton.module.get_submodule(owner)._parameters.get("bias")
            linear.bias = None if bias is None else bias.detach()

    def _as_stored(self, name: str) -> Tensor:
        """A parameter outside the blocks with the precision it will have."""
        info = self.skeleton.info(name)
        values = self.skeleton.checkpoint.read_rows(info, 0, info.rows).reshape(info.shape)
        layer = self._layers[info.name]
        return values if layer.has_codes else values.to(torch_dtype(layer.dtype)).float()

    def run(
        self, batches: Sequence[Mapping[str, Tensor]], teacher: Chain, seed: int, tick: Callable[[float], None]
    ) -> dict[str, Tensor]:
        """Learn; returns scales of quantized weights, and norms, by the names of tensors.

        Args:
            batches: calibration inputs by name, the first axis samples.
            teacher: what the original blocks returned for each batch.
            seed: the order of the samples is drawn by it.
            tick: called with the fraction that is done.

        Raises:
            InputError: a loss is not finite.
        """
        size = self.options.batch_size
        places = [
            (number, slice(start, min(start + size, count)))
            for number, count in enumerate(len(next(iter(batch.values()))) for batch in batches)
            for start in range(0, count, size)
        ]

        def loss(step: int) -> Tensor:
            number, rows = places[step]
            inputs = {name: values[rows] for name, values in batches[number].items()}
            with torch.no_grad(), teacher.replaying(self._modules, number, rows):
                original, classes = main_output(self._call(inputs, {}))
            return self._loss(inputs, original, classes)

        with self._trained():
            scales = [linear.scales for linear in self._linears.values()]
            learn_factors([*scales, *self._norms.values()], loss, len(places), self.options, seed, tick)
        return self._result()

    def _loss(self, inputs: Mapping[str, Tensor], teacher: Tensor, classes: bool) -> Tensor:
        norms = {name: norm.values() for name, norm in self._norms.items()}
        student, _ = main_output(self._call(inputs, norms))
        teacher, student = objective.without_padding(teacher, student, inputs)
        return objective.divergence(teacher, student) if classes else objective.relative_error(teacher, student)

    def _call(self, inputs: Mapping[str, Tensor], parameters: dict[str, Tensor]) -> Any:
        module = self.skeleton.module
        with products(torch.device("cpu")):
            args, kwargs = hugging_face.arguments(module, inputs)
            return torch.func.functional_call(module, parameters, args, {**kwargs, **without_cache(module)})

    @contextmanager
    def _trained(self) -> Iterator[None]:
        """Meanwhile linear layers compute from codes and learned scales, and quantize their inputs where planned."""
        with ExitStack() as stack:
            for owner, linear in self._linears.items():
                stack.enter_context(replaced_forward(self.skeleton.module.get_submodule(owner), linear))
            layers = {owner: self._planned(owner) for owner in self._linears}
            stack.enter_context(quantized_inputs(self.skeleton.module, layers, self._quantized))
            yield

    def _planned(self, owner: str) -> LayerPlan:
        return self._layers[self.skeleton.info(f"{owner}.weight").name]

    @torch.no_grad()
    def _result(self) -> dict[str, Tensor]:
        scales = {f"{owner}.weight": linear.scales for owner, linear in self._linears.items()}
        return {self.skeleton.info(name).name: learned.values() for name, learned in (scales | self._norms).items()}
