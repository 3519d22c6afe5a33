"""Dynamic quantization: ranges of activations are found at inference, products are taken of integers.

Written in ONNX's own operators, DynamicQuantizeLinear and MatMulInteger, which the runtime fuses. One input
that several products share is quantized once. Convolutions are left out: the runtime's ConvInteger took ten
times as long as its float convolution (PP-OCRv4's recognizer: 224 ms in place of 21).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quantcli.onnx.graph.operands import channel_axis
from quantcli.onnx.graph.values import add_initializer, constant, drop_unused, input_of, is_standard, rank
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.integer_kernels import integer_opset, no_integer_kernel
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.weights.integer import ORIGIN, IntegerWeight, integer_weight

if TYPE_CHECKING:
    import onnx_ir as ir


class DynamicQuantizer:
    """Rewrites nodes of one graph and of its bodies; outputs keep their names."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._weights: dict[tuple[object, ...], tuple[IntegerWeight, ir.Value]] = {}
        self._inputs: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def rewrite(self, layer: NodePlan, evidence: Evidence) -> LayerOutcome:
        """Replace a Gemm or MatMul by its integer form."""
        import onnx_ir as ir

        node = layer.node
        value, bias, output = node.inputs[1], input_of(node, 2), node.outputs[0]
        assert value is not None
        weight, codes = self._integer_weight(layer, value, evidence)
        data, scale_in, zero_point = self._quantized_input(node)
        base = output.name or node.name or "node"
        product = ir.Node("", "MatMulInteger", [data, codes, zero_point, weight.zero_point], name=f"{base}_integer")
        # Two sums of a channel's products and the scale are made once and read by all: order as the runtime fuses.
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{base}_cast")
        scale = ir.Node("", "Mul", [scale_in, weight.scale], name=f"{base}_scale")
        scaled = ir.Node("", "Mul", [cast.outputs[0], scale.outputs[0]], name=f"{base}_scaled")
        nodes = [product, cast, scale, scaled]
        if bias is not None:
            nodes.append(ir.Node("", "Add", [scaled.outputs[0], bias], name=f"{base}_bias"))
        elif _taken_for_bias(node):
            nodes.append(ir.Node("", "Sum", [scaled.outputs[0]], num_outputs=1, name=f"{base}_apart"))
        for part_node, part in zip(nodes, ("integer", "cast", "scale", "scaled"), strict=False):
            part_node.outputs[0].name = f"{base}_{part}"
        last = nodes[-1].outputs[0]
        last.type, last.shape = output.type, output.shape
        name = output.name
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, [output], [last])
        last.name = name
        drop_unused(value.graph or self.graph, value)
        return weight.outcome(layer)

    def _integer_weight(self, layer: NodePlan, value: ir.Value, evidence: Evidence) -> tuple[IntegerWeight, ir.Value]:
        """The weight, and its codes as the kernel wants them. Nodes that share a weight share these."""
        assert layer.scheme and layer.algorithm
        node, number_format, algorithm = layer.node, layer.scheme.weights, layer.algorithm
        key = (value, channel_axis(node), number_format, algorithm)
        if key not in self._weights:
            hessian = evidence.hessian(layer)
            weight = integer_weight(
                value.graph or self.graph, node, number_format, algorithm, hessian=hessian, journal=evidence.journal
            )
            codes = weight.codes
            if node.op_type == "Gemm" and weight.axis == 0:
                codes = self._transposed(codes)
            self._weights[key] = weight, codes
        return self._weights[key]

    def _quantized_input(self, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
        import onnx_ir as ir

        value = node.inputs[0]
        assert value is not None
        if value not in self._inputs:
            quantize = ir.Node("", "DynamicQuantizeLinear", [value], num_outputs=3, name=f"{value.name}_quantize")
            for output, part in zip(quantize.outputs, ("quantized", "scale", "zero_point"), strict=True):
                output.name = f"{value.name}_dynamic_{part}"
            producer, owner = value.producer(), value.graph or self.graph
            if producer is None:
                # An input of the graph, or of the body that the product is in.
                owner.insert_before(owner[0], quantize)
            else:
                owner.insert_after(producer, quantize)
            self._inputs[value] = (quantize.outputs[0], quantize.outputs[1], quantize.outputs[2])
        return self._inputs[value]

    def _transposed(self, codes: ir.Value) -> ir.Value:
        import onnx_ir as ir

        assert codes.const_value is not None and codes.name is not None and codes.graph is not None
        graph = codes.graph
        values, origin = np.ascontiguousarray(codes.const_value.numpy().T), codes.meta[ORIGIN]
        del graph.initializers[codes.name]
        turned = add_initializer(graph, codes.name, values)
        turned.meta[ORIGIN] = replace(origin, turned=not origin.turned)
        # Whoever asks what they stand for still wants them in the weight's own shape, and a copy would stay.
        before = codes.const_value
        codes.const_value = ir.LazyTensor(
            partial(_turned_back, turned), dtype=before.dtype, shape=ir.Shape(before.shape.numpy())
        )
        return turned


def _turned_back(codes: ir.Value) -> ir.TensorProtocol:
    import onnx_ir as ir

    assert codes.const_value is not None
    return ir.tensor(codes.const_value.numpy().T)


def _taken_for_bias(node: ir.Node) -> bool:
    """Whether the runtime would take what is added to a product for its bias, though it changes the sum's shape.

    DynamicQuantizeMatMul takes a constant of one row, of whatever length and number of dimensions. A sum of a single
    value stands between them then.
    """
    output = node.outputs[0]
    for add in output.consumers():
        if not is_standard(add, "Add"):
            continue
        other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
        tensor, dimensions = constant(other), rank(output)
        if tensor is None or tensor.size == 1 or tensor.size != tensor.shape[-1]:
            continue
        weight = node.inputs[1]
        channels = weight.shape[channel_axis(node)] if weight is not None and weight.shape is not None else None
        # A product that is quantized has two dimensions at the least.
        if tensor.size != channels or len(tensor.shape) > (dimensions or 2):
            return True
    return False


FORM = Form(
    "dynamic",
    lambda scheme: scheme.inputs is not None and scheme.inputs.dynamic,
    no_integer_kernel,
    lambda model, layers, evidence: partial(DynamicQuantizer(model).rewrite, evidence=evidence),
    integer_opset,
)
