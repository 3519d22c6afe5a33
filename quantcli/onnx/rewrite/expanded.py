"""Convolutions whose weights are stored as int8, one scale per channel, and expanded to floats when they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from quantcli.core.scheme import PRESETS
from quantcli.onnx.graph.operands import channel_axis
from quantcli.onnx.graph.opset import QDQ_OPSET
from quantcli.onnx.graph.values import drop_unused, is_standard
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.rewrite.bias_correction import correct_bias
from quantcli.onnx.rewrite.qdq import dequantized
from quantcli.onnx.weights.integer import IntegerWeight, integer_weight

if TYPE_CHECKING:
    import onnx_ir as ir


def _rewriter(model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence) -> Callable[[NodePlan], LayerOutcome]:
    """Rewrites a convolution, and corrects its bias where the mean of its input is known."""
    expanded: dict[tuple[ir.Value, int], tuple[IntegerWeight, ir.Value]] = {}

    def rewrite(layer: NodePlan) -> LayerOutcome:
        assert layer.scheme and layer.algorithm
        node, graph, key = layer.node, layer.weight.graph or model.graph, (layer.weight, channel_axis(layer.node))
        shared, mean = key in expanded, evidence.input_mean(layer)
        if not shared:
            hessian = evidence.hessian(layer)
            weight = integer_weight(graph, node, layer.scheme.weights, layer.algorithm, exact=False, hessian=hessian)
            expanded[key] = weight, dequantized(graph, weight.parts, weight.axis, layer.weight)
        weight, restored = expanded[key]
        correct_bias(node.graph or graph, node, weight, mean)
        node.replace_input_with(1, restored)
        drop_unused(graph, layer.weight)
        nbytes = 0 if shared else weight.nbytes
        return LayerOutcome.quantized(layer, nbytes, weight.rounding, decoded=weight.decoded)

    return rewrite


FORM = Form(
    "weights",
    lambda scheme: scheme.inputs is None and not scheme.weights.is_cast,
    lambda layer, scheme: None if is_standard(layer.node, "Conv", "ConvTranspose") else "it is no convolution",
    _rewriter,
    lambda layer: QDQ_OPSET,
    lambda layer, scheme: (PRESETS["int8"], "the only form of a convolution"),
)
