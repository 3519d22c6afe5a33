"""A graph's plan: one decision per node with a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantcli.algorithms import default_rounding
from quantcli.core.dtypes import DTYPE_OF_ONNX_NAME
from quantcli.core.scheme import Scheme
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError
from quantcli.onnx.graph.operands import behind_transposes
from quantcli.onnx.graph.values import constant, input_of, is_standard
from quantcli.onnx.plan.layer_inputs import LayerInput
from quantcli.onnx.plan.placement import observed_values
from quantcli.planning.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

#: How a weight is carried: integers with calibrated or found ranges, codes that are expanded, or a narrower float.
Mode = Literal["static", "dynamic", "weights", "cast", "float"]

#: Operators with a weight, and where it stands among the inputs.
_WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
_ROLES = {"Conv": "conv", "ConvTranspose": "conv", "Gemm": "linear", "MatMul": "linear", "Gather": "embedding"}

#: Operators that say that a model is quantized already.
QUANTIZED_OPS = {
    "QDQ": ("QuantizeLinear", "DequantizeLinear"),
    "QOperator": ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"),
    "n-bit": ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"),
}


@dataclass(frozen=True)
class NodePlan:
    """What happens to one node's weight.

    ``reason`` says why it stays float, ``note`` tells of a choice; ``input`` is what gptq must know the inputs of.
    """

    node: ir.Node
    weight: ir.Value
    info: TensorInfo
    role: str
    mode: Mode
    scheme: Scheme | None = None
    label: str = ""
    algorithm: str | None = None
    reason: str | None = None
    note: str | None = None
    input: LayerInput | None = None

    @property
    def name(self) -> str:
        """The layer's name in reports: that of its weight."""
        return self.info.name

    @property
    def estimated_bytes(self) -> int:
        """What the weight will take, near enough: codes, and four bytes for each scale."""
        if self.scheme is None:
            return self.info.nbytes
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
        return replace(self, mode="float", scheme=None, label="", algorithm=None, input=None, reason=reason)


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

    def of_mode(self, *modes: Mode) -> list[NodePlan]:
        """Nodes of these modes, in graph order."""
        return [node for node in self.nodes if node.mode in modes]

    @property
    def saved_bytes(self) -> int:
        """What the plan saves, near enough; a weight that several nodes share is counted once."""
        by_weight = {node.name: node for node in reversed(self.nodes)}
        return sum(node.info.nbytes - node.estimated_bytes for node in by_weight.values())


def counted(notes: Iterable[str | None]) -> list[str]:
    """A sentence for each note, with the number of layers it is about."""
    counts = Counter(sorted(note for note in notes if note))
    return [f"{count} {'layer' if count == 1 else 'layers'}: {note}." for note, count in counts.items()]


def observed_tensors(model: ir.Model) -> list[str]:
    """Names of the values whose ranges static quantization may ask for."""
    return [value.name for value in observed_values(model) if value.name]


def graph_quantization(model: ir.Model) -> str | None:
    """``QDQ``, ``QOperator`` or ``n-bit`` where a graph is quantized already, else None."""
    present = {node.op_type for node in model.graph.all_nodes()}
    return next((kind for kind, ops in QUANTIZED_OPS.items() if present & set(ops)), None)


def weighted_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Nodes with a constant float matrix, image filter or table, and that weight."""
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        if not is_standard(node, *_WEIGHT_INPUT):
            continue
        value = input_of(node, _WEIGHT_INPUT[node.op_type])
        if is_standard(node, "MatMul", "Gemm"):
            value, _ = behind_transposes(value)
        tensor = constant(value)
        floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if value is not None and tensor is not None and tensor.dtype in floats and len(tensor.shape) > 1:
            yield node, value


def undecided(node: ir.Node, value: ir.Value, file: Path) -> NodePlan:
    """A node and its weight before anything is decided: float."""
    return NodePlan(node, value, tensor_info(value, file), _ROLES[node.op_type], "float")


def require_work(plan: GraphPlan, file: Path) -> None:
    """Raise InputError where a plan leaves everything as it is."""
    if plan.of_mode("static", "dynamic", "weights", "cast"):
        return
    reasons = sorted({node.reason for node in plan.nodes if node.reason})
    why = f": {'; '.join(reasons)}" if reasons else ", since it has no weights"
    raise InputError(f"{plan.scheme} applies to nothing in {file}{why}.", "Choose another scheme.")


def tensor_info(value: ir.Value, file: Path) -> TensorInfo:
    """A constant as the other checkpoints describe their tensors."""
    tensor = constant(value)
    assert tensor is not None
    dtype = DTYPE_OF_ONNX_NAME.get(tensor.dtype.name, tensor.dtype.name)
    return TensorInfo(value.name or "", tuple(tensor.shape.numpy()), dtype, tensor.nbytes, file)
