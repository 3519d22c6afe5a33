"""Tensors joined and split by rows, read as they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.rearranged import RearrangedCheckpoint


@pytest.fixture
def seen(tmp_path: Path) -> RearrangedCheckpoint:
    stored = {
        "a": torch.arange(12.0).reshape(6, 2),
        "b": torch.arange(12.0, 20.0).reshape(4, 2),
        "kept": torch.ones(3),
    }
    save_file(stored, tmp_path / "model.safetensors")
    made = {
        "joined": {"sources": ["a", "b"], "runs": [[0, 0, 1, 6], [1, 0, 1, 4]]},
        "turned": {"sources": ["a"], "runs": [[0, 0, 2, 3], [0, 1, 2, 3]]},
    }
    return RearrangedCheckpoint(open_checkpoint(tmp_path / "model.safetensors"), made)


def test_what_is_made_takes_the_place_of_what_it_is_made_of(seen: RearrangedCheckpoint) -> None:
    shapes = {info.name: (info.shape, info.nbytes) for info in seen.infos()}
    assert shapes == {"joined": ((10, 2), 80), "turned": ((6, 2), 48), "kept": ((3,), 12)}
    assert torch.equal(seen.load("kept"), torch.ones(3))


def test_rows_are_read_across_runs(seen: RearrangedCheckpoint) -> None:
    infos = {info.name: info for info in seen.infos()}
    assert torch.equal(seen.load("joined"), torch.arange(20.0).reshape(10, 2))
    assert torch.equal(seen.read_rows(infos["joined"], 5, 8)[:, 0], torch.tensor([10.0, 12.0, 14.0]))
    assert torch.equal(seen.load("turned")[:, 0], torch.tensor([0.0, 4.0, 8.0, 2.0, 6.0, 10.0]))
    assert torch.equal(seen.read_rows(infos["turned"], 2, 4)[:, 0], torch.tensor([8.0, 2.0]))
