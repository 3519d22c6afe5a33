"""Where a model's blocks are: lists of equal modules that hold most of its layers. Names play no part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature

from torch import nn

from quantcli.errors import InputError, UsageError
from quantcli.system.text import listed

#: The name under which transformers passes a block its hidden states.
HIDDEN_STATES = "hidden_states"


@dataclass(frozen=True)
class BlockList:
    """A list of blocks that run one after the other, each on what the one before it returned.

    ``path`` names the list in the model, ``blocks`` its members in order.
    """

    path: str
    blocks: tuple[str, ...]


#: The model itself in place of lists of blocks.
WHOLE = BlockList("", ("",))


class NotSequentialError(InputError):
    """A model has no blocks that are called one after the other, each once."""


def find_blocks(model: nn.Module, layers: Collection[str], named: Sequence[str] = ()) -> list[BlockList]:
    """The outermost lists of blocks that hold any of ``layers``, in the order in which the model holds them.

    Args:
        model: the whole model; its weights are not looked at.
        layers: names of the modules that are to be quantized.
        named: globs of the lists' paths, where the user names them; structure is then not asked.

    Raises:
        UsageError: a name given is no list of modules.
        NotSequentialError: no list of blocks is found.
    """
    lists = _named(model, named) if named else _outermost(model, layers)
    if not lists:
        raise NotSequentialError(
            f"No list of equal blocks holds the layers to quantize ({listed(list(layers))}).",
            hint="Name it in a recipe, as in blocks: [model.layers], or use an algorithm without data, such as mse.",
        )
    return lists


def tower_of(path: str, reached: Collection[str]) -> str:
    """The outermost module around a list of blocks that holds none of the lists ``reached``."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if not any(f"{other}.".startswith(f"{outer}.") for other in reached):
            return outer
    return path


def _outermost(model: nn.Module, layers: Collection[str]) -> list[BlockList]:
    lists: list[BlockList] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(_prefix(outer.path)) for outer in lists)
        if not inside and _is_list_of_blocks(module) and any(layer.startswith(_prefix(path)) for layer in layers):
            lists.append(_block_list(path, module))
    return lists


def _is_list_of_blocks(module: nn.Module) -> bool:
    """Whether modules of one class, each with modules of its own, make up a list.

    Of several classes, as in a hybrid of attention and state spaces, those do that are called by the same names.
    """
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    members = list(module.children())
    kinds = {type(member) for member in members}
    if not kinds or kinds & {nn.ModuleList, nn.Sequential} or not all(any(m.children()) for m in members):
        return False
    return len(kinds) == 1 or (isinstance(module, nn.ModuleList) and _are_called_alike(kinds))


def _are_called_alike(kinds: Collection[type[nn.Module]]) -> bool:
    """Whether all take hidden states first, and under one name that says so."""
    first = {next((name for name in signature(kind.forward).parameters if name != "self"), "") for kind in kinds}
    return first == {HIDDEN_STATES}


def _block_list(path: str, module: nn.Module) -> BlockList:
    return BlockList(path, tuple(f"{_prefix(path)}{name}" for name, _ in module.named_children()))


def _prefix(path: str) -> str:
    """How the names of what is in a module begin; the model itself has no name."""
    return f"{path}." if path else ""


def _named(model: nn.Module, globs: Sequence[str]) -> list[BlockList]:
    lists = (pair for pair in model.named_modules() if isinstance(pair[1], (nn.ModuleList, nn.Sequential)))
    by_path = {path: module for path, module in lists if path and len(module)}
    chosen: list[BlockList] = []
    for glob in globs:
        matching = [_block_list(path, module) for path, module in by_path.items() if fnmatchcase(path, glob)]
        if not matching:
            raise UsageError(
                f"The recipe's blocks: {glob!r} names no list of modules.",
                f"This model's lists are {', '.join(by_path)}." if by_path else "This model has none.",
            )
        chosen += matching
    for outer in chosen:
        inside = [other.path for other in chosen if f"{other.path}.".startswith(f"{outer.path}.")]
        if len(inside) > 1:
            raise UsageError(f"The recipe's blocks: {' and '.join(inside)} are the same list, or one holds the other.")
    return chosen
