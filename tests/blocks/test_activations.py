"""Hidden states between blocks: what does not fit into memory goes to disk, and comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcli.blocks.activations import Activations

#: 5 entries of 480 bytes, and one of 240.
SHAPES = [(2, 5, 12)] * 5 + [(1, 5, 12)]


def filled(folder: Path, limit: int) -> tuple[Activations, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    states = Activations(folder, "layers", limit)
    for index, each in enumerate(values):
        states[index] = each.clone()
    return states, values


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize(("limit", "spilled"), [(0, 6), (479, 5), (480, 5), (1000, 4), (1200, 3), (10_000, 0)])
def test_values_are_equal_wherever_they_lie(tmp_path: Path, limit: int, spilled: int) -> None:
    states, values = filled(tmp_path / "scratch", limit)
    assert len(files(tmp_path / "scratch")) == spilled
    assert len(states) == len(values)
    assert states.nbytes_held <= limit
    assert states.nbytes_held == sum(each.nbytes for each in values) - sum(
        path.stat().st_size for path in (tmp_path / "scratch").rglob("*")
    )
    for _ in range(2):  # reading changes nothing
        for index, each in enumerate(values):
            assert torch.equal(states[index], each) and states[index].dtype == torch.float32


@pytest.mark.parametrize("limit", [0, 1000, 10_000])
def test_entries_are_replaced(tmp_path: Path, limit: int) -> None:
    states, values = filled(tmp_path, limit)
    before = files(tmp_path)
    for index in range(len(values)):
        # Also of another shape, and a view whose memory is not in order.
        states[index] = (states[index] * 2).transpose(0, 1)
        assert states.nbytes_held <= limit
    assert len(states) == len(values) and files(tmp_path) == before
    assert all(torch.equal(states[index], (each * 2).transpose(0, 1)) for index, each in enumerate(values))


def test_what_fits_again_leaves_the_disk(tmp_path: Path) -> None:
    states, values = filled(tmp_path, 500)
    assert "layers-1.bin" in files(tmp_path)
    states[0] = values[0][:, :1]  # smaller, so that there is room
    states[5] = values[5]
    assert "layers-5.bin" not in files(tmp_path) and torch.equal(states[5], values[5])


def test_what_is_read_from_disk_can_be_changed(tmp_path: Path) -> None:
    states, values = filled(tmp_path, 0)
    states[0].zero_()
    assert torch.equal(states[0], values[0])


def test_clear_removes_the_files(tmp_path: Path) -> None:
    states, _ = filled(tmp_path, 600)
    assert files(tmp_path)
    states.clear()
    assert not files(tmp_path) and len(states) == 0 and states.nbytes_held == 0


def test_two_chains_in_one_folder(tmp_path: Path) -> None:
    one, other = Activations(tmp_path, "a", 0), Activations(tmp_path, "b", 0)
    one[0], other[0] = torch.ones(3), torch.zeros(3)
    assert torch.equal(one[0], torch.ones(3)) and torch.equal(other[0], torch.zeros(3))
