"""A checkpoint of two tensors, and its output under way: what the writer, the verifier and the layout work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.conversion.checkpoint.layout import Destination, Layout, plan_layout
from quantcli.conversion.checkpoint.stream import LayerJob
from quantcli.conversion.checkpoint.writer import LayerResult
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.recipe import validate
from quantcli.planning.resolve import resolve

WEIGHT, NORM = "layers.0.up.weight", "layers.0.norm.weight"


@dataclass
class UnderWay:
    """An output whose headers are written."""

    checkpoint: Checkpoint
    plan: Plan
    layout: Layout
    file: Path
    destinations: Mapping[str, Destination]

    def layer(self, name: str) -> LayerPlan:
        return next(layer for layer in self.plan.layers if layer.info.name == name)

    def stream(self, name: str) -> LayerResult:
        """Write a tensor slab by slab, the last one first."""
        job = LayerJob(self.layer(name), self.plan, self.checkpoint, self.destinations)
        results = [job.run_slab(index) for index in reversed(range(len(job.slabs)))]
        assert results[-1] is not None and not any(results[:-1])
        return results[-1]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {WEIGHT: torch.randn(64, 128, generator=generator), NORM: torch.randn(128, generator=generator)}


def under_way(folder: Path, **recipe: Any) -> UnderWay:
    """Files for the output of a recipe, in a folder of its own."""
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors")
    checkpoint = open_checkpoint(folder / "model.safetensors")
    plan = resolve(validate(recipe, "recipe"), checkpoint.infos(), None)
    layout = plan_layout(plan, checkpoint, folder / "out.safetensors")
    return UnderWay(checkpoint, plan, layout, folder / "out.safetensors", layout.create_files(folder))
