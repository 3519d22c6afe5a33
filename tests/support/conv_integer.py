"""A form of convolutions that quantcli does not have, as somebody else would write it: ConvInteger."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from quantcli.onnx.graph.values import add_initializer, array, drop_unused, input_of
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.weights.integer import integer_weight


def rewriter(model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence) -> Callable[[NodePlan], LayerOutcome]:
    graph = model.graph

    def rewrite(layer: NodePlan) -> LayerOutcome:
        assert layer.scheme and layer.algorithm
        node, output, bias = layer.node, layer.node.outputs[0], array(input_of(layer.node, 2))
        weight = integer_weight(graph, node, layer.scheme.weights, layer.algorithm, floats=True)
        base, per_channel = output.name, (-1, 1, 1)
        scales = add_initializer(graph, f"{base}_scales", weight.scales.reshape(per_channel))
        shift = np.zeros(weight.channels, np.float32) if bias is None else bias
        shifts = add_initializer(graph, f"{base}_shifts", shift.reshape(per_channel))
        quantize = ir.Node("", "DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3)
        data, scale, zero_point = quantize.outputs
        product = ir.Node("", "ConvInteger", [data, weight.codes, zero_point], node.attributes.values())
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
        by_input = ir.node("Mul", [cast.outputs[0], scale])
        by_weight = ir.node("Mul", [by_input.outputs[0], scales])
        nodes = [quantize, product, cast, by_input, by_weight, ir.node("Add", [by_weight.outputs[0], shifts])]
        for number, value in enumerate(value for each in nodes for value in each.outputs):
            value.name = f"{base}_conv_integer_{number}"
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], nodes[-1].outputs)
        drop_unused(graph, layer.weight)
        return LayerOutcome.quantized(layer, weight.nbytes, weight.rounding)

    return rewrite


FORM = Form(
    "conv-integer",
    lambda scheme: scheme.inputs is not None and scheme.inputs.dynamic,
    lambda layer, scheme: None if layer.node.op_type == "Conv" else "it is no convolution",
    rewriter,
    lambda layer: 13,
)
