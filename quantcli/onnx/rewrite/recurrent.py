"""LSTMs on integers: onnxruntime's DynamicQuantizeLSTM, whose inputs and states get their ranges at inference.

Its weights are stored turned, ``[directions, inputs, gates]``, with a scale for each output of a gate or one for each
direction. The operator is documented in onnxruntime's docs/ContribOperators.md; of GRU and RNN there is no such one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantcli import algorithms
from quantcli.core.scheme import Granularity, Scheme
from quantcli.core.tensors import Rounding
from quantcli.onnx.graph.values import add_initializer, array, constant, drop_unused, free_name, integer, is_standard
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.weights.rows import require_finite, rows_of
from quantcli.onnx.weights.saturation import largest_pairs

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN = "com.microsoft"

#: Attributes that both operators have.
_ATTRIBUTES = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget")

#: Inputs of an LSTM: input, W, R, bias, lengths, first state, first cell, peepholes.
_INPUTS = 8

#: A scale for each output of a gate costs a tenth of the time of a single row where the products of a step are small.
#: Of the recurrent weight it is taken where it lessens the noise by more than this.
_WORTHWHILE_DB = 1.0


@dataclass(frozen=True)
class _Codes:
    """A weight as the kernel takes it, and what was said of it."""

    values: tuple[ir.Value, ir.Value, ir.Value]
    nbytes: int
    rounding: Rounding
    note: str | None


def _supports(layer: NodePlan, scheme: Scheme) -> str | None:
    node = layer.node
    if not is_standard(node, "LSTM"):
        return f"onnxruntime has no integer {node.op_type}"
    if scheme.weights.bits != 8 or not scheme.weights.symmetric:
        return f"onnxruntime's integer LSTM has no {scheme.weights}"
    if scheme.weights.granularity.kind not in ("channel", "tensor"):
        return f"onnxruntime's integer LSTM has no scales by {scheme.weights.granularity}"
    if integer(node, "layout", 0):
        return "onnxruntime's integer LSTM takes the sequence first, and this one the batch"
    weights = [constant(value) for value in node.inputs[1:3]]
    if any(weight is None or weight.dtype.name != "FLOAT" or len(weight.shape) != 3 for weight in weights):
        return "onnxruntime's integer LSTM wants both weights constant, and float32"
    return "both its weights are one constant" if node.inputs[1] is node.inputs[2] else None


def _rewriter(model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence) -> Callable[[NodePlan], LayerOutcome]:
    """Quantizes the two weights of a node one after the other, and replaces the node with the second."""
    shared: dict[tuple[object, ...], _Codes] = {}
    ready: dict[ir.Node, dict[ir.Value, _Codes]] = {}

    def rewrite(layer: NodePlan) -> LayerOutcome:
        assert layer.scheme and layer.algorithm
        node, recurrent = layer.node, layer.weight is layer.node.inputs[2]
        key = (layer.weight, layer.scheme.weights, layer.algorithm, recurrent)
        again = key in shared
        if not again:
            shared[key] = _quantized(layer, recurrent)
        codes = shared[key]
        ready.setdefault(node, {})[layer.weight] = codes
        if len(ready[node]) == 2:
            _replace(model, node, ready.pop(node))
        return LayerOutcome.quantized(layer, 0 if again else codes.nbytes, codes.rounding, codes.note)

    return rewrite


def _quantized(layer: NodePlan, recurrent: bool) -> _Codes:
    """Codes ``[directions, inputs, gates]``, scales and zero points ``[directions, gates]`` or ``[directions]``."""
    import torch

    from quantcli.core import numerics

    assert layer.scheme and layer.algorithm
    weight, graph = array(layer.weight), layer.weight.graph
    assert weight is not None and graph is not None
    require_finite(weight, layer.weight.name)
    number_format = replace(layer.scheme.weights, granularity=Granularity("channel"), narrow=True)

    def run(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
        rows = torch.from_numpy(np.array(matrix, np.float32, order="C"))
        tensor = algorithms.rounding(layer.algorithm or "").run(rows, number_format, torch.float32)
        signal, noise = numerics.error_powers(numerics.in_groups(rows, number_format), tensor)
        return np.asarray(tensor.codes), np.asarray(tensor.scale).reshape(-1), signal, noise

    directions, gates, inputs = weight.shape
    per_channel = run(rows_of(weight, (2,)))
    codes, scales, signal, noise = per_channel
    shape: tuple[int, ...] = (directions, gates)
    if recurrent or layer.scheme.weights.granularity.kind == "tensor":
        whole = run(weight.reshape(directions, -1))
        asked = layer.scheme.weights.granularity.kind == "tensor"
        if asked or whole[3] <= noise * 10 ** (_WORTHWHILE_DB / 10):
            codes, scales, signal, noise = whole
            shape = (directions,)
    codes = codes.reshape(directions, gates, inputs)
    note = None
    if (largest_pairs(rows_of(codes, (2,))) > 128).any():
        note = "on x86 processors without VNNI, sums of two products may saturate, as in onnxruntime's own LSTM"
    if len(shape) == 1:
        note = "; ".join(filter(None, ("one scale for each direction: as precise, and faster", note)))
    name = layer.weight.name or "weight"
    parts = {
        "quantized": np.ascontiguousarray(codes.transpose(0, 2, 1)),
        "scale": np.ascontiguousarray(scales.reshape(shape), np.float32),
        "zero_point": np.zeros(shape, np.int8),
    }
    stored = [add_initializer(graph, free_name(graph, f"{name}_{part}"), values) for part, values in parts.items()]
    nbytes = sum(values.nbytes for values in parts.values())
    rounding = Rounding(layer.algorithm, signal=signal, noise=noise)
    return _Codes((stored[0], stored[1], stored[2]), nbytes, rounding, note)


def _replace(model: ir.Model, node: ir.Node, codes: dict[ir.Value, _Codes]) -> None:
    import onnx_ir as ir

    inputs = [*node.inputs, *[None] * (_INPUTS - len(node.inputs))]
    (data, weight, recurrent), rest = inputs[:3], inputs[3:]
    assert weight is not None and recurrent is not None and node.graph is not None
    (w, w_scale, w_zero), (r, r_scale, r_zero) = codes[weight].values, codes[recurrent].values
    attributes = [node.attributes[name] for name in _ATTRIBUTES if name in node.attributes]
    replaced = ir.Node(
        _DOMAIN,
        "DynamicQuantizeLSTM",
        [data, w, r, *rest, w_scale, w_zero, r_scale, r_zero],
        attributes,
        num_outputs=len(node.outputs),
        name=node.name,
    )
    names = [output.name for output in node.outputs]
    for new, old in zip(replaced.outputs, node.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [replaced], list(node.outputs), list(replaced.outputs)
    )
    for new, name in zip(replaced.outputs, names, strict=True):
        new.name = name
    for value in (weight, recurrent):
        if value.graph is not None:
            drop_unused(value.graph, value)
    model.opset_imports.setdefault(_DOMAIN, 1)


FORM = Form(
    "dynamic",
    lambda scheme: scheme.inputs is not None,
    _supports,
    _rewriter,
)
