"""Models that are not gone through block by block: shared layers, lists called in turn, no lists at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.artifacts import decoded_file
from torch import Tensor, nn

from quantcli import convert
from quantcli.algorithms.gptq import add_hessian
from quantcli.blocks.whole import ModelCall
from quantcli.errors import InputError
from quantcli.planning.recipe import validate
from quantcli.ptq.observe import observe

CODE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Shared(nn.Module):
    def __init__(self, depth=1):
        super().__init__()
        self.layers = nn.ModuleList([Block(32) for _ in range(depth)])
    def forward(self, x):
        for _ in range(3):
            for layer in self.layers:
                x = layer(x)
        return x

class InTurn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList([Block(32) for _ in range(2)])
        self.second = nn.ModuleList([Block(32) for _ in range(2)])
    def forward(self, x):
        for first, second in zip(self.first, self.second):
            x = second(first(x) * 2)
        return x

class Half(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block, self.out = Block(width), nn.Linear(width, width // 2)
    def forward(self, x):
        return self.out(self.block(x))

class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.halves = nn.ModuleList([Half(64), Half(32)])
    def forward(self, x):
        x = torch.cat([x, x], -1)
        for half in self.halves:
            x = half(x)
        return x

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 32)
    def forward(self, x):
        return self.two(torch.relu(self.one(x)))

def shared(): return Shared()
def again(): return Shared(2)
def in_turn(): return InTurn()
def halves(): return Halves()
def flat(): return Flat()
"""

WHY = {
    "shared": "blocks of layers are called more than once",
    "again": "blocks of layers are called more than once",
    "in_turn": "second and of first are called in turn",
    "halves": "blocks of halves change the shape",
    "flat": "No list of equal blocks",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "whole_models.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    generator = np.random.default_rng(0)
    # Channels that go together, so that GPTQ has errors to move.
    mixing = generator.normal(size=(32, 32)) * generator.exponential(1, 32)
    np.save(tmp_path / "data.npy", (generator.normal(size=(12, 10, 32)) @ mixing).astype(np.float32))
    return tmp_path


def made(name: str, place: Path) -> nn.Module:
    import importlib

    torch.manual_seed(0)
    module = getattr(importlib.import_module("whole_models"), name)()
    save_file(module.state_dict(), place / f"{name}.safetensors")
    return module.eval()  # type: ignore[no-any-return]


def converted(name: str, place: Path, algorithm: str, **recipe: Any) -> Any:
    wanted = validate({"scheme": "int4", "group_size": 32, "steps": [algorithm], "rest": "keep", **recipe}, "recipe")
    return convert(
        f"whole_models:{name}",
        place / f"{name}-{algorithm}.safetensors",
        recipe=wanted,
        weights=place / f"{name}.safetensors",
        data=place / "data.npy" if algorithm != "mse" else None,
        force=True,
    )


@pytest.mark.parametrize("name", WHY)
def test_every_layer_is_quantized_from_data(place: Path, name: str) -> None:
    module = made(name, place)
    data = torch.from_numpy(np.load(place / "data.npy"))
    wanted = module(data)
    errors = {}
    for algorithm in ("gptq", "mse"):
        report = converted(name, place, algorithm)
        with safe_open(place / f"{name}-{algorithm}.safetensors", "pt") as opened:
            entries = json.loads(opened.metadata()["quantcli"])["layers"].values()
        layers = [entry for entry in entries if entry.get("scheme")]
        assert {entry["algorithm"] for entry in layers} == {algorithm}
        assert len(layers) == sum(isinstance(each, nn.Linear) for each in module.modules())
        if algorithm == "gptq":
            assert any(WHY[name] in warning and "quantized at once" in warning for warning in report.warnings)
        module.load_state_dict(decoded_file(place / f"{name}-{algorithm}.safetensors", "compressed-tensors"))
        errors[algorithm] = float((module(data) - wanted).square().mean())
    assert errors["gptq"] < 0.9 * errors["mse"]


def test_hessians_of_all_calls_of_a_shared_layer_are_added_up(place: Path) -> None:
    module = made("shared", place)
    data = torch.from_numpy(np.load(place / "data.npy"))
    given: list[Tensor] = []
    hook = module.get_submodule("layers.0.up").register_forward_pre_hook(lambda _, args: given.append(args[0]))
    module(data)
    hook.remove()
    assert len(given) == 3
    expected = torch.zeros(32, 32)
    for each in given:
        add_hessian(expected, each.detach().reshape(-1, 32))
    calls = [ModelCall.of(module, {"x": part}) for part in data.split(4)]
    stats = observe(module, calls, ["layers.0.up", "layers.0.down"], {"gram"})
    assert stats["layers.0.up"].tokens == 3 * 12 * 10
    assert stats["layers.0.up"].gram is not None
    torch.testing.assert_close(stats["layers.0.up"].gram, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("algorithm", ["awq", "smoothquant"])
def test_transforms_keep_what_the_model_computes(place: Path, algorithm: str) -> None:
    module = made("in_turn", place)
    data = torch.from_numpy(np.load(place / "data.npy"))
    wanted = module(data)
    scheme = {"scheme": "int8-dynamic", "group_size": None} if algorithm == "smoothquant" else {}
    converted("in_turn", place, algorithm, **scheme)
    state = decoded_file(place / f"in_turn-{algorithm}.safetensors", "compressed-tensors")
    moved = not torch.equal(state["first.0.norm.weight"], module.state_dict()["first.0.norm.weight"])
    assert moved or algorithm == "awq", "its search may find that nothing is to be moved"
    module.load_state_dict(state)
    error = float((module(data) - wanted).square().mean() / wanted.square().mean())
    assert error < 0.01


@pytest.mark.parametrize("algorithm", ["autoround", "tune"])
def test_what_learns_from_blocks_is_refused(place: Path, algorithm: str) -> None:
    made("shared", place)
    steps = [algorithm] if algorithm == "autoround" else ["gptq", "tune"]
    with pytest.raises(InputError, match=r"called more than once.* learns from one block after the other.*gptq or awq"):
        converted("shared", place, algorithm, steps=steps)
