"""Convolutions whose weights are stored as int8, one scale per channel: a Cast and a Mul make floats of them at load.

onnxruntime computes what constants alone lead to when it loads a model, but for a DequantizeLinear, which it would run
each time; and behind one, a convolution does not get the layout of its fastest kernels (0.3 to 0.8 of float speed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from quantcli.core.scheme import PRESETS
from quantcli.onnx.graph.operands import channel_axis
from quantcli.onnx.graph.values import drop_unused, is_standard, prepend
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.rewrite.bias_correction import correct_bias
from quantcli.onnx.weights.integer import IntegerWeight, integer_weight

if TYPE_CHECKING:
    import onnx_ir as ir

#: The operator set from which on Mul spreads one factor over a channel.
_SPREADING_OPSET = 7


def _rewriter(model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence) -> Callable[[NodePlan], LayerOutcome]:
    """Rewrites a convolution, and corrects its bias where the mean of its input is known."""
    expanded: dict[tuple[ir.Value, int], tuple[IntegerWeight, ir.Value]] = {}

    def rewrite(layer: NodePlan) -> LayerOutcome:
        assert layer.scheme and layer.algorithm
        node, graph, key = layer.node, layer.weight.graph or model.graph, (layer.weight, channel_axis(layer.node))
        shared, mean = key in expanded, evidence.input_mean(layer)
        if not shared:
            hessian = evidence.hessian(layer)
            weight = integer_weight(
                graph, node, layer.scheme.weights, layer.algorithm,
                floats=True, hessian=hessian, journal=evidence.journal,
            )  # fmt: skip
            expanded[key] = weight, decoded(graph, weight, layer.weight)
        weight, restored = expanded[key]
        correct_bias(node.graph or graph, node, weight, mean)
        node.replace_input_with(1, restored)
        drop_unused(graph, layer.weight)
        nbytes = 0 if shared else weight.nbytes
        return LayerOutcome.quantized(layer, nbytes, weight.rounding, decoded=weight.decoded)

    return rewrite


def decoded(graph: ir.Graph, weight: IntegerWeight, original: ir.Value) -> ir.Value:
    """The value that codes and scale stand for, in the type of the original, as nodes at the graph's head."""
    import onnx_ir as ir

    name = f"{(weight.codes.name or '').removesuffix('_quantized')}_decoded"
    cast = ir.node("Cast", [weight.codes], {"to": ir.DataType.FLOAT}, name=f"{name}_cast")
    nodes = [cast, ir.node("Mul", [cast.outputs[0], weight.scale], name=name)]
    cast.outputs[0].name = f"{name}_cast"
    restored = nodes[-1].outputs[0]
    restored.name = name
    dtype = original.dtype or ir.DataType.FLOAT
    if dtype != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", [restored], {"to": dtype}, name=f"{name}_half"))
        restored = nodes[-1].outputs[0]
        restored.name = f"{name}_half"
    restored.type, restored.shape = ir.TensorType(dtype), weight.codes.shape
    prepend(graph, *nodes)
    return restored


FORM = Form(
    "weights",
    lambda scheme: scheme.inputs is None and not scheme.weights.is_cast,
    lambda layer, scheme: None if is_standard(layer.node, "Conv", "ConvTranspose") else "it is no convolution",
    _rewriter,
    lambda layer: _SPREADING_OPSET,
    lambda layer, scheme: (PRESETS["int8"], "the only form of a convolution"),
)
