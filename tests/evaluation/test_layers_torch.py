"""Layers of a torch candidate against the reference's, checked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.evaluation.layers_torch import LayerComparison, captured


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        out: Tensor = self.two(self.norm(self.one(x)))
        return out


@pytest.fixture
def nets() -> tuple[Net, Net]:
    """A network, and one whose second layer is coarser."""
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    theirs.two.weight.data = (theirs.two.weight.data * 8).round() / 8
    return ours, theirs


def stored(path: Path, net: nn.Module, dtype: torch.dtype, prefix: str = "") -> Checkpoint:
    """``two.weight`` in another dtype, so that its layer has changed."""
    state = {f"{prefix}{name}": value.contiguous() for name, value in net.state_dict().items()}
    save_file(state | {f"{prefix}two.weight": net.two.weight.detach().to(dtype)}, path)  # type: ignore[union-attr, operator]
    return open_checkpoint(path)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_changed_layers_only_over_all_samples(tmp_path: Path, nets: tuple[Net, Net], prefix: str) -> None:
    comparison, (ours, theirs) = LayerComparison(), nets
    signal = noise = 0.0
    for seed in range(3):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
        comparison.add(ours, theirs, {"x": x})
        one, other = ours(x).detach().double(), theirs(x).detach().double()
        signal, noise = signal + float((one**2).sum()), noise + float(((one - other) ** 2).sum())
    before = stored(tmp_path / "a.safetensors", ours, torch.float32, prefix)
    after = stored(tmp_path / "b.safetensors", theirs, torch.float16, prefix)
    (row,) = comparison.rows(before, after)
    assert (row.name, row.bytes_before, row.bytes_after) == (f"{prefix}two", 4 * 36, 2 * 32 + 4 * 4)
    assert row.sqnr_db == pytest.approx(float(10 * torch.tensor(signal / noise).log10()), abs=1e-3)
    assert row.model == str(after.path)


def test_hooks_are_gone_afterwards(nets: tuple[Net, Net]) -> None:
    net = nets[0]
    with captured(net) as outputs:
        net(torch.ones(1, 8))
    assert outputs.keys() == {"one", "two"} and torch.equal(outputs["two"], net(torch.ones(1, 8)))
    outputs.clear()
    net(torch.ones(1, 8))
    assert not outputs
