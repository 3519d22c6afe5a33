"""Plans of made-up checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantcli.checkpoint import open_checkpoint
from quantcli.core.dtypes import DTYPE_BYTES
from quantcli.core.tensors import TensorInfo
from quantcli.planning.plan import Plan
from quantcli.planning.recipe import validate
from quantcli.planning.resolve import resolve


def infos(shapes: dict[str, tuple[int, ...]], dtype: str = "F32", **dtypes: str) -> list[TensorInfo]:
    """Tensors as headers describe them; a keyword gives one of them (dots written ``__``) another dtype."""
    found = []
    for name, shape in shapes.items():
        own = dtypes.get(name.replace(".", "__"), dtype)
        size = DTYPE_BYTES[own] * int(torch.Size(shape).numel())
        found.append(TensorInfo(name, shape, own, size, Path("model.safetensors")))
    return found


def plan_of(tensors: list[TensorInfo] | Path, config: dict[str, Any] | None = None, **recipe: Any) -> Plan:
    if isinstance(tensors, Path):
        checkpoint = open_checkpoint(tensors)
        tensors, config = list(checkpoint.infos()), dict(checkpoint.config or {})
    return resolve(validate({"scheme": "int4"} | recipe, "recipe.yaml"), tensors, config)
