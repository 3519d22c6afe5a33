"""Which kernels onnxruntime really runs a graph with, read from the graph that it optimizes for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.models.pieces import pieces_of
from quantcli.models.session import onnxruntime, session_of
from quantcli.onnx.graph.model import load_graph
from quantcli.system.files import temporary_folder

#: Operators of an optimized graph that compute on integers, or on codes they expand as they go.
INTEGER_KERNELS = frozenset(
    (
        "QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "ConvInteger", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool",
        "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearWhere", "QAttention", "DynamicQuantizeLSTM",
        "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QMoE", "QEmbedLayerNormalization",
    )
)  # fmt: skip

#: Operators that do most of a model's work, by the names they have when they stay float.
FLOAT_KERNELS = frozenset(
    (
        "Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Gather", "LSTM", "GRU",
        "RNN", "Einsum", "Attention",
    )
)  # fmt: skip

_PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Proof:
    """Kernels of a loaded model by operator type, and names of the heavy nodes that stayed float."""

    runtime: str
    kernels: dict[str, int]
    floating: dict[str, list[str]] = field(default_factory=dict)

    @property
    def integer(self) -> dict[str, int]:
        """How many nodes of each integer kernel."""
        return {name: count for name, count in self.kernels.items() if name in INTEGER_KERNELS}

    @property
    def conversions(self) -> int:
        """QuantizeLinear and DequantizeLinear nodes that the runtime did not fuse away."""
        return sum(self.kernels.get(name, 0) for name in _PAIR)

    def to_json(self) -> dict[str, Any]:
        """For the manifest and the report."""
        return {
            "runtime": self.runtime,
            "integer_kernels": self.integer,
            "float_kernels": {name: len(nodes) for name, nodes in self.floating.items()},
            "conversions_left": self.conversions,
        }


def prove(path: Path, name: str | None = None) -> Proof:
    """Load a model into onnxruntime and read back the graph that it will run; ``name`` is what errors call it.

    Raises:
        InputError: the runtime cannot load the model.
    """
    version = f"onnxruntime {onnxruntime().__version__}"
    kernels, floating = Counter[str](), dict[str, list[str]]()
    with temporary_folder() as folder:
        for dump in _optimized(path, Path(folder), name):
            graph = load_graph(dump).graph
            kernels.update(node.op_type for node in graph.all_nodes())
            for node in graph.all_nodes():
                if node.op_type in FLOAT_KERNELS and _is_heavy(node):
                    floating.setdefault(node.op_type, []).append(node.name or node.outputs[0].name or "")
    return Proof(version, dict(sorted(kernels.items())), dict(sorted(floating.items())))


def _optimized(path: Path, folder: Path, name: str | None) -> Iterator[Path]:
    """What the runtime makes of a model, or of its pieces, as files in a folder."""
    if pieces := pieces_of(path, name=name):
        yield from pieces.dumps(folder)
        return
    dump = folder / "optimized.onnx"
    session_of(path, dump=dump, name=name)
    yield dump


def _is_heavy(node: Any) -> bool:
    """Whether a node reads a constant matrix of floats, or of codes expanded before it: activations are no weights."""
    return any(value is not None and _is_float_matrix(value) for value in node.inputs)


def _is_float_matrix(value: Any) -> bool:
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        codes = producer.inputs[0].const_value
        return codes is not None and len(codes.shape) > 1
    tensor = value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 1
