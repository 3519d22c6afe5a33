"""Carrying out a plan on a graph: static, dynamic, weight-only and cast nodes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from quantcli.core.scheme import Scheme
from quantcli.core.tensors import Hessian, QuantizedTensor
from quantcli.onnx.graph.values import drop_unused
from quantcli.onnx.plan.judge import Hessians, Statistics
from quantcli.onnx.plan.placement import Placement, place
from quantcli.onnx.plan.plan import GraphPlan, NodePlan
from quantcli.onnx.rewrite import nbits
from quantcli.onnx.rewrite.bias_correction import correct_bias, output_shift
from quantcli.onnx.rewrite.cast import cast_weights
from quantcli.onnx.rewrite.dynamic import DynamicQuantizer
from quantcli.onnx.rewrite.qdq import StaticQuantizer, dequantized
from quantcli.onnx.weights.integer import IntegerWeight, channel_axis, integer_weight

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


class Codes(Protocol):
    """Codes that exist already."""

    def of(self, node: NodePlan) -> QuantizedTensor:
        """Those of a node's weight, in the groups of its scheme."""


@dataclass(frozen=True)
class LayerOutcome:
    """What became of one layer, sizes in bytes; ``warning`` is what did not go as planned."""

    plan: NodePlan
    bytes_after: int
    sqnr_db: float | None
    warning: str | None = None


def transform(
    model: ir.Model,
    plan: GraphPlan,
    statistics: Statistics | None,
    placement: Placement | None = None,
    hessians: Hessians | None = None,
    given: Codes | None = None,
) -> list[LayerOutcome]:
    """Rewrite a prepared graph in place.

    Args:
        model: the graph.
        plan: made for this very graph, in the operator set `needed_opset`.
        statistics: needed where a node is static.
        placement: that of the plan's static nodes, where it is known already.
        hessians: needed where a node is quantized by gptq.
        given: the codes of weight-only nodes, where they are not to be chosen.
    """
    from onnx_ir.passes import common

    outcomes: dict[int, LayerOutcome] = {}
    # Asked now, while every node reads the value that was calibrated.
    means = {id(node): _input_mean(node, statistics) for node in plan.of_mode("static", "weights")}

    def hessian(node: NodePlan) -> Hessian | None:
        if node.input is None:
            return None
        assert hessians is not None
        return hessians.of(node)

    def done(node: NodePlan, weight: IntegerWeight) -> None:
        narrowed = None
        if weight.narrowed:
            narrowed = f"{weight.narrowed} of {max(len(weight.scales), 1)} channels narrowed: no product can saturate"
        became = replace(node, algorithm=weight.algorithm, note=_joined(node.note, narrowed, weight.note))
        outcomes[id(node)] = LayerOutcome(became, weight.nbytes, weight.sqnr_db, weight.note)

    static = plan.of_mode("static")
    if static:
        assert statistics is not None
        quantizer = StaticQuantizer(model, placement or place(model, (node.node for node in static)), statistics.range)
        quantizer.insert_pairs()
        for node in static:
            assert node.scheme and node.algorithm
            weights, mean = node.scheme.weights, means[id(node)]
            done(node, quantizer.quantize_weight(node.node, weights, node.algorithm, mean, hessian(node)))
    dynamic = DynamicQuantizer(model)
    for node in plan.of_mode("dynamic"):
        assert node.scheme and node.algorithm
        done(node, dynamic.quantize_node(node.node, node.scheme.weights, node.algorithm, hessian(node)))
    weight_only = _WeightOnly(model, given)
    for node in plan.of_mode("weights"):
        outcomes[id(node)] = weight_only.quantize_node(node, means[id(node)], hessian(node))
    for dtype in ("fp16", "bf16"):
        outcomes |= _cast(
            model, [n for n in plan.of_mode("cast") if n.scheme and n.scheme.weights.dtype == dtype], dtype
        )
    model.graph.sort()
    # Our names for scales and codes may be those of the model's own values.
    common.NameFixPass()(model)
    return [outcomes.get(id(node)) or LayerOutcome(node, node.info.nbytes, None) for node in plan.nodes]


def _input_mean(node: NodePlan, statistics: Statistics | None) -> np.ndarray | None:
    """Means of a layer's input channels, for the layers whose biases are corrected: only theirs were observed."""
    data = node.node.inputs[0]
    corrected = node.node.op_type == "Conv" or (node.node.op_type == "Gemm" and node.mode == "static")
    if statistics is None or not corrected or data is None or data.name is None:
        return None
    return statistics.channel_mean(data.name)


class _WeightOnly:
    """Weights alone: n-bit operators, and int8 convolutions that are expanded when they run."""

    def __init__(self, model: ir.Model, given: Codes | None) -> None:
        self.model, self.given = model, given
        self._expanded: dict[tuple[ir.Value, int], tuple[IntegerWeight, ir.Value]] = {}

    def quantize_node(self, node: NodePlan, mean: np.ndarray | None, hessian: Hessian | None) -> LayerOutcome:
        """Rewrite one node; a convolution's bias is corrected where the ``mean`` of its input is known."""
        assert node.scheme and node.algorithm
        if node.role == "conv":
            return self._expand(node, node.scheme, node.algorithm, mean, hessian)
        given = self.given.of(node) if self.given else None
        outcome = nbits.quantize_node(self.model, node.node, node.scheme, node.algorithm, hessian=hessian, given=given)
        became = replace(node, algorithm=outcome.algorithm, note=_joined(node.note, outcome.note))
        return LayerOutcome(became, outcome.bytes_after, outcome.sqnr_db, outcome.warning)

    def _expand(
        self, node: NodePlan, scheme: Scheme, algorithm: str, mean: np.ndarray | None, hessian: Hessian | None
    ) -> LayerOutcome:
        graph, key = self.model.graph, (node.weight, channel_axis(node.node))
        known = key in self._expanded
        if not known:
            weight = integer_weight(graph, node.node, scheme.weights, algorithm, exact=False, hessian=hessian)
            parts = [weight.codes, weight.scale, weight.zero_point]
            self._expanded[key] = weight, dequantized(graph, parts, weight.axis, node.weight)
        weight, restored = self._expanded[key]
        shift = None if mean is None else output_shift(node.node, weight, mean)
        if shift is not None:
            correct_bias(graph, node.node, shift)
        node.node.replace_input_with(1, restored)
        drop_unused(graph, node.weight)
        became = replace(node, algorithm=weight.algorithm, note=_joined(node.note, weight.note))
        return LayerOutcome(became, 0 if known else weight.nbytes, weight.sqnr_db, weight.note)


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def _cast(model: ir.Model, nodes: Sequence[NodePlan], dtype: str) -> dict[int, LayerOutcome]:
    if not nodes:
        return {}
    names = {node.name for node in nodes}
    by_name = {outcome.name: outcome for outcome in cast_weights(model, dtype, only=lambda value: value.name in names)}
    outcomes = {}
    for node in nodes:
        outcome = by_name[node.name]
        became = node.left(outcome.note) if outcome.note else node
        outcomes[id(node)] = LayerOutcome(became, outcome.bytes_after, outcome.sqnr_db)
    return outcomes
