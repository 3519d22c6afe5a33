"""A folder with a graph, as its target wants it: where the graph lies, and what lies beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from quantcli.checkpoint.config_file import config_of
from quantcli.checkpoint.hugging_face import companions
from quantcli.core.manifest import MANIFEST
from quantcli.onnx.plan.plan import GraphPlan
from quantcli.planning.targets import onnx_layout
from quantcli.planning.targets.base import OnnxLayout
from quantcli.system.files import write_json


def layout_of(output: Path, plan: GraphPlan) -> OnnxLayout:
    """How an output is laid out: a file as it is called, a folder as its target wants it."""
    if output.suffix == ".onnx":
        return OnnxLayout(output.name, f"{output.name}.data")
    return onnx_layout(plan.recipe, ((node.scheme, node.info.numel) for node in plan.nodes))


def copy_companions(model: Path, out: Path, layout: OnnxLayout, *, outside: bool) -> list[str]:
    """Copy what lies beside a model's weights, such as its tokenizer; ``outside``: whether the graph's own do.

    Returns warnings of what is not there.
    """
    for relative in companions(model):
        if relative.as_posix() != MANIFEST:
            destination = out / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / relative, destination)
    if layout.config is not None:
        write_json(out / "config.json", layout.config(config_of(model) or {}, outside))
    return layout.warnings(model)
