"""What the rounding of each layer alone costs, from a few backward passes, to second order.

A small change D of a weight moves the distribution of outputs by KL = 1/2 E[(g D x)^2] in nats, where x are the layer's
inputs and g gradients of the log-probability of an output drawn from the model itself (Fisher's information; used for
pruning by Theis et al., arXiv:1801.05787). Where outputs are no logits, g are gradients of random projections of them,
and the same product is their relative squared error (Hutchinson 1989). Errors of different tokens and layers are taken
to be independent; `quantcli.search.sensitivity` measures how far that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.search.module import SearchedModel

#: What is kept of all layers' inputs and gradients, in bytes.
_KEPT_BYTES = 512 << 20


@dataclass
class _Seen:
    """Inputs ``[tokens, columns]`` of a layer with the gradients ``[tokens, rows]`` of its outputs.

    ``weight`` is how many tokens of the sample one of them stands for, divided by the tokens that are predicted.
    """

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class Probes:
    """Inputs and gradients of linear layers, by the names of their tensors."""

    def __init__(
        self,
        model: SearchedModel,
        tensors: list[str],
        seed: int,
        tick: Callable[[float], None],
        is_late: Callable[[], bool],
    ) -> None:
        """Run the model forwards and backwards once for every sample; for one at least, however late it is."""
        layers = {name: module for name in tensors if (module := model.linear(name)) is not None}
        floats = sum(module.in_features + module.out_features for module in layers.values())
        self._most = max(16, _KEPT_BYTES // max(1, 2 * floats * len(model.samples)))
        self._seen: dict[str, _Seen] = {name: _Seen() for name in layers}
        self._halved = 0.5 if model.measure == "kl_nats" else 1.0
        generator = torch.Generator().manual_seed(seed)
        self._samples = 0
        for number, sample in enumerate(model.samples):
            self._probe(model, layers, sample, generator)
            self._samples = number + 1
            tick(self._samples / len(model.samples))
            if is_late():
                break

    def _probe(
        self, model: SearchedModel, layers: Mapping[str, nn.Linear], sample: Any, generator: torch.Generator
    ) -> None:
        with ExitStack() as stack, torch.enable_grad():
            pending: list[tuple[str, Tensor]] = []
            for name, module in layers.items():
                stack.callback(module.register_forward_hook(partial(self._keep_inputs, name, pending)).remove)
            output, classes = model.output(sample)
            if not output.requires_grad:
                return
            score, tokens = _score(output, generator, classes=classes)
            score.backward()  # type: ignore[no-untyped-call]
        for name, result in pending:
            gradient = result.grad
            if gradient is None:
                continue
            flat = gradient.reshape(-1, gradient.shape[-1])
            chosen = self._chosen(len(flat))
            self._seen[name].gradients.append(flat[chosen].to(torch.bfloat16))
            self._seen[name].weights.append(len(flat) / len(chosen) / tokens)

    def _keep_inputs(
        self, name: str, pending: list[tuple[str, Tensor]], module: nn.Module, inputs: Any, result: Tensor
    ) -> Tensor:
        """The hook behind a layer's calls: its output starts a gradient where nothing before it has one."""
        if not result.requires_grad:
            result = result.detach().requires_grad_()
        result.retain_grad()
        flat = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        self._seen[name].inputs.append(flat[self._chosen(len(flat))].to(torch.bfloat16))
        pending.append((name, result))
        return result

    def _chosen(self, tokens: int) -> Tensor:
        """Places of the tokens that are kept, evenly spread."""
        count = min(tokens, self._most)
        return torch.arange(count) * tokens // max(1, count)

    def seen(self) -> Iterator[str]:
        """Names of layers of which something is known."""
        return (name for name, seen in self._seen.items() if seen.gradients and len(seen.gradients) == len(seen.inputs))

    def cost(self, name: str, difference: Tensor) -> float:
        """What a change ``[rows, columns]`` of a layer's weight costs, in the model's measure."""
        seen, total = self._seen[name], 0.0
        for inputs, gradients, weight in zip(seen.inputs, seen.gradients, seen.weights, strict=True):
            moved = (inputs.float() @ difference.T * gradients.float()).sum(-1)
            total += weight * float(moved.square().sum())
        return self._halved * total / self._samples


def _score(output: Tensor, generator: torch.Generator, *, classes: bool) -> tuple[Tensor, int]:
    """A scalar whose gradient is probed, and by how much its square is to be divided."""
    if classes:
        rows = output.reshape(-1, output.shape[-1])
        with torch.no_grad():
            drawn = torch.multinomial(rows.softmax(-1), 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(rows, drawn, reduction="sum"), len(rows)
    direction = torch.randn(output.shape, generator=generator)
    return (output * direction).sum() / output.detach().norm().clamp(min=1e-30), 1
