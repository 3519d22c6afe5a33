"""Static quantization: QuantizeLinear/DequantizeLinear pairs with ranges from calibration.

Activations are uint8 with a zero point, weights int8 symmetric per channel, biases int32 in units of
``input scale * weight scale`` (Jacob et al., arXiv:1712.05877; ONNX's QDQ form, which the runtime fuses).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quantcli.core.scheme import NumberFormat
from quantcli.onnx.graph.operands import channel_axis
from quantcli.onnx.graph.values import (
    add_initializer,
    array,
    constant,
    drop_unused,
    free_name,
    input_of,
    integer,
    is_standard,
    prepend,
)
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.integer_kernels import integer_opset, no_integer_kernel
from quantcli.onnx.plan.placement import Placement, has_slow_kernel, has_wrong_kernel, place
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.rewrite.bias_correction import correct_bias
from quantcli.onnx.weights.integer import IntegerWeight, integer_weight

if TYPE_CHECKING:
    import onnx_ir as ir

#: What an int32 bias may reach: half of its range, so that the products still find room in the accumulator.
_BIAS_LIMIT = 1 << 30

#: Layers whose float weights onnxruntime quantizes on its own, one scale per tensor, between quantized values.
_QUANTIZED_UNASKED = ("Conv", "ConvTranspose", "Gemm")

Range = Callable[[str], tuple[float, float]]


def activation_qparams(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 codes that cover ``low..high``, zero among them."""
    import torch

    from quantcli.core.numerics import choose_qparams

    number_format = NumberFormat("int8", symmetric=False)
    bounds = torch.tensor([[low], [high]], dtype=torch.float32)
    scale, zero_point = choose_qparams(bounds[0], bounds[1], number_format)
    assert zero_point is not None
    # The convention counts from -128, the runtime's kernels want bytes from 0.
    return np.float32(scale.item()), np.uint8(int(zero_point.item()) + 128)


