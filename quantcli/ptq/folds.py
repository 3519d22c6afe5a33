"""Folds: which scales of a block's inputs can be moved into the layer before, found by trial.

A linear layer computes the same when its input channels are divided by a scale and its columns multiplied by it.
The division costs nothing where the layer before can do it: a norm by its weight, a linear layer by its rows
(SmoothQuant, arXiv:2211.10438, section 4; AWQ, arXiv:2306.00978, section 3.2). Which layer that is, and who else
reads its output, depends on the model's code. So nothing is read from names: a source's output channels are
multiplied by powers of two, which floating point does exactly, and every linear layer whose input follows is given
back what it had before, so that what comes after it is not disturbed. If the block computes the same once the
source is divided and these layers are multiplied, they are all that ever sees the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.blocks.calls import Call
from quantcli.system.devices import full_precision

#: Largest relative difference that is taken for rounding; scaling by powers of two makes none in most kernels.
_TOLERANCE = 1e-5
#: Exponents of the trial's scales. None is zero: every channel must show whether it follows.
_EXPONENTS = (-2, -1, 1, 2)


@dataclass(frozen=True)
class Fold:
    """A scale ``s`` that ``source`` divides its output channels by and ``targets`` multiply their input columns by.

    ``channels``: output channels of the source, the length of ``s``. ``repeat``: how often each head of
    ``head_size`` channels appears, one after the other, in the targets' input (grouped-query attention). ``offset``:
    what the source's module adds to its weight (1 in a norm that multiplies by ``1 + weight``).
    """

    source: str
    targets: tuple[str, ...]
    channels: int
    repeat: int = 1
    head_size: int = 1
    offset: float = 0.0

    def expand(self, values: Tensor) -> Tensor:
        """From one value per channel of the source, ``[channels]``, to one per input of a target."""
        return _repeated(values, self.repeat, self.head_size)

    def largest(self, values: Tensor) -> Tensor:
        """From one value per input of a target to one per channel of the source: the largest of its repetitions."""
        return self._heads(values).amax(1).reshape(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Like `largest`, the mean."""
        return self._heads(values).mean(1).reshape(-1)

    def _heads(self, values: Tensor) -> Tensor:
        return values.reshape(-1, self.repeat, self.head_size)


def _repeated(values: Tensor, repeat: int, head_size: int) -> Tensor:
    return values.reshape(-1, head_size).repeat_interleave(repeat, 0).reshape(-1)


def matrix(module: nn.Module) -> Tensor:
    """A view of a linear layer's weight as ``[outputs, inputs]``; GPT-2's Conv1D stores it transposed."""
    weight = module.get_parameter("weight")
    return weight.T if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D, a linear layer whose weight is ``[inputs, outputs]``."""
    # Conv1D counts its outputs in `nf`; no other module has that.
    return not isinstance(module, nn.Linear) and hasattr(module, "nf")


def apply_fold(block: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Divide the source's output channels by ``scale``, float32 ``[channels]``, and multiply the targets' columns.

    The block computes what it did. Raises ValueError where a scale is not positive and finite.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"the scale of {fold.source} is not positive and finite everywhere")
    source = block.get_submodule(fold.source)
    with torch.no_grad():
        for name, values in _divided(source, scale, fold.offset).items():
            source.get_parameter(name).copy_(values)
        for target in fold.targets:
            matrix(block.get_submodule(target)).mul_(fold.expand(scale))


def _divided(source: nn.Module, scale: Tensor, offset: float) -> dict[str, Tensor]:
    """Weight and bias with which a source's output channels come out divided by ``scale``."""
    parameters = dict(source.named_parameters(recurse=False))
    weight = parameters["weight"]
    if weight.ndim == 1:
        divided = {"weight": (weight + offset) / scale - offset}
    else:
        divided = {"weight": weight / (scale if is_transposed(source) else scale.unsqueeze(1))}
    if parameters.get("bias") is not None:
        divided["bias"] = parameters["bias"] / scale
    return divided


def find_folds(block: nn.Module, call: Call, linears: Collection[str]) -> list[Fold]:
    """All folds of a block that a scale for at least one of ``linears`` can use, in the order of their sources.

    ``call`` is short: a few dozen tokens are enough to tell layers apart, and the block runs once per candidate.
    A layer that the call does not reach (an expert without tokens) might read what any source of its width writes, so
    such sources are not folded. Every layer is a target of one fold at most.

    Raises:
        InputError: the block's output is no tensor.
    """
    with torch.no_grad(), full_precision():
        trial = _Trial(block, call.in_float32())
        folds: list[Fold] = []
        taken: set[str] = set()
        for source in trial.sources():
            fold = trial.fold(source)
            if fold and not taken.intersection(fold.targets) and not set(linears).isdisjoint(fold.targets):
                taken.update(fold.targets)
                folds.append(fold)
    return folds


def holds(block: nn.Module, call: Call, folds: Sequence[Fold]) -> bool:
    """Whether folds that were found in another block, built of the same modules, are folds of this one as well.

    What a block is built of does not tell what its code does with it.

    Raises:
        InputError: the block's output is no tensor.
    """
    kept = {name: values.detach().clone() for name, values in block.named_parameters()}
    call = call.in_float32()
    with torch.no_grad(), full_precision():
        expected = call.run(block)
        for fold in folds:
            apply_fold(block, fold, _trial_scale(fold.channels, expected.device))
        output = call.run(block)
        for name, values in block.named_parameters():
            values.copy_(kept[name])
    return _same(expected, output)


