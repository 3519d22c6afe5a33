"""Proof from the runtime itself: its own optimized graph says which kernels an artifact really runs on."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from quantcli.errors import InputError
from quantcli.samples import Sample
from quantcli.sessions import Session, onnxruntime

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
    ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Gather")
)

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


def prove(path: Path) -> Proof:
    """Load a model into onnxruntime and read back the graph that it will run.

    Raises:
        InputError: the runtime cannot load the model.
    """
    import onnx_ir as ir

    version = f"onnxruntime {onnxruntime().__version__}"
    with tempfile.TemporaryDirectory(prefix="quantcli-") as folder:
        dump = Path(folder) / "optimized.onnx"
        Session(path, dump=dump)
        graph = ir.load(dump).graph
        kernels = Counter(node.op_type for node in graph.all_nodes())
        floating: dict[str, list[str]] = {}
        for node in graph.all_nodes():
            if node.op_type in FLOAT_KERNELS and _is_heavy(node):
                floating.setdefault(node.op_type, []).append(node.name or node.outputs[0].name or "")
    return Proof(version, dict(sorted(kernels.items())), dict(sorted(floating.items())))


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


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples: signal to noise of all float outputs together, and how long they took.

    ``speed``: the reference's median time over the candidate's. A hint only, since nothing was warmed up or
    repeated; None for a single sample.
    """

    samples: int
    sqnr_db: float | None
    speed: float | None


class OutputComparison:
    """Candidates against one reference on the first samples.

    The reference runs once; its outputs are kept in a folder, since those of a language model may not fit in memory.
    """

    def __init__(self, reference: Path, samples: Iterable[Sample], most: int, folder: Path) -> None:
        self.reference, self.samples, self.most, self.folder = reference, samples, most, folder
        self._kept: list[list[str]] = []

    def against(self, candidate: Path) -> Comparison:
        """Run a candidate; the first one in turn with the reference, so that ``speed`` is known of that one alone.

        Raises:
            InputError: a model does not run, or the candidate's outputs are not finite where the reference's are.
        """
        import numpy as np

        from quantcli.numerics import decibels

        session = Session(candidate)
        reference = None if self._kept else Session(self.reference)
        signal = noise = 0.0
        times: list[tuple[float, float]] = []
        samples = 0
        for number, sample in enumerate(islice(self.samples, self.most)):
            samples += 1
            if reference is None:
                expected, got = self._load(number), session.run(sample.inputs)
            else:
                (outputs, ours), (got, theirs) = (_timed(each, sample) for each in (reference, session))
                expected = self._keep(outputs)
                times.append((ours, theirs))
            for name, values in expected.items():
                wide, other = values.astype(np.float64), got[name].astype(np.float64)
                finite = np.isfinite(wide)
                if not np.isfinite(other[finite]).all():
                    raise InputError(f"The output {name} of the artifact is not finite where the original's is.")
                signal += float(np.square(wide[finite]).sum())
                noise += float(np.square(wide[finite] - other[finite]).sum())
        # The first run of a session also prepares its memory.
        later = times[1:]
        speed = median(ours for ours, _ in later) / median(theirs for _, theirs in later) if later else None
        return Comparison(samples, decibels(signal, noise), speed)

    def _keep(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Set the floating-point outputs of the next sample aside, and return them."""
        import numpy as np

        floats = {name: values for name, values in outputs.items() if np.issubdtype(values.dtype, np.floating)}
        np.savez(self._file(len(self._kept)), *floats.values())
        self._kept.append(list(floats))
        return floats

    def _load(self, number: int) -> dict[str, Any]:
        import numpy as np

        with np.load(self._file(number)) as arrays:
            return dict(zip(self._kept[number], (arrays[key] for key in arrays.files), strict=True))

    def _file(self, number: int) -> Path:
        return self.folder / f"expected_{number}.npz"


def _timed(session: Session, sample: Sample) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    outputs = session.run(sample.inputs)
    return outputs, time.perf_counter() - started