class StaticQuantizer:
    """Rewrites one graph. Values keep their names; ``V_quantized`` and ``V_dequantized`` join them."""

    def __init__(self, model: ir.Model, placement: Placement, ranges: Range) -> None:
        self.graph, self.placement, self.ranges = model.graph, placement, ranges
        self._scales: dict[ir.Value, np.float32] = {}
        # As calibration knows them: a graph output's name goes to what is dequantized.
        self._names = {value: value.name or "" for value in placement.values}
        self._constants: dict[str, ir.Value] = {}
        self._weights: dict[tuple[object, ...], tuple[IntegerWeight, ir.Value]] = {}

    def insert_pairs(self) -> None:
        """Put a pair on every value that was placed."""
        order = {value: index for index, value in enumerate(_values_in_order(self.graph))}
        for value in sorted(self.placement.values, key=lambda value: order.get(value, -1)):
            self._insert_pair(value, self.placement.values[value])
        for node in list(self.graph):
            unasked = is_standard(node, *_QUANTIZED_UNASKED) or has_wrong_kernel(node) or has_slow_kernel(node)
            if unasked and node not in self.placement.nodes:
                self._keep_float(node)

    def input_scale(self, node: ir.Node) -> np.float32:
        """Scale of a node's data input, once `insert_pairs` has run."""
        data = node.inputs[0]
        assert data is not None
        return self._scales[data]

    def _insert_pair(self, value: ir.Value, source: ir.Value) -> None:
        import onnx_ir as ir

        while self.placement.values.get(source, source) is not source:
            source = self.placement.values[source]
        name = self._names[source]
        scale, zero_point = activation_qparams(*self.ranges(name))
        parts = [
            self._shared(f"{name}_scale", np.asarray(scale)),
            self._shared(f"{name}_zero_point", np.asarray(zero_point)),
        ]
        quantize = ir.Node("", "QuantizeLinear", [value, *parts], name=f"{value.name}_quantize")
        dequantize = ir.Node("", "DequantizeLinear", [quantize.outputs[0], *parts], name=f"{value.name}_dequantize")
        quantized, restored = quantize.outputs[0], dequantize.outputs[0]
        quantized.name, restored.name = f"{value.name}_quantized", f"{value.name}_dequantized"
        restored.type, restored.shape, quantized.shape = value.type, value.shape, value.shape
        quantized.type = ir.TensorType(ir.DataType.UINT8)
        self._scales[restored] = scale
        producer = value.producer()
        readers = [use for use in value.uses() if use.node is not quantize]
        # What an integer kernel made exists as codes only: everybody reads those.
        everybody = producer is not None and self._is_integer(producer)
        for use in readers:
            if is_standard(use.node, "Shape", "Size"):
                # Asked of the codes: nothing is restored for it, and the kernel before writes nothing else.
                use.node.replace_input_with(use.idx, quantized)
            elif everybody or use.node in self.placement.nodes:
                use.node.replace_input_with(use.idx, restored)
        if producer is None:
            prepend(self.graph, quantize, dequantize)
        else:
            self.graph.insert_after(producer, [quantize, dequantize])
        if everybody and value.is_graph_output():
            self.graph.outputs[list(self.graph.outputs).index(value)] = restored
            restored.name, value.name = value.name, f"{value.name}_unquantized"

    def _keep_float(self, node: ir.Node) -> None:
        """Keep the runtime from quantizing a layer that was left float, or an operator whose integer kernel is no good.

        It does so where the layer reads and writes quantized values, also through operators that codes can pass;
        a sum of a single value hides the first.
        """
        import onnx_ir as ir

        data = node.inputs[0]
        if data is None or not _comes_from_codes(data) or not _goes_into_codes(node.outputs[0]):
            return
        same = ir.Node("", "Sum", [data], num_outputs=1, name=f"{node.name}_float")
        same.outputs[0].name = f"{data.name}_float"
        same.outputs[0].type, same.outputs[0].shape = data.type, data.shape
        node.replace_input_with(0, same.outputs[0])
        self.graph.insert_before(node, same)

    def _is_integer(self, producer: ir.Node) -> bool:
        """Whether a node, or the convolution it is absorbed into, runs on integers with integer output."""
        node: ir.Node | None = producer
        while node is not None and node.op_type in ("Relu", "Clip") and node not in self.placement.nodes:
            data = node.inputs[0]
            node = data.producer() if data is not None else None
        return node is not None and node in self.placement.nodes

    def _shared(self, name: str, values: np.ndarray) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = add_initializer(self.graph, free_name(self.graph, name), values)
        return self._constants[name]

    def rewrite(self, layer: NodePlan, evidence: Evidence) -> LayerOutcome:
        """Give an anchor integer weights and, where it has a bias, an integer one.

        Where the mean of its input's channels is known, the bias takes back what the weights shift.
        """
        assert layer.scheme and layer.algorithm
        node, number_format, algorithm = layer.node, layer.scheme.weights, layer.algorithm
        value, bias = node.inputs[1], input_of(node, 2)
        assert value is not None
        scale_in, hessian = self.input_scale(node), evidence.hessian(layer)
        floor = self._smallest_scale(bias, scale_in)
        key = (value, channel_axis(node), integer(node, "group", 1), number_format, algorithm)
        # Layers that share a weight share its codes, unless a bias asks for larger scales.
        if key not in self._weights or (self._weights[key][0].scales < floor).any():
            weight = integer_weight(self.graph, node, number_format, algorithm, smallest_scale=floor, hessian=hessian)
            self._weights[key] = weight, dequantized(self.graph, weight.parts, weight.axis, value)
        weight, restored = self._weights[key]
        correct_bias(self.graph, node, weight, evidence.input_mean(layer))
        bias = input_of(node, 2)
        node.replace_input_with(1, restored)
        if bias is not None:
            self._quantize_bias(node, bias, np.broadcast_to(scale_in * weight.scales, weight.channels))
        drop_unused(self.graph, value)
        return weight.outcome(layer)

    @staticmethod
    def _smallest_scale(bias: ir.Value | None, scale_in: np.float32) -> np.ndarray:
        """Scales, float32, below which a bias would not fit into 32 bits: only a channel almost without weights is."""
        values = array(bias)
        if values is None:
            return np.zeros(1, dtype=np.float32)
        return (np.abs(values.reshape(-1).astype(np.float64)) / (_BIAS_LIMIT * float(scale_in))).astype(np.float32)

    def _quantize_bias(self, node: ir.Node, bias: ir.Value, scales: np.ndarray) -> None:
        """Write a bias in units of ``scales``, float32 ``[channels]``: as the runtime multiplies the two itself."""
        values = array(bias)
        assert values is not None
        # A Gemm may add one value to all channels.
        values = np.broadcast_to(values.reshape(-1), scales.shape)
        codes = np.rint(values.astype(np.float64) / scales)
        codes = np.clip(codes, -(2**31), 2**31 - 1).astype(np.int32)
        name = bias.name or "bias"
        stored = add_initializer(self.graph, free_name(self.graph, f"{name}_quantized"), codes)
        scale = add_initializer(self.graph, free_name(self.graph, f"{name}_scale"), np.ascontiguousarray(scales))
        node.replace_input_with(2, dequantized(self.graph, [stored, scale], 0, bias))
        drop_unused(self.graph, bias)