def _trial_scale(channels: int, device: torch.device) -> Tensor:
    """Powers of two, ``[channels]``."""
    generator = torch.Generator().manual_seed(channels)
    picked = torch.randint(len(_EXPONENTS), (channels,), generator=generator)
    return torch.exp2(torch.tensor(_EXPONENTS)[picked].float()).to(device)


@dataclass
class _Record:
    """What a module was given and the width of what it gave back (None: no tensor), for each of its calls."""

    inputs: list[Tensor] = field(default_factory=list)
    widths: list[int | None] = field(default_factory=list)


class _Trial:
    """One call of a block, repeated with the output of one module scaled."""

    def __init__(self, block: nn.Module, call: Call) -> None:
        self.block, self.call = block, call
        users: dict[int, int] = {}
        for _, parameter in block.named_parameters(remove_duplicate=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
        weights = {name: module._parameters.get("weight") for name, module in block.named_modules()}
        self.weights = {name: weight for name, weight in weights.items() if weight is not None and weight.ndim <= 2}
        self.shared = {name for name, weight in self.weights.items() if users[id(weight)] > 1}
        self.linears = {name: block.get_submodule(name) for name in self.weights if self.weights[name].ndim == 2}
        self.records: dict[str, _Record] = {}
        with self._hooked({name: self._remember(name) for name in self.weights}):
            self.output = call.run(block)
        self.unreached = {matrix(self.linears[name]).shape[1] for name in self.linears.keys() - self.records.keys()}

    @contextmanager
    def _hooked(self, after: dict[str, Callable[..., Any]], before: Callable[..., Any] | None = None) -> Iterator[None]:
        """Hooks after some modules, and one before every linear layer, which is told the layer's name."""
        modules = dict(self.block.named_modules())
        handles = [modules[name].register_forward_hook(hook) for name, hook in after.items()]
        if before is not None:
            for name, module in self.linears.items():
                handles.append(module.register_forward_pre_hook(partial(before, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _remember(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if arguments and isinstance(arguments[0], Tensor):
                record = self.records.setdefault(name, _Record())
                record.inputs.append(arguments[0].clone())
                record.widths.append(output.shape[-1] if isinstance(output, Tensor) else None)

        return hook

    def sources(self) -> list[str]:
        """Modules that can set the scale of each channel of their output, in the order of the call."""
        return [
            name
            for name, record in self.records.items()
            if record.widths == [self._width(name)]
            and name not in self.shared
            and record.widths[0] not in self.unreached
        ]

    def _width(self, name: str) -> int:
        weight = self.weights[name]
        return matrix(self.linears[name]).shape[0] if name in self.linears else weight.numel()

    def fold(self, source: str) -> Fold | None:
        """The fold that starts at a module, or None where it has no readers that can all take the scale."""
        channels = self._width(source)
        scale = _trial_scale(channels, self.output.device)
        followed = self._followed(source, scale)
        mappings = set(followed.values())
        if len(mappings) != 1 or self.shared.intersection(followed):
            return None
        repeat, head_size = mappings.pop()
        for offset in (0.0, 1.0) if self.weights[source].ndim == 1 else (0.0,):
            fold = Fold(source, tuple(followed), channels, repeat, head_size, offset)
            if self._keeps(fold, scale):
                return fold
        return None

    def _followed(self, source: str, scale: Tensor) -> dict[str, tuple[int, int]]:
        """Linear layers whose inputs are multiplied when the source's output is, and how; see `_mapping`."""
        followed: dict[str, tuple[int, int]] = {}
        left = {name: list(record.inputs) for name, record in self.records.items()}

        def multiply(_: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
            return output * scale

        def take_back(name: str, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not left.get(name):
                return None
            before = left[name].pop(0)
            mapping = _mapping(before, arguments[0], scale)
            if mapping is None:
                return None
            followed[name] = mapping
            return (before, *arguments[1:])

        with self._hooked({source: multiply}, take_back):
            self.call.run(self.block)
        return followed

    def _keeps(self, fold: Fold, scale: Tensor) -> bool:
        """Whether the block computes the same with a fold; its parameters are not touched."""
        divided = _divided(self.block.get_submodule(fold.source), scale, fold.offset)
        parameters = {f"{fold.source}.{name}": values for name, values in divided.items()}
        for target in fold.targets:
            expanded = fold.expand(scale)
            transposed = is_transposed(self.linears[target])
            parameters[f"{target}.weight"] = self.weights[target] * (expanded.unsqueeze(1) if transposed else expanded)
        output = self.call.run(lambda *args, **kwargs: torch.func.functional_call(self.block, parameters, args, kwargs))
        return _same(self.output, output)


def _mapping(before: Tensor, after: Tensor, scale: Tensor) -> tuple[int, int] | None:
    """Repetitions and head size with which an input follows the scale of a source; None where it does not."""
    width, channels = before.shape[-1], len(scale)
    if before.shape != after.shape or width % channels or not bool(before.any()):
        return None
    repeat = width // channels
    if repeat == 1:
        return (1, channels) if _same(before * scale, after) else None
    for head_size in (size for size in range(channels, 0, -1) if channels % size == 0):
        if _same(before * _repeated(scale, repeat, head_size), after):
            return repeat, head_size
    return None


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal but for rounding, which is relative to each channel's largest value."""
    if left.shape != right.shape:
        return False
    largest = left.abs().reshape(-1, left.shape[-1]).amax(0)
    return bool(((left - right).abs() <= _TOLERANCE * largest).all())
