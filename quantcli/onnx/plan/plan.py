"""A graph's plan: one decision per node with a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.algorithms import default_rounding
from quantcli.core.dtypes import DTYPE_OF_ONNX_NAME
from quantcli.core.scheme import Scheme
from quantcli.core.tensors import Rounding, TensorInfo
from quantcli.errors import InputError
from quantcli.onnx.graph.casts import keeps_codes, stored_bytes
from quantcli.onnx.graph.values import constant, input_of
from quantcli.onnx.plan.carriers import Carried, carried
from quantcli.onnx.plan.forms import form
from quantcli.onnx.plan.layer_inputs import LayerInput
from quantcli.onnx.plan.placement import observed_values
from quantcli.planning.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

#: Operators that say that a model is quantized already.
QUANTIZED_OPS = {
    "QDQ": ("QuantizeLinear", "DequantizeLinear"),
    "QOperator": (
        "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM", "QAttention", "QEmbedLayerNormalization",
    ),
    "n-bit": ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QMoE"),
}  # fmt: skip


@dataclass(frozen=True)
class NodePlan:
    """What happens to one node's weight.

    ``data`` names what meets the weight, where calibration knows it; ``form`` is one of `quantcli.onnx.plan.forms`,
    None: float; ``reason`` says why it stays so, ``note`` tells of a choice; ``input`` is what gptq must know the
    inputs of. ``summed`` are the dimensions of the weight that its products are summed over.
    """

    node: ir.Node
    weight: ir.Value
    info: TensorInfo
    role: str
    data: str | None
    form: str | None = None
    scheme: Scheme | None = None
    label: str = ""
    algorithm: str | None = None
    reason: str | None = None
    note: str | None = None
    input: LayerInput | None = None
    summed: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The layer's name in reports: that of its weight."""
        return self.info.name

    @property
    def mode(self) -> str:
        """How the weight is carried, as reports and manifests say it."""
        return form(self.form).mode if self.form else "float"

    @property
    def stored_bytes(self) -> int:
        """What the weight takes in the model's file."""
        stored = (stored_bytes(value) for value in self.node.inputs if value is not None and value.name == self.name)
        return next((nbytes for nbytes in stored if nbytes is not None), self.info.nbytes)

    @property
    def estimated_bytes(self) -> int:
        """What the weight will take, near enough: codes, and four bytes for each scale."""
        if self.scheme is None:
            return self.stored_bytes
        weights = self.scheme.weights
        codes = self.info.numel * weights.bits // 8
        if weights.is_cast:
            return codes
        size = weights.granularity.size or max(1, self.info.columns)
        return codes + 4 * (self.info.numel // size)

    def rounded_plainly(self, reason: str) -> NodePlan:
        """The same node, quantized without data in place of gptq, and why."""
        assert self.scheme is not None
        algorithm = default_rounding(self.scheme.weights)
        note = f"{algorithm} in place of gptq: {reason}"
        return replace(self, algorithm=algorithm, input=None, note=f"{self.note}; {note}" if self.note else note)

    def left(self, reason: str) -> NodePlan:
        """The same node, left in floating point."""
        return replace(self, form=None, scheme=None, label="", algorithm=None, input=None, reason=reason)


@dataclass(frozen=True)
class LayerOutcome:
    """What became of one layer, and its weight's size in bytes; ``rounding`` is None where that stayed as it was.

    ``decoded`` gives what the codes stand for, in the weight's own shape; None where a form does not tell.
    """

    plan: NodePlan
    bytes_after: int
    rounding: Rounding | None = None
    decoded: Callable[[], np.ndarray] | None = None

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise of the weight."""
        return self.rounding.sqnr_db if self.rounding else None

    @staticmethod
    def quantized(
        plan: NodePlan,
        bytes_after: int,
        rounding: Rounding,
        note: str | None = None,
        decoded: Callable[[], np.ndarray] | None = None,
    ) -> LayerOutcome:
        """With the plan that was carried out in the end: its algorithm, and all that is to be said of it."""
        notes = "; ".join(filter(None, (plan.note, note, rounding.note))) or None
        return LayerOutcome(replace(plan, algorithm=rounding.algorithm, note=notes), bytes_after, rounding, decoded)


@dataclass(frozen=True)
class GraphPlan:
    """The whole conversion."""

    nodes: tuple[NodePlan, ...]
    scheme: str
    recipe: Recipe
    warnings: tuple[str, ...] = field(default=())
    damping: float | None = None

    @property
    def algorithm(self) -> str:
        """All algorithms that choose codes."""
        return " and ".join(sorted({node.algorithm for node in self.nodes if node.algorithm})) or "cast"

    @property
    def needs_inputs(self) -> bool:
        """Whether a layer is quantized by what its inputs are."""
        return any(node.input for node in self.nodes)

    def of_mode(self, *modes: str) -> list[NodePlan]:
        """Nodes of these modes, in graph order."""
        return [node for node in self.nodes if node.mode in modes]

    def carried_out(self, outcomes: Iterable[LayerOutcome]) -> GraphPlan:
        """The plan as it was carried out, with warnings of what did not go as planned."""
        outcomes = list(outcomes)
        deviations = counted(outcome.rounding.note for outcome in outcomes if outcome.rounding)
        nodes = tuple(outcome.plan for outcome in outcomes)
        return replace(self, nodes=nodes, warnings=(*self.warnings, *deviations))

    @property
    def saved_bytes(self) -> int:
        """What the plan saves, near enough; a weight that several nodes share is counted once."""
        by_weight = {node.name: node for node in reversed(self.nodes)}
        return sum(node.stored_bytes - node.estimated_bytes for node in by_weight.values())


def counted(notes: Iterable[str | None]) -> list[str]:
    """A sentence for each note, with the number of layers it is about."""
    counts = Counter(sorted(note for note in notes if note))
    return [f"{count} {'layer' if count == 1 else 'layers'}: {note}." for note, count in counts.items()]


def observed_tensors(model: ir.Model) -> list[str]:
    """Names of the values whose ranges static quantization may ask for."""
    return [value.name for value in observed_values(model) if value.name]


def graph_quantization(model: ir.Model) -> str | None:
    """``QDQ``, ``QOperator``, ``n-bit`` or ``Cast`` (of codes) where a graph is quantized, if in part, else None."""
    present = {node.op_type for node in model.graph.all_nodes()}
    found = next((kind for kind, ops in QUANTIZED_OPS.items() if present & set(ops)), None)
    if found is None and any(keeps_codes(node) is False for node in model.graph.all_nodes()):
        return "Cast"
    return found


def weighted_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, Carried]]:
    """Nodes with a constant float matrix, image filter or table, and that weight: one pair for each."""
    for node in model.graph.all_nodes():
        for weight in carried(node):
            yield node, weight


def undecided(model: ir.Model, node: ir.Node, weight: Carried, file: Path) -> NodePlan:
    """A node and its weight before anything is decided: float."""
    other = input_of(node, 0 if weight.index else 1)
    # Calibration sees what the graph itself computes; bodies may call their values by the same names.
    seen = other is not None and node.graph is model.graph and constant(other) is None
    data = other.name if other is not None and seen else None
    return NodePlan(node, weight.value, tensor_info(weight.value, file), weight.role, data, summed=weight.summed)


def require_work(plan: GraphPlan, file: Path) -> None:
    """Raise InputError where a plan leaves everything as it is."""
    if any(node.form for node in plan.nodes):
        return
    reasons = sorted({node.reason for node in plan.nodes if node.reason})
    why = f": {'; '.join(reasons)}" if reasons else ", since no layer of it reads a constant weight"
    raise InputError(f"{plan.scheme} applies to nothing in {file}{why}.", "Choose another scheme.")


def tensor_info(value: ir.Value, file: Path) -> TensorInfo:
    """A constant as the other checkpoints describe their tensors."""
    tensor = constant(value)
    assert tensor is not None
    dtype = DTYPE_OF_ONNX_NAME.get(tensor.dtype.name, tensor.dtype.name)
    return TensorInfo(value.name or "", tuple(tensor.shape.numpy()), dtype, tensor.nbytes, file)
