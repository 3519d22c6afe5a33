"""Graphs made simpler, or brought to a newer operator set, and seen in onnxruntime to compute what they did.

Both the graph before and the one after run on made-up inputs. A simplification that changes a result is left out;
an upgrade that does is not taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.core.numerics import decibels
from quantcli.core.ports import Arrays, Port, dtype_family
from quantcli.errors import InputError
from quantcli.models.session import Session
from quantcli.onnx.graph.model import OnnxModel, constants
from quantcli.onnx.graph.opset import default_opset, restamp, upgrade
from quantcli.onnx.graph.prepare import STEPS, prepare
from quantcli.onnx.graph.save import save_graph

if TYPE_CHECKING:
    import onnx_ir as ir

#: Simplifications of larger models are not run on their own: the artifact is compared in the end in any case.
_LARGEST_BYTES = 1 << 29

#: Sizes tried, in turn, for dimensions that are free. More than one comes first: over a single row much is the same.
_SIZES = (2, 1, 3, 4, 8, 16, 32, 64, 224)

#: Signal to noise below which two results are not the same but for rounding: of float32 and wider, and of the rest.
_LEAST_DB = {True: 40.0, False: 20.0}

#: Of integers, the part that may differ: a rounding may tip a comparison.
_TIPPED = 0.02


def simplified(model: OnnxModel, *, fold: bool = True) -> ir.Model:
    """A model's graph as `prepare` makes it, without the steps that change what it computes.

    Raises:
        InputError: the graph is inconsistent.
    """
    graph = prepare(model, fold=fold)
    if sum(tensor.nbytes for tensor in constants(graph)) > _LARGEST_BYTES:
        return graph
    reference = _Reference.of(model.path, model.inputs)
    if reference is None or reference.is_met_by(graph):
        return graph
    plain = prepare(model, fold=fold, without=STEPS)
    if not reference.is_met_by(plain):
        # Written anew as it is the model differs, too: nothing can be told from this.
        return graph
    for step in STEPS:
        lacking = prepare(model, fold=fold, without=[step])
        if reference.is_met_by(lacking):
            return lacking
    return plain


def upgraded(graph: ir.Model, opset: int) -> ir.Model:
    """A graph in a newer operator set, proven to compute the same.

    Raises:
        InputError: there is no way that keeps what it computes.
    """
    old = default_opset(graph)
    if old >= opset or old == 0:
        return upgrade(graph, opset)
    problem = InputError(
        f"The model's operator set {old} cannot be upgraded to {opset}: it would compute something else.",
        "Export the model with a newer operator set.",
    )
    with tempfile.TemporaryDirectory(prefix="quantcli-") as folder:
        path = Path(folder) / "before.onnx"
        save_graph(graph.clone(), path)
        reference = _Reference.of(path, OnnxModel(path, graph).inputs)
    for way in (upgrade, restamp):
        try:
            candidate = way(graph, opset)
        except InputError as error:
            problem = error
            continue
        if candidate is not None and (reference is None or reference.is_met_by(candidate)):
            return candidate
    raise problem


class _Reference:
    """What a graph returns for some made-up inputs."""

    def __init__(self, runs: Sequence[tuple[Arrays, Mapping[str, Any], Mapping[str, Any]]]) -> None:
        self.runs = runs

    @staticmethod
    def of(path: Path, ports: Sequence[Port]) -> _Reference | None:
        """Run a model twice; None where it does not run on anything that is made up."""
        try:
            session = Session(path, optimize=False)
        except InputError:
            return None
        for feeds in made_up_feeds(ports):
            try:
                return _Reference([(feeds, session.run(feeds), session.run(feeds))])
            except InputError:
                continue
        return None

    def is_met_by(self, graph: ir.Model) -> bool:
        """Whether another graph returns the same, but for rounding and for what is drawn anew in every run."""
        with tempfile.TemporaryDirectory(prefix="quantcli-") as folder:
            path = Path(folder) / "after.onnx"
            save_graph(graph.clone(), path)
            try:
                session = Session(path, optimize=False)
                got = [session.run(feeds) for feeds, _, _ in self.runs]
            except InputError:
                return False
        return all(
            list(one) == list(other)
            and all(_alike(one[name], other[name], exact=_alike(one[name], again[name])) for name in one)
            for (_, one, again), other in zip(self.runs, got, strict=True)
        )


def made_up_feeds(ports: Sequence[Port], seed: int = 0) -> Iterator[Arrays]:
    """Inputs of the right types and shapes, with one size after the other where a dimension is free."""
    if any(port.shape is None or port.kind for port in ports):
        return
    for size in _SIZES:
        rng = np.random.default_rng(seed)
        yield {port.name: _made_up(port, size, rng) for port in ports}


def _made_up(port: Port, size: int, rng: np.random.Generator) -> np.ndarray:
    shape = [dim if isinstance(dim, int) else size for dim in port.shape or ()]
    if port.dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    family = dtype_family(port.dtype)
    if family == "float":
        return rng.standard_normal(shape).astype(port.dtype)
    if family == "integer":
        return rng.integers(0, 2, shape).astype(port.dtype)
    return np.full(shape, "a", dtype=object) if port.dtype == object else rng.standard_normal(shape).astype(port.dtype)


def _alike(one: Any, other: Any, *, exact: bool = True) -> bool:
    """Whether two outputs are the same; without ``exact`` of one kind and shape."""
    if isinstance(one, list | tuple):
        same = isinstance(other, list | tuple) and len(one) == len(other)
        return same and all(_alike(a, b, exact=exact) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        same = isinstance(other, dict) and one.keys() == other.keys()
        return same and all(_alike(one[key], other[key], exact=exact) for key in one)
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return type(one) is type(other) and (not exact or one == other or isinstance(one, float))
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not exact or one.size == 0:
        return True
    if dtype_family(one.dtype) != "float":
        return bool(np.mean(one != other) <= _TIPPED)
    wide, narrow = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(wide)
    if not (finite == np.isfinite(narrow)).all():
        return False
    noise = float(np.square(wide[finite] - narrow[finite]).sum())
    ratio = decibels(float(np.square(wide[finite]).sum()), noise)
    return noise == 0 or (ratio is not None and ratio >= _LEAST_DB[one.dtype.itemsize >= 4])
