"""Scales folded into blocks: what is computed stays, statistics follow, and outliers cost less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.plain_blocks import network, recorded
from torch import Tensor, nn

from quantcli.blocks.calls import Call
from quantcli.blocks.skeleton import open_skeleton
from quantcli.checkpoint import open_checkpoint
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.recipe import validate
from quantcli.planning.resolve import resolve
from quantcli.ptq.block import linear_layers
from quantcli.ptq.observe import observe
from quantcli.ptq.transforms import Transforms

NEEDS = ("gram", "absmax", "mean_abs", "sample")


def plan_of(folder: Path, *steps: str, scheme: str = "int8-dynamic") -> Plan:
    checkpoint = open_checkpoint(folder)
    recipe = validate({"scheme": scheme, "steps": list(steps), "rest": "keep"}, "test")
    return resolve(recipe, checkpoint.infos(), checkpoint.config, data=True)


def block_of(folder: Path, path: str) -> tuple[nn.Module, list[Call]]:
    """A block whose norms let some channels through twenty times as large, and calls of it."""
    model = network(folder)
    block = model.get_submodule(path)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name and name.endswith("weight"):
            parameter[torch.randperm(len(parameter), generator=generator)[:4]] *= 20
    with recorded([block]) as calls, torch.no_grad():
        for _ in range(3):
            images, ids = torch.randn(2, 3, 32, 32, generator=generator), torch.randint(3, 96, (4, 24))
            model(images if path.startswith("vit") else ids)
    return block, [Call(args[0], args[1:], kwargs) for args, kwargs, _ in calls]


def inside(folder: Path, plan: Plan, path: str) -> dict[str, LayerPlan]:
    """Layers of a block by their names in it."""
    start, found = f"{path}.", linear_layers(open_skeleton(open_checkpoint(folder)), plan)
    return {name.removeprefix(start): layer for name, layer in found.items() if name.startswith(start)}


@pytest.mark.parametrize(
    ("model", "path", "moved"),
    [("llama", "model.layers.1", 6), ("vit", "vit.layers.0", 4)],
)
@pytest.mark.parametrize("step", ["smoothquant", "awq"])
def test_a_block_computes_what_it_did_and_statistics_follow(
    models: Path, model: str, path: str, moved: int, step: str
) -> None:
    scheme = "int8-dynamic" if step == "smoothquant" else "int4"
    block, calls = block_of(models / model, path)
    plan = plan_of(models / model, step, scheme=scheme)
    layers = inside(models / model, plan, path)
    before = [call.run(block) for call in calls]
    originals = {name: block.get_submodule(name).weight.clone() for name in layers}
    stats = observe(block, calls, layers, NEEDS)
    Transforms(plan).apply(block, layers, calls[0], stats)
    changed = [name for name in layers if not torch.equal(block.get_submodule(name).weight, originals[name])]
    assert len(changed) >= moved
    with torch.no_grad():
        for call, wanted in zip(calls, before, strict=True):
            torch.testing.assert_close(call.run(block), wanted, rtol=0, atol=2e-5 * float(wanted.abs().amax()))
    again = observe(block, calls, layers, NEEDS)
    for name in layers:
        for field in NEEDS:
            found, wanted = getattr(stats[name], field), getattr(again[name], field)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().amax()))


def fake_quantized(values: Tensor, bits: int = 8) -> Tensor:
    """Symmetric, a scale per row."""
    half = (1 << bits) / 2
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (half - 0.5)
    return (values / scale).round().clamp(-half, half - 1) * scale


def error(block: nn.Module, calls: list[Call], layers: dict[str, LayerPlan], wanted: list[Tensor]) -> float:
    """Squared error of a block's output with weights and inputs of its layers in eight bits."""
    handles, weights = [], {name: block.get_submodule(name).weight.clone() for name in layers}
    for name in layers:
        module = block.get_submodule(name)
        module.weight.data = fake_quantized(module.weight)
        handles.append(module.register_forward_pre_hook(lambda _, args: (fake_quantized(args[0]),)))
    with torch.no_grad():
        found = sum(float((call.run(block) - each).square().sum()) for call, each in zip(calls, wanted, strict=True))
    for handle in handles:
        handle.remove()
    for name, weight in weights.items():
        block.get_submodule(name).weight.data = weight
    return found


def test_smoothing_tames_outliers(models: Path) -> None:
    path = "model.layers.1"
    block, calls = block_of(models / "llama", path)
    plan = plan_of(models / "llama", "smoothquant")
    layers = inside(models / "llama", plan, path)
    wanted = [call.run(block) for call in calls]
    before = error(block, calls, layers, wanted)
    Transforms(plan).apply(block, layers, calls[0], observe(block, calls, layers, NEEDS))
    assert error(block, calls, layers, wanted) < 0.6 * before


def test_blocks_that_are_alike_are_tried_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcli.ptq import transforms

    plan, tried = plan_of(models / "llama", "smoothquant"), []
    original = transforms.find_folds
    monkeypatch.setattr(transforms, "find_folds", lambda *args: tried.append(1) or original(*args))
    own = Transforms(plan)
    for path in ("model.layers.0", "model.layers.1"):
        block, calls = block_of(models / "llama", path)
        layers = inside(models / "llama", plan, path)
        own.apply(block, layers, calls[0], observe(block, calls, layers, NEEDS))
    assert len(tried) == 1
