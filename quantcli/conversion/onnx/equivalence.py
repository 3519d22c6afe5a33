"""Graphs made simpler, or brought to a newer operator set, and seen in onnxruntime to compute what they did.

Both the graph before and the one after run on made-up inputs; where it takes none of these, on samples of the data. A
simplification that changes a result is left out; an upgrade that does is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.conversion.onnx.trial_inputs import NoFeeds, made_up, of_samples
from quantcli.core.numerics import decibels
from quantcli.core.ports import dtype_family
from quantcli.errors import InputError
from quantcli.models.pieces import Runnable, runnable
from quantcli.onnx.graph.model import OnnxModel
from quantcli.onnx.graph.opset import default_opset, restamp, upgrade
from quantcli.onnx.graph.prepare import STEPS, prepare
from quantcli.onnx.graph.values import array

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.data.samples import Samples

#: Samples of the data that graphs are compared on, where they run on nothing that is made up.
_SAMPLES = 2

#: Signal to noise below which two results are not the same but for rounding: of float32 and wider, and of the rest.
_LEAST_DB = {True: 40.0, False: 20.0}

#: Of integers, the part that may differ: a rounding may tip a comparison.
_TIPPED = 0.02

#: The samples of the user's data, which are opened where they are needed; None where there are none.
Data = Callable[[], "Samples | None"]


def no_data() -> None:
    """Where the user gave none."""


def simplified(model: OnnxModel, data: Data = no_data, *, fold: bool = True) -> ir.Model:
    """A model's graph as `prepare` makes it, without the steps that change what it computes.

    Raises:
        InputError: the graph is inconsistent, the runtime does not load it, or there is nothing to run it on.
    """
    prepared = partial(prepare, model, fold=fold)
    if model.defaults and not _is_loaded(prepared()):
        # The runtime, too, computes more of constants beforehand than of inputs, and may stumble over it.
        prepared = partial(prepared, defaults=True)
    graph = prepared()
    reference = _Reference.of(model.path, model.ir, data)
    if isinstance(reference, NoFeeds):
        raise reference.refusal()
    if reference.is_met_by(graph):
        return graph
    plain = prepared(without=STEPS)
    if not reference.is_met_by(plain):
        if reference.is_literal:
            raise InputError(
                f"{model.shown} computes something else once it is read and written anew: onnxruntime reads it in "
                "another way.",
                "Check the model with onnx.checker; if it is valid, please report it.",
            )
        # The runtime itself rewrote the model to run it at all: nothing can be told from this.
        return graph
    for step in STEPS:
        lacking = prepared(without=[step])
        if reference.is_met_by(lacking):
            return lacking
    return plain


def upgraded(graph: ir.Model, opset: int, data: Data = no_data) -> ir.Model:
    """A graph in a newer operator set, proven to compute the same.

    Raises:
        InputError: there is no way that keeps what it computes, or nothing to see it by.
    """
    old = default_opset(graph)
    if old >= opset or old == 0:
        return upgrade(graph, opset)
    reference = _Reference.of(None, graph, data)
    if isinstance(reference, NoFeeds):
        raise InputError(
            f"The model's operator set {old} is not upgraded to {opset}, since nothing would show that it still "
            f"computes the same: {reference.reason}",
            "Give --data with inputs that it runs on, or export the model with a newer operator set.",
        )
    problem = InputError(
        f"The model's operator set {old} cannot be upgraded to {opset}: it would compute something else.",
        "Export the model with a newer operator set.",
    )
    for way in (upgrade, restamp):
        try:
            candidate = way(graph, opset)
        except InputError as error:
            problem = error
            continue
        if candidate is not None and reference.is_met_by(candidate):
            return candidate
    raise problem


def _is_loaded(graph: ir.Model) -> bool:
    """Whether the runtime loads a graph and makes it faster on its way."""
    try:
        runnable(graph)
    except InputError:
        return False
    return True


def _as_written(model: Path | ir.Model) -> Runnable:
    """A file, or a graph, as it is written; large weights stay where they are."""
    return runnable(model, optimize=False, prepack=False)


class _Reference:
    """What a graph returns for some inputs, and for the first of them once more: random numbers are others then.

    ``is_literal``: it was run as it is written.
    """

    def __init__(
        self,
        runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
        again: Mapping[str, Any],
        *,
        is_literal: bool = True,
    ) -> None:
        self.runs, self.is_literal = runs, is_literal
        first = runs[0][1]
        self.repeats = {name for name in first if _alike(first[name], again[name])}

    @staticmethod
    def of(path: Path | None, graph: ir.Model, data: Data) -> _Reference | NoFeeds:
        """Run a model, from its file where there is one; or say why that cannot be.

        Raises:
            InputError: a constant is damaged, the runtime does not load the file, or it does not run on the data.
        """
        is_literal = True
        try:
            session = _as_written(graph if path is None else path)
        except InputError as error:
            is_literal = False
            if path is None:
                return NoFeeds(error.message)
            for value in (value for each in graph.graphs() for value in each.initializers.values()):
                array(value)
            # The runtime's own rewriting may remove what it lacks.
            session = runnable(path)
        feeds = made_up(session, graph, mixed=True)
        if isinstance(feeds, NoFeeds) or next(iter(feeds()))[1] != 1:
            samples = data()
            if samples is not None:
                samples.settle_batch_size(session.run)
                feeds = of_samples(samples, _SAMPLES) if isinstance(feeds, NoFeeds) else feeds
        if isinstance(feeds, NoFeeds):
            return feeds
        given = [arrays for arrays, _ in feeds()]
        *outputs, again = (got for got, _ in session.runs([*given, given[0]]))
        return _Reference(list(zip(given, outputs, strict=True)), again, is_literal=is_literal)

    def is_met_by(self, graph: ir.Model) -> bool:
        """Whether another graph returns the same, but for rounding and for what is drawn anew in every run."""
        try:
            got = [outputs for outputs, _ in _as_written(graph).runs(feeds for feeds, _ in self.runs)]
        except InputError:
            return False
        return all(
            list(one) == list(other) and all(_alike(one[name], other[name], exact=name in self.repeats) for name in one)
            for (_, one), other in zip(self.runs, got, strict=True)
        )


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
