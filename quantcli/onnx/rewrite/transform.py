"""Carrying out a plan on a graph: layers in all forms side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.onnx.graph.casts import restore_casts
from quantcli.onnx.graph.external import Scratch
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.forms import FORMS, form
from quantcli.onnx.plan.plan import GraphPlan, LayerOutcome
from quantcli.onnx.rewrite.residual import part_sums_from_norms

if TYPE_CHECKING:
    import onnx_ir as ir

#: Bytes of weights after which what was made of them is moved: to look for it takes a walk over the whole graph.
_MOVED_EVERY = 32 << 20

#: Forms of layers that run on integers: as a processor's kernels have them, so that the graph is written for one.
_ON_INTEGERS = ("static", "dynamic", "recurrent")


def transform(model: ir.Model, plan: GraphPlan, evidence: Evidence, scratch: Path | None = None) -> list[LayerOutcome]:
    """Rewrite a prepared graph in place.

    Args:
        model: the graph.
        plan: made for this very graph, in the operator set `needed_opset`.
        evidence: what its layers are quantized by.
        scratch: a file that large constants are moved into as soon as they are made; None keeps them in memory.
    """
    from onnx_ir.passes import common

    outcomes: dict[int, LayerOutcome] = {}
    moved = Scratch(scratch) if scratch else None
    for mode in dict.fromkeys(form(name).mode for name in FORMS):
        layers = plan.of_mode(mode)
        rewriters = {
            name: form(name).rewriter(model, [layer for layer in layers if layer.form == name], evidence)
            for name in dict.fromkeys(layer.form for layer in layers)
            if name
        }
        made = 0
        for layer in layers:
            if layer.form:
                outcomes[id(layer)] = rewriters[layer.form](layer)
                made += layer.info.nbytes
            if moved is not None and (made >= _MOVED_EVERY or layer is layers[-1]):
                moved.take(model)
                made = 0
    if any(layer.form in _ON_INTEGERS for layer in plan.nodes):
        part_sums_from_norms(model)
    restore_casts(model)
    model.graph.sort()
    # Our names for scales and codes may be those of the model's own values.
    common.NameFixPass()(model)
    return [outcomes.get(id(node)) or LayerOutcome(node, node.info.nbytes) for node in plan.nodes]
