"""Which lists of blocks the data reaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantcli.blocks.reach import reached_lists
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import BlockList, NotSequentialError, tower_of
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.errors import InputError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


class Both(nn.Module):
    """Two towers, the second of which is called first; it reads a parameter of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.mouth = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.table = nn.Embedding(3, 4)

    def forward(self, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        hidden = torch.zeros(1, 3, 4)
        for name, given in (("mouth", text), ("eyes", image)):
            if given is not None:
                hidden = given + self.table.weight
                for block in self.get_submodule(f"{name}.layers"):
                    hidden = block(hidden)
        return hidden


LISTS = [BlockList(f"{name}.layers", (f"{name}.layers.0", f"{name}.layers.1")) for name in ("eyes", "mouth")]


@pytest.fixture
def skeleton(tmp_path: Path) -> Skeleton:
    save_file(Both().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = Both()
    return Skeleton(module.eval(), open_checkpoint(tmp_path / "model.safetensors"))


def test_a_tower_without_data_is_told(skeleton: Skeleton) -> None:
    reached, unreached = reached_lists(skeleton, LISTS, {"text": torch.ones(2, 3, 4)})
    assert [each.path for each in reached] == ["mouth.layers"]
    assert [each.path for each in unreached] == ["eyes.layers"]
    assert tower_of("eyes.layers", ["mouth.layers"]) == "eyes"
    assert all(parameter.is_meta for parameter in skeleton.module.parameters())


def test_lists_are_in_the_order_of_their_calls(skeleton: Skeleton) -> None:
    batch = {"text": torch.ones(2, 3, 4), "image": torch.ones(2, 3, 4)}
    reached, unreached = reached_lists(skeleton, LISTS, batch)
    assert [each.path for each in reached] == ["mouth.layers", "eyes.layers"]
    assert not unreached


def test_data_that_reaches_nothing(skeleton: Skeleton) -> None:
    with pytest.raises(InputError, match="None of the model's blocks is called"):
        reached_lists(skeleton, LISTS, {})


class InTurn(Both):
    """A block of one list after a block of the other."""

    def forward(self, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        hidden = text
        for eye, mouth in zip(self.eyes["layers"], self.mouth["layers"], strict=True):
            hidden = mouth(eye(hidden) * 2)
        return hidden


def test_lists_whose_blocks_are_called_in_turn_are_none(tmp_path: Path) -> None:
    module = InTurn()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    skeleton = Skeleton(module.to("meta"), open_checkpoint(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match=r"mouth\.layers and of eyes\.layers are called in turn"):
        reached_lists(skeleton, LISTS, {"text": torch.ones(2, 3, 4)})


class Shared(nn.Module):
    """One block for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, text: Tensor) -> Tensor:
        return self.layers[0](self.layers[0](text))


def test_a_block_that_is_called_again_is_told_before_work(tmp_path: Path) -> None:
    save_file(Shared().state_dict(), tmp_path / "model.safetensors")
    skeleton = Skeleton(Shared().to("meta"), open_checkpoint(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="blocks of layers are called more than once"):
        reached_lists(skeleton, [BlockList("layers", ("layers.0",))], {"text": torch.ones(2, 3, 4)})


class TwoStreams(nn.Module):
    """A block that takes another stream before its hidden states, and hands on both, as Reformer's do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, other: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return other + self.inner(hidden_states), hidden_states


class Reversible(nn.Module):
    """Passes both streams by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoStreams(), TwoStreams()])

    def forward(self, text: Tensor) -> Tensor:
        other = hidden = text
        for layer in self.layers:
            other, hidden = layer(other=other, hidden_states=hidden)
        return other


def test_blocks_with_a_stream_before_their_hidden_states_are_no_chain(tmp_path: Path) -> None:
    save_file(Reversible().state_dict(), tmp_path / "model.safetensors")
    skeleton = Skeleton(Reversible().to("meta"), open_checkpoint(tmp_path / "model.safetensors"))
    with pytest.raises(NotSequentialError, match="take other before hidden_states"):
        reached_lists(skeleton, [BlockList("layers", ("layers.0", "layers.1"))], {"text": torch.ones(2, 3, 4)})
