"""Weights that no quantized operator takes, in 8 or 4 bits of the file: Cast and Mul make floats of them at load.

onnxruntime computes what constants alone lead to when it loads a model (it would not do so with a DequantizeLinear),
and finds the float weights that its kernels take: the file is smaller, and the speed the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quantcli import algorithms
from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, Rounding
from quantcli.errors import InputError
from quantcli.onnx.graph.operands import operand_of
from quantcli.onnx.graph.opset import NARROW_OPSET
from quantcli.onnx.graph.values import add_initializer, array, drop_unused, free_name, prepend
from quantcli.onnx.plan import nbits
from quantcli.onnx.plan.carriers import carried
from quantcli.onnx.plan.evidence import Evidence, Journal, Made
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.weights.rows import require_finite, rows_of

if TYPE_CHECKING:
    import onnx_ir as ir

#: The operator set from which on Slice takes its bounds as inputs.
_SLICE_OPSET = 10

_DTYPES = ("int8", "int4")


def _supports(layer: NodePlan, scheme: Scheme) -> str | None:
    weights, node = scheme.weights, layer.node
    if weights.dtype not in (*_DTYPES, "nf4") or weights.double_quantized:
        return f"no {weights.dtype} of this kind is stored in a graph"
    if weights.granularity.kind not in ("channel", "group", "tensor", "block"):
        return f"no scales by {weights.granularity} are stored in a graph"
    operand = operand_of(node)
    if not isinstance(operand, str) and (reason := nbits.refusal(node, operand, scheme)):
        # A plain product that the n-bit operators have no such scheme for: then nor has this form.
        return reason
    if not any(value is layer.weight for value in node.inputs):
        return "others read its weight behind the same Transpose"
    for use in layer.weight.uses():
        if layer.weight not in [each.value for each in carried(use.node)]:
            return f"its weight also serves {use.node.name or use.node.op_type}, which needs it as it is"
    return None


def _substitute(layer: NodePlan, scheme: Scheme) -> tuple[Scheme, str] | None:
    weights = scheme.weights
    if weights.dtype in _DTYPES:
        return None
    return Scheme(NumberFormat("int4", Granularity("group", weights.granularity.size))), "which no cast makes floats of"


def _rewriter(model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence) -> Callable[[NodePlan], LayerOutcome]:
    shared: dict[tuple[object, ...], tuple[ir.Value, int, Rounding]] = {}

    def rewrite(layer: NodePlan) -> LayerOutcome:
        assert layer.scheme and layer.algorithm
        key = (layer.weight, layer.summed, layer.scheme.weights, layer.algorithm)
        again = key in shared
        if not again:
            shared[key] = _store(layer, layer.scheme.weights, layer.algorithm, evidence.journal)
        restored, nbytes, rounding = shared[key]
        for index, value in enumerate(layer.node.inputs):
            if value is layer.weight:
                layer.node.replace_input_with(index, restored)
        if layer.weight.graph is not None:
            drop_unused(layer.weight.graph, layer.weight)
        return LayerOutcome.quantized(layer, 0 if again else nbytes, rounding)

    return rewrite


def _store(
    layer: NodePlan, number_format: NumberFormat, algorithm: str, journal: Journal | None
) -> tuple[ir.Value, int, Rounding]:
    """Register codes and scales beside a weight: the value they stand for, their bytes, and what rounding cost."""
    import torch

    assert layer.weight.shape is not None
    shape = layer.weight.shape.numpy()
    columns, size = math.prod(shape[axis] for axis in layer.summed), number_format.granularity.size
    if size is not None:
        # Short rows are one group.
        number_format = replace(number_format, granularity=Granularity("group", min(size, columns)))
    make = partial(_rounded, layer, number_format, algorithm)
    key = f"{layer.weight.name} {layer.summed} {number_format} {algorithm}"
    made = make() if journal is None else journal.of(key, make)
    parts = {part: torch.from_numpy(np.array(made.array(part))) for part in made.tensors}
    codes = parts["codes"]
    tensor = QuantizedTensor(codes, parts["scale"], parts.get("zero_point"), tuple(codes.shape), number_format)
    graph = _Expansion(layer.weight, shape, layer.summed)
    restored = graph.in_groups(tensor) if size is not None else graph.by_channel(tensor)
    return restored, graph.nbytes, made.rounding


def _rounded(layer: NodePlan, number_format: NumberFormat, algorithm: str) -> Made:
    """Codes of a weight as rows of what is summed, the last group filled up."""
    import torch

    from quantcli.core import numerics

    weight = array(layer.weight)
    assert weight is not None
    weight = _in_float32(weight, layer.weight.name)
    rows = torch.from_numpy(np.ascontiguousarray(rows_of(weight, layer.summed)))
    size = number_format.granularity.size
    if size is not None:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % size))
    tensor = algorithms.rounding(algorithm).run(rows, number_format, torch.float32)
    signal, noise = numerics.error_powers(numerics.in_groups(rows, number_format), tensor)
    tensors = {"codes": np.asarray(tensor.codes), "scale": np.asarray(tensor.scale)}
    if tensor.zero_point is not None:
        tensors["zero_point"] = np.asarray(tensor.zero_point)
    return Made(tensors, Rounding(algorithm, signal=signal, noise=noise))


def _in_float32(weight: np.ndarray, name: str | None) -> np.ndarray:
    """A weight of any precision. Raises InputError where its numbers are not finite, or none that float32 has."""
    require_finite(weight, name)
    with np.errstate(over="ignore", under="ignore"):
        narrow = weight.astype(np.float32)
    largest = np.abs(weight).max(initial=0)
    if not np.isfinite(narrow).all() or 0 < largest < np.finfo(np.float32).tiny:
        raise InputError(
            f"{name} holds numbers as large as {largest:.3g}, beyond what float32 scales can stand for.",
            "Leave the layer out with --skip.",
        )
    return narrow


class _Expansion:
    """Writes the nodes that make floats of codes, at the head of the graph that holds the weight."""

    def __init__(self, weight: ir.Value, shape: tuple[int, ...], summed: tuple[int, ...]) -> None:
        assert weight.graph is not None
        self.graph, self.weight, self.shape, self.summed = weight.graph, weight, shape, summed
        self.nodes: list[ir.Node] = []
        self.nbytes = 0

    def by_channel(self, tensor: QuantizedTensor) -> ir.Value:
        """Codes in the weight's own shape, with scales that are spread over the dimensions that are summed."""
        rest = [axis for axis in range(len(self.shape)) if axis not in self.summed]
        moved = [self.shape[axis] for axis in (*rest, *self.summed)]
        order = np.argsort((*rest, *self.summed))
        spread = [1 if axis in self.summed else size for axis, size in enumerate(self.shape)]

        def shaped(values: np.ndarray, to: Sequence[int]) -> np.ndarray:
            # A single value, or one for each row.
            return values.reshape([1] * len(to)) if values.size == 1 else values.reshape(to)

        codes = np.ascontiguousarray(np.asarray(tensor.codes).reshape(moved).transpose(order))
        zero_point = None if tensor.zero_point is None else shaped(np.asarray(tensor.zero_point), spread)
        value = self._floats(codes, shaped(np.asarray(tensor.scale), spread), zero_point, tensor.number_format)
        return self._finished(value)

    def in_groups(self, tensor: QuantizedTensor) -> ir.Value:
        """Codes as rows of groups; what was added to fill the last group is cut off again."""
        rest = [axis for axis in range(len(self.shape)) if axis not in self.summed]
        moved = [self.shape[axis] for axis in (*rest, *self.summed)]
        columns = int(np.prod([self.shape[axis] for axis in self.summed]))
        size = tensor.number_format.granularity.size or columns
        rows, filled = tensor.codes.shape
        codes = np.asarray(tensor.codes).reshape(rows, filled // size, size)
        zero_point = None if tensor.zero_point is None else np.asarray(tensor.zero_point)[..., None]
        value = self._floats(codes, np.asarray(tensor.scale)[..., None], zero_point, tensor.number_format)
        if filled != columns:
            value = self._node("Reshape", value, self._constant("rows", np.array([rows, filled])))
            bounds = [self._constant(part, np.array([at])) for part, at in (("from", 0), ("to", columns), ("axis", 1))]
            value = self._node("Slice", value, *bounds)
        value = self._node("Reshape", value, self._constant("shape", np.array(moved)))
        order = [int(axis) for axis in np.argsort((*rest, *self.summed))]
        if order != sorted(order):
            value = self._node("Transpose", value, perm=order)
        return self._finished(value)

    def _floats(
        self, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, number_format: NumberFormat
    ) -> ir.Value:
        import onnx_ir as ir

        value = self._node("Cast", self._integers("quantized", codes, number_format.bits), to=ir.DataType.FLOAT)
        if zero_point is not None:
            zero = self._node(
                "Cast", self._integers("zero_point", zero_point, number_format.bits), to=ir.DataType.FLOAT
            )
            value = self._node("Sub", value, zero)
        return self._node("Mul", value, self._constant("scale", np.ascontiguousarray(scale, np.float32)))

    def _finished(self, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        dtype = self.weight.dtype or ir.DataType.FLOAT
        if dtype != ir.DataType.FLOAT:
            value = self._node("Cast", value, to=dtype)
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(self.shape)
        prepend(self.graph, *self.nodes)
        return value

    def _node(self, operator: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        import onnx_ir as ir

        name = f"{self.weight.name}_{operator.lower()}_{len(self.nodes)}"
        node = ir.node(operator, list(inputs), attributes, name=name)  # type: ignore[arg-type]
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def _integers(self, part: str, codes: np.ndarray, bits: int) -> ir.Value:
        import onnx_ir as ir

        if bits == 8:
            return self._constant(part, np.ascontiguousarray(codes, np.int8))
        name = free_name(self.graph, f"{self.weight.name}_{part}")
        narrow = ir.tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name=name)
        self.nbytes += narrow.nbytes
        return add_initializer(self.graph, name, narrow)

    def _constant(self, part: str, values: np.ndarray) -> ir.Value:
        self.nbytes += values.nbytes
        return add_initializer(self.graph, free_name(self.graph, f"{self.weight.name}_{part}"), values)


FORM = Form(
    "weights",
    lambda scheme: scheme.inputs is None and not scheme.weights.is_cast,
    _supports,
    _rewriter,
    lambda layer: NARROW_OPSET if layer.scheme and layer.scheme.weights.bits == 4 else _SLICE_OPSET,
    _substitute,
)