def dequantized(graph: ir.Graph, parts: list[ir.Value], axis: int, original: ir.Value) -> ir.Value:
    """The value that codes, scale and perhaps zero point stand for, as nodes at the graph's head."""
    import onnx_ir as ir

    codes, scale = parts[:2]
    tensor = constant(scale)
    attributes = {"axis": axis} if tensor is not None and tuple(tensor.shape) else {}
    node = ir.node("DequantizeLinear", parts, attributes, name=f"{codes.name}_dequantize")
    restored = node.outputs[0]
    restored.name = f"{(codes.name or '').removesuffix('_quantized')}_dequantized"
    restored.type, restored.shape = ir.TensorType(ir.DataType.FLOAT), codes.shape
    if original.dtype in (None, ir.DataType.FLOAT):
        prepend(graph, node)
        return restored
    # Before operator set 19, float32 is all that comes out.
    cast = ir.node("Cast", [restored], {"to": original.dtype}, name=f"{restored.name}_cast")
    narrow = cast.outputs[0]
    narrow.name, narrow.type, narrow.shape = f"{restored.name}_cast", original.type, codes.shape
    prepend(graph, node, cast)
    return narrow


def _comes_from_codes(value: ir.Value) -> bool:
    """Whether operators with no other input lead from a DequantizeLinear to a value."""
    node = value.producer()
    while node is not None and node.op_type != "DequantizeLinear":
        data = _only_data(node)
        node = data.producer() if data is not None else None
    return node is not None


def _goes_into_codes(value: ir.Value) -> bool:
    """Whether operators with no other input lead from a value to a QuantizeLinear."""
    return any(
        node.op_type == "QuantizeLinear" or (_only_data(node) is value and _goes_into_codes(node.outputs[0]))
        for node in value.consumers()
    )


def _only_data(node: ir.Node) -> ir.Value | None:
    """The one input of a node that is not constant; None where there are more, and for layers with a weight."""
    data = [value for value in node.inputs if value is not None and constant(value) is None]
    return data[0] if len(data) == 1 and not is_standard(node, *_QUANTIZED_UNASKED, "MatMul") else None


def _values_in_order(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]


def _rewriter(model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence) -> Callable[[NodePlan], LayerOutcome]:
    """Quantizes the values around all the layers at once, and then the weights of each."""
    assert evidence.statistics is not None
    quantizer = StaticQuantizer(model, place(model, (layer.node for layer in layers)), evidence.statistics.range)
    quantizer.insert_pairs()
    return partial(quantizer.rewrite, evidence=evidence)


FORM = Form("static", lambda scheme: scheme.is_static, no_integer_kernel, _rewriter, integer_opset)
