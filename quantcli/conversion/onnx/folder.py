"""A folder with a graph, as its target wants it: where the graph lies, and what lies beside it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from quantcli.checkpoint.hugging_face import companions, load_json
from quantcli.core.manifest import MANIFEST
from quantcli.core.scheme import Scheme
from quantcli.onnx.plan.plan import GraphPlan
from quantcli.planning.recipe import build_scheme
from quantcli.planning.targets import onnx_layout
from quantcli.planning.targets.base import OnnxLayout
from quantcli.system.files import write_json

_CONFIG = "config.json"


def config_of(model: Path) -> dict[str, Any] | None:
    """The config.json of a model, if that is a folder with one."""
    file = model / _CONFIG
    return load_json(file) if file.is_file() else None


def layout_of(output: Path, plan: GraphPlan) -> OnnxLayout:
    """How an output is laid out. A folder is called by the recipe's scheme, or else by the one of most values."""
    if output.suffix == ".onnx":
        return OnnxLayout(output.name, f"{output.name}.data")
    if plan.recipe.scheme is not None:
        return onnx_layout(plan.recipe, build_scheme(plan.recipe.scheme))
    values = Counter[Scheme]()
    for node in plan.nodes:
        if node.scheme is not None:
            values[node.scheme] += node.info.numel
    return onnx_layout(plan.recipe, values.most_common(1)[0][0])


def copy_companions(model: Path, out: Path, layout: OnnxLayout, *, outside: bool) -> None:
    """Copy what lies beside a model's weights, such as its tokenizer; ``outside``: whether the graph's own do."""
    for relative in companions(model):
        if relative.as_posix() != MANIFEST:
            destination = out / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / relative, destination)
    if layout.config is not None:
        write_json(out / _CONFIG, layout.config(config_of(model) or {}, outside))
