"""Where blocks are: lists found by structure, and named in a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.plain_blocks import LISTS, network
from torch import Tensor, nn

from quantcli.blocks.structure import BlockList, find_blocks
from quantcli.errors import InputError, UsageError


def weighted(model: nn.Module) -> list[str]:
    """Names of modules that may be quantized."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or hasattr(module, "nf")]


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_transformers(models: Path, name: str) -> None:
    model = network(models / name)
    expected = [BlockList(path, (f"{path}.0", f"{path}.1")) for path in LISTS[name]]
    assert find_blocks(model, weighted(model)) == expected


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.inner = nn.ModuleList([nn.Sequential(nn.Linear(width, width)), nn.Sequential(nn.Linear(width, width))])


class Other(Block):
    pass


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])


class Plain(nn.Module):
    """Lists that are none of blocks, beside two that are."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.mixed = nn.ModuleList([Block(), Other()])
        self.nested = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
        self.empty = nn.ModuleList()
        self.unused = nn.ModuleList([Block()])
        self.first = nn.Sequential(Stage(), Stage())
        self.second = nn.ModuleList([Block()])
        self.head = nn.Linear(8, 2)


class Attention(Block):
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden_states


class StateSpace(Block):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Embedding(Block):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_a_hybrids_blocks_of_several_classes_are_called_alike() -> None:
    hybrid = nn.ModuleDict({"layers": nn.ModuleList([StateSpace(), Attention()])})
    assert find_blocks(hybrid, weighted(hybrid)) == [BlockList("layers", ("layers.0", "layers.1"))]
    other = nn.ModuleDict({"layers": nn.ModuleList([Embedding(), Attention()])})
    with pytest.raises(InputError, match="No list of equal blocks"):
        find_blocks(other, ["layers.1.parts.0"])


def test_a_plain_module() -> None:
    layers = [name for name in weighted(Plain()) if not name.startswith("unused")]
    found = find_blocks(Plain(), layers)
    assert found == [BlockList("first", ("first.0", "first.1")), BlockList("second", ("second.0",))]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["second", "first"], ["second", "first"]),
        (["nested"], ["nested"]),
        (["first.*.blocks"], ["first.0.blocks", "first.1.blocks"]),
    ],
)
def test_names_in_a_recipe_win(globs: list[str], expected: list[str]) -> None:
    found = find_blocks(Plain(), weighted(Plain()), globs)
    assert [each.path for each in found] == expected
    assert all(block.startswith(f"{each.path}.") for each in found for block in each.blocks)


def test_a_name_that_is_no_list() -> None:
    with pytest.raises(UsageError, match=r"blocks: 'head' names no list of modules. This model's lists are .*first"):
        find_blocks(Plain(), weighted(Plain()), ["first", "head"])
    with pytest.raises(UsageError, match="blocks: 'empty' names no list"):
        find_blocks(Plain(), weighted(Plain()), ["empty"])
    with pytest.raises(UsageError, match="This model has none"):
        find_blocks(nn.Linear(8, 8), [], ["layers"])


@pytest.mark.parametrize("globs", [["first", "first.*.blocks"], ["second", "sec*"]])
def test_names_that_overlap(globs: list[str]) -> None:
    with pytest.raises(UsageError, match="are the same list, or one holds the other"):
        find_blocks(Plain(), weighted(Plain()), globs)


@pytest.mark.parametrize(
    ("model", "layers"), [(nn.Sequential(nn.Linear(8, 8)), ["0"]), (Plain(), ["head", "norms.0"]), (Plain(), [])]
)
def test_none_is_found(model: nn.Module, layers: list[str]) -> None:
    with pytest.raises(InputError, match=r"No list of equal blocks .* Name it in a recipe, as in blocks: \["):
        find_blocks(model, layers)
