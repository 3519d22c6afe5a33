"""The whole model once its blocks are quantized: scales and norms learned from what the original model returns.

In memory are a byte per quantized weight, all other weights in float32, and what one sample leaves in every layer for
its gradient. The original model is not run again: its last hidden states are those that its blocks returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantcli.algorithms.fake_quantize import Factors
from quantcli.algorithms.tune import Options as TuneOptions
from quantcli.algorithms.tune import TunedLinear
from quantcli.blocks.capture import main_output, replaced_forward, without_cache
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import BlockList
from quantcli.core.dtypes import torch_dtype
from quantcli.core.tensors import QuantizedTensor
from quantcli.errors import InputError
from quantcli.models import hugging_face
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.ptq.engine import Chain
from quantcli.ptq.input_quantization import quantized_inputs
from quantcli.system.devices import products
from quantcli.training import objective
from quantcli.training.optimization import clamp_factors, rate_share


class Options(Protocol):
    """How long and how fast is learned; the rate is that of factors, which start from one."""

    epochs: int
    learning_rate: float


def run(
    learned: Sequence[Factors],
    loss: Callable[[int], Tensor],
    samples: int,
    options: Options,
    seed: int,
    report: Callable[[float], None],
) -> list[float]:
    """Learn factors with Adam, one sample a step, and return the loss of every step.

    Args:
        learned: what is learned.
        loss: of one sample, by its number; it depends on ``learned``.
        samples: how many there are.
        options: epochs and learning rate.
        seed: the order of the samples is drawn by it.
        report: told the fraction that is done.

    Raises:
        InputError: a loss is not finite.
    """
    factors = [each.factor for each in learned]
    optimizer = torch.optim.Adam(factors, lr=options.learning_rate, betas=(0.9, 0.99))
    total = options.epochs * samples
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, total))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(options.epochs):
        for sample in torch.randperm(samples, generator=generator).tolist():
            with torch.enable_grad():
                found = loss(sample)
                if not bool(torch.isfinite(found)):
                    raise InputError(
                        f"tune: the loss became {found.item()} in step {len(losses) + 1} of {total}.",
                        hint="Lower its learning_rate in the recipe.",
                    )
                optimizer.zero_grad(set_to_none=True)
                found.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for factor in factors:
                    clamp_factors(factor)
            losses.append(found.item())
            report(len(losses) / total)
    return losses


@dataclass
class Tuned:
    """What was learned, by the names of tensors: scales of quantized weights, and norms."""

    scales: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sample:
    """Some samples of a batch: its number, and their rows in it."""

    batch: int
    rows: slice


class ModelTuning:
    """A quantized model in training."""

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        blocks: Sequence[BlockList],
        coded: Mapping[str, QuantizedTensor],
        plain: Mapping[str, Tensor],
        options: TuneOptions,
    ) -> None:
        """Put the model together.

        Args:
            skeleton: the model; its weights are loaded here.
            plan: dtypes of everything.
            blocks: the model's blocks, one list of them.
            coded: the blocks' quantized weights by the names of their tensors.
            plain: the blocks' other parameters, float32.
            options: what is learned, how long and how fast.

        Raises:
            InputError: the model has more than one list of blocks, or no quantized linear layer.
        """
        if len(blocks) != 1:
            found = ", ".join(each.path for each in blocks)
            raise InputError(
                f"tune is for models with one list of blocks; this one has {len(blocks)}: {found}.",
                hint="Leave tune out of the recipe's steps.",
            )
        self.skeleton, self.plan, self.options = skeleton, plan, options
        self._modules = [skeleton.module.get_submodule(path) for path in blocks[0].blocks]
        self._scale_dtype = torch_dtype(plan.scale_dtype)
        self._layers = {layer.info.name: layer for layer in plan.layers}
        self._linears: dict[str, TunedLinear] = {}
        self._norms: dict[str, Factors] = {}
        self._load(blocks[0], coded, plain)
        self._tensors = coded

    def _load(self, blocks: BlockList, coded: Mapping[str, QuantizedTensor], plain: Mapping[str, Tensor]) -> None:
        self.skeleton.load_buffers()
        for name, info in self.skeleton.parameters().items():
            owner, _, leaf = name.rpartition(".")
            inside = any(name.startswith(f"{path}.") for path in blocks.blocks)
            if info.name in coded:
                module = self.skeleton.module.get_submodule(owner)
                if leaf == "weight" and isinstance(module, nn.Linear):
                    self._linears[owner] = TunedLinear(coded[info.name], self._scale_dtype, None)
            elif inside:
                self.skeleton.set(name, plain[info.name])
                if self.options.norms and self._layers[info.name].role == "norm":
                    dtype = torch_dtype(self._layers[info.name].dtype)
                    self._norms[name] = Factors(plain[info.name], dtype, scales=False)
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
        self,
        batches: Sequence[Mapping[str, Tensor]],
        teacher: Chain,
        seed: int,
        report: Callable[[float], None],
    ) -> Tuned:
        """Learn.

        Args:
            batches: calibration inputs by name, the first axis samples.
            teacher: what the original blocks returned for each batch.
            seed: the order of the samples is drawn by it.
            report: told the fraction that is done.

        Raises:
            InputError: a loss is not finite.
        """
        samples = list(self._samples(batches))
        scales = [linear.scales for linear in self._linears.values()]
        with self._trained():
            run(
                [*scales, *self._norms.values()],
                lambda number: self._loss(samples[number], batches, teacher),
                len(samples),
                self.options,
                seed,
                report,
            )
        return self._result()

    def _samples(self, batches: Sequence[Mapping[str, Tensor]]) -> Iterator[_Sample]:
        for number, batch in enumerate(batches):
            count = len(next(iter(batch.values())))
            for start in range(0, count, self.options.batch_size):
                yield _Sample(number, slice(start, min(start + self.options.batch_size, count)))

    def _loss(self, sample: _Sample, batches: Sequence[Mapping[str, Tensor]], teacher: Chain) -> Tensor:
        inputs = {name: values[sample.rows] for name, values in batches[sample.batch].items()}
        with torch.no_grad(), teacher.replaying(self._modules, sample.batch, sample.rows):
            wanted, classes = main_output(self._called(inputs, {}))
        found, _ = main_output(self._called(inputs, {name: norm.values() for name, norm in self._norms.items()}))
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == wanted.shape[:2]:
            wanted, found = wanted[mask.bool()], found[mask.bool()]
        return objective.divergence(wanted, found) if classes else objective.relative_error(wanted, found)

    def _called(self, inputs: Mapping[str, Tensor], parameters: dict[str, Tensor]) -> Any:
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
            stack.enter_context(quantized_inputs(self.skeleton.module, layers, self._tensors))
            yield

    def _planned(self, owner: str) -> LayerPlan:
        return self._layers[self.skeleton.info(f"{owner}.weight").name]

    def _result(self) -> Tuned:
        tuned = Tuned()
        with torch.no_grad():
            for owner, linear in self._linears.items():
                name = self._planned(owner).info.name
                tuned.scales[name] = linear.scales.values()
            for name, norm in self._norms.items():
                tuned.norms[self.skeleton.info(name).name] = norm.values()
        return tuned
