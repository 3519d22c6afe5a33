"""Where an ONNX candidate's error comes from: its values against the reference's of the same name, on the same data."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantcli.core.ports import Arrays
from quantcli.evaluation.metrics import Fidelity
from quantcli.models.inputs import fit
from quantcli.models.outputs import floats
from quantcli.models.session import Session
from quantcli.onnx.graph.model import OnnxModel, open_onnx
from quantcli.onnx.graph.save import save_graph
from quantcli.reporting.report import LayerRow
from quantcli.system.files import temporary_folder

if TYPE_CHECKING:
    import onnx_ir as ir

#: Values asked for at a time: all of them for one sample are held in memory.
_CHUNK = 64

#: What a dequantized value may be called: its name and one of these, by us and by onnxruntime's quantizer.
_SUFFIXES = ("_dequantized", "_DequantizeLinear_Output")


@dataclass(frozen=True)
class _Pair:
    """A value of the reference and what stands for it in the candidate."""

    name: str
    reference: str
    candidate: str
    scheme: str
    bytes_before: int = 0
    bytes_after: int = 0


def compare_graphs(reference: OnnxModel, candidate: OnnxModel, feeds: Sequence[Arrays], name: str) -> list[LayerRow]:
    """Signal to noise of every quantized layer's output and of every other quantized activation, worst first.

    A layer is compared by the output that the layers after it see: the dequantized one where there is one.
    Its figure holds the error of the layers before it too. Values without a counterpart of the same name in
    the reference are left out. ``name`` is what the rows call the candidate.

    Raises:
        InputError: a model cannot be run on the samples.
    """
    pairs = list(_pairs(reference, candidate))
    measured: dict[str, Fidelity] = {}
    computed = list(_computed(reference))
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        with (
            _observed(reference, [pair.reference for pair in chunk]) as ours,
            _observed(candidate, [pair.candidate for pair in chunk]) as theirs,
        ):
            for sample in feeds:
                before = floats(ours.run(fit(sample, ours.inputs, str(reference.path))))
                after = floats(theirs.run(fit(sample, theirs.inputs, str(candidate.path))))
                for pair in chunk:
                    one, other = before.get(pair.reference), after.get(pair.candidate)
                    if one is not None and other is not None and one.shape == other.shape and one.size:
                        fidelity = measured.setdefault(pair.name, Fidelity())
                        fidelity.add(torch.from_numpy(one), torch.from_numpy(other))
    rows = [
        LayerRow(
            pair.name, pair.scheme, pair.bytes_before, pair.bytes_after, measured[pair.name].sqnr_db,
            model=name, details={"order": computed.index(pair.reference)},
        )
        for pair in pairs
        if pair.name in measured
    ]  # fmt: skip
    return sorted(rows, key=lambda row: float("inf") if row.sqnr_db is None else row.sqnr_db)


def _pairs(reference: OnnxModel, candidate: OnnxModel) -> Iterator[_Pair]:
    """Layers with quantized weights, then activations that are quantized on their own."""
    ours, theirs, restored = _computed(reference), _computed(candidate), _restored(candidate)
    seen = set[str]()
    for name, scheme, outputs in _layers(reference, candidate):
        found = [(output, _counterpart(output, theirs, restored)) for output in outputs if output in ours]
        output, other = next(((output, other) for output, other in found if other), (None, None))
        if output is None or other is None:
            continue
        seen.add(output)
        yield _Pair(name, output, other, scheme, *_stored_bytes(reference, candidate, name))
    for name in ours:
        other = _counterpart(name, theirs, restored)
        if name not in seen and other is not None and other != name:
            yield _Pair(name, name, other, "activation")


def _layers(reference: OnnxModel, candidate: OnnxModel) -> Iterator[tuple[str, str, list[str]]]:
    """Quantized layers: name, scheme, and what their output may be called in both models.

    They are those of the candidate's manifest; without one, those whose weight the candidate does not have.
    Where a batch norm was folded into a layer, its output has the batch norm's name.
    """
    layers = candidate.manifest.layers
    if layers:
        for name, layer in layers.items():
            if layer.scheme:
                both = [
                    node
                    for model in (reference, candidate)
                    for node in model.ir.graph
                    if node.name and node.name == layer.node
                ]
                yield name, layer.scheme, [out.name for node in both for out in node.outputs[:1] if out.name]
        return
    kept = {*candidate.ir.graph.initializers}
    for node in reference.ir.graph:
        weight = _weight(node)
        if weight is not None and weight.name and weight.name not in kept:
            yield weight.name, "quantized", [out.name for out in node.outputs[:1] if out.name]


def _computed(model: OnnxModel) -> dict[str, None]:
    """Names of the graph's inputs and of what is computed from them, in order; constants are left out."""
    found = {value.name: None for value in model.ir.graph.inputs if value.name not in model.ir.graph.initializers}
    for node in model.ir.graph:
        if any(value is not None and value.name in found for value in node.inputs):
            found |= {value.name: None for value in node.outputs}
    return {name: None for name in found if name}


def _restored(model: OnnxModel) -> dict[str, str]:
    """Names of values that are quantized and restored, and what they are called afterwards."""
    found = {}
    for node in model.ir.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        producer = codes.producer() if codes is not None else None
        before = producer.inputs[0] if producer is not None and producer.op_type == "QuantizeLinear" else None
        if before is not None and before.name and node.outputs[0].name:
            found[before.name] = node.outputs[0].name
    return found


def _counterpart(name: str, values: Container[str], restored: Mapping[str, str]) -> str | None:
    if restored.get(name) in values:
        return restored[name]
    return next((each for each in (*(name + suffix for suffix in _SUFFIXES), name) if each in values), None)


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant matrix or kernel that a node works with."""
    constant = [value for value in node.inputs if value is not None and value.const_value is not None]
    return next((value for value in constant if value.shape is not None and len(value.shape) > 1), None)


def _stored_bytes(reference: OnnxModel, candidate: OnnxModel, name: str) -> tuple[int, int]:
    """Bytes of a weight, and of what became of it: constants whose names begin with its own."""
    ours, theirs = (model.ir.graph.initializers for model in (reference, candidate))
    before = ours[name].const_value if name in ours else None
    after = [
        value.const_value.nbytes
        for key, value in theirs.items()
        if value.const_value is not None and (key == name or (key.startswith(f"{name}_") and key not in ours))
    ]
    return (before.nbytes if before is not None else 0), sum(after)


@contextmanager
def _observed(model: OnnxModel, names: Sequence[str]) -> Iterator[Session]:
    """A session that returns these values, whether the model returns them or not."""
    opened = open_onnx(model.path)
    graph = opened.ir.graph
    values = {value.name: value for value in (*graph.inputs, *(out for node in graph for out in node.outputs))}
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in dict.fromkeys(names))
    with temporary_folder() as folder:
        path = Path(folder) / "observed.onnx"
        save_graph(opened.ir, path)
        # Without optimization every value of the graph is there to be asked for.
        yield Session(path, optimize=False, name=str(model.path))
