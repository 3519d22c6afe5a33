"""Fused experts taken apart again: one linear layer for each expert's weight that a checkpoint holds.

transformers stacks the experts of a layer into one parameter as it loads them, and so nothing could be seen of the
inputs of a single one. Here such a parameter is replaced by linear layers, and by a stand-in that computes with them
where the class's own code multiplies by an expert's slice. What the module computes stays the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantcli.core.tensors import TensorInfo
from quantcli.models import stored_parameters


@dataclass(frozen=True)
class _Piece:
    """A tensor of a checkpoint: expert ``expert``'s part ``part``, of several that are joined by rows."""

    info: TensorInfo
    expert: int
    part: int
    leaf: str


def take_experts_apart(model: nn.Module, infos: Iterable[TensorInfo]) -> dict[str, str]:
    """Replace fused experts by linear layers; returns what the parameter of each tensor is now called.

    Experts that are put together in another way than one after the other, parts joined by rows, are left as they are.
    """
    pieces: dict[str, list[_Piece]] = {}
    merged = stored_parameters.MergedExperts(model)
    for info in infos:
        place = merged.place(info.name)
        if place is not None:
            target, expert, part, leaf = place
            pieces.setdefault(target, []).append(_Piece(info, expert, part, leaf))
    parameters = dict(model.named_parameters())
    whole = {target: found for target, found in pieces.items() if target in parameters}
    whole = {target: found for target, found in whole.items() if _makes_up(found, parameters[target].shape)}
    names: dict[str, str] = {}
    for target, found in whole.items():
        names |= _take_apart(model, target, found)
    if names:
        stored_parameters.use_plain_experts(model)
    return names


def _makes_up(pieces: Collection[_Piece], shape: Sequence[int]) -> bool:
    """Whether tensors, stacked by expert and joined by rows, have the shape of a fused parameter."""
    experts = {piece.expert for piece in pieces}
    rows: dict[int, int] = {}
    for piece in pieces:
        if len(piece.info.shape) != 2 or piece.info.shape[1] != shape[-1]:
            return False
        rows[piece.expert] = rows.get(piece.expert, 0) + piece.info.shape[0]
    return len(shape) == 3 and experts == set(range(shape[0])) and set(rows.values()) == {shape[1]}


def _take_apart(model: nn.Module, target: str, pieces: Iterable[_Piece]) -> dict[str, str]:
    path, _, leaf = target.rpartition(".")
    owner = model.get_submodule(path)
    names: dict[str, str] = {}
    experts: dict[int, list[nn.Linear]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.expert, piece.part)):
        rows, columns = piece.info.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight.requires_grad_(False)
        if str(piece.expert) not in owner._modules:
            owner.add_module(str(piece.expert), nn.Module())
        owner.get_submodule(str(piece.expert)).add_module(piece.leaf, linear.eval())
        experts.setdefault(piece.expert, []).append(linear)
        names[piece.info.name] = f"{path}.{piece.expert}.{piece.leaf}.weight"
    del owner._parameters[leaf]
    setattr(owner, leaf, _Experts([experts[index] for index in sorted(experts)]))
    return names


class _StandIn:
    """What takes a parameter's place; anything but a product with it is computed from the whole tensor."""

    def whole(self) -> Tensor:
        """The tensor that is stood in for."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        values = [value.whole() if isinstance(value, _StandIn) else value for value in args]
        named = {key: value.whole() if isinstance(value, _StandIn) else value for key, value in (kwargs or {}).items()}
        return function(*values, **named)


class _Experts(_StandIn):
    """The weights of all experts, ``[experts, rows, columns]``."""

    def __init__(self, experts: Sequence[Sequence[nn.Linear]]) -> None:
        self._experts = [_Expert(linears) for linears in experts]

    def whole(self) -> Tensor:
        return torch.stack([expert.whole() for expert in self._experts])

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, index: Any) -> Any:
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        return self._experts[int(index)] if single else self.whole()[index]


class _Expert(_StandIn):
    """The weight of one expert, ``[rows, columns]``: that of several layers, one below the other."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._linears = tuple(linears)

    def whole(self) -> Tensor:
        return torch.cat([linear.weight for linear in self._linears])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        if function is functional.linear and len(args) > 1 and isinstance(args[1], _Expert):
            outputs = [linear(args[0]) for linear in args[1]._linears]
            product = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            return product if bias is None else product + bias
        return super().__torch_function__(function, types, args, kwargs)
