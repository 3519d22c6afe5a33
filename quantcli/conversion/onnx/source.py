"""What a conversion to ONNX starts from: the user's model, as a graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.decoded import decoded_checkpoint
from quantcli.checkpoint.quantized import is_quantized, open_quantized
from quantcli.conversion.onnx.equivalence import Data, no_data, simplified, upgraded
from quantcli.conversion.onnx.repack import CheckpointCodes
from quantcli.data.request import DataRequest
from quantcli.errors import InputError
from quantcli.models.source import ModelSource, open_model
from quantcli.onnx.graph.model import OLDEST_OPSET, OnnxModel, open_onnx
from quantcli.onnx.graph.opset import default_opset
from quantcli.onnx.plan.judge import needed_opset
from quantcli.onnx.plan.plan import GraphPlan
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.onnx.plan.runtime_version import require_version
from quantcli.planning.recipe import Recipe, dequantizes
from quantcli.planning.targets import onnxruntime_version

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.export.export import Exported


@dataclass(frozen=True)
class Source:
    """A model and its graph, which is exported where the model is none itself.

    ``codes`` are those of a quantized checkpoint that are to be kept; ``origin`` is what its manifest said.
    ``exported_db`` is the signal to noise of an export's outputs beside torch's, None where they are equal;
    ``cached``: the export is a decoder with a key-value cache.
    """

    subject: ModelSource
    model: OnnxModel
    codes: CheckpointCodes | None
    origin: dict[str, Any] | None
    warnings: tuple[str, ...] = ()
    exported_db: float | None = None
    cached: bool = False


def open_source(
    model: str, weights: Path | None, recipe: Recipe, data: DataRequest | None, folder: Path, *, cache: bool = False
) -> Source:
    """Open a model; export it into ``folder`` where it is none of ONNX, with a key-value cache where that is wanted.

    Raises:
        InputError: the model is missing, damaged, or cannot be exported.
        UsageError: it is quantized, and the recipe asks for what its codes cannot become.
    """
    subject = open_model(model, weights)
    codes = origin = None
    if subject.checkpoint is not None and is_quantized(subject.checkpoint):
        codes, origin = _quantized(subject.checkpoint, recipe)
    if subject.onnx is not None:
        return Source(subject, subject.onnx, codes, origin)
    exported, cached = _exported(subject, recipe, data, folder, cache=cache)
    graph, told = open_onnx(exported.path, mapped=True), tuple(exported.warnings)
    graph.shown = Path(subject.path)
    return Source(subject, graph, codes, origin, told, exported.outputs_sqnr_db, cached)


def _exported(
    subject: ModelSource, recipe: Recipe, data: DataRequest | None, folder: Path, *, cache: bool
) -> tuple[Exported, bool]:
    """The export, and whether it has a key-value cache: where torch cannot trace one, a graph that scores will do."""
    from quantcli.export.export import export_to_onnx

    export = partial(export_to_onnx, subject.path, folder, data=data, weights=subject.weights)
    try:
        return export(cache=cache), cache
    except InputError as error:
        if not cache or recipe.runtime[0] not in (None, "onnxruntime"):
            raise
        why = error.message
    plain = export()
    plain.warnings.append(f"The graph has no key-value cache, and serves for scoring alone: {why}")
    return plain, False


def planned_graph(
    model: OnnxModel, recipe: Recipe, data: Data = no_data, codes: CheckpointCodes | None = None
) -> tuple[ir.Model, GraphPlan]:
    """The graph to work on, in the operator set that its plan needs, and what becomes of it.

    ``data`` is what the graph is run on where it takes no made-up inputs.

    Raises:
        InputError: nothing can be quantized, or the runtime's version or the operator set stands against it.
        UsageError: the recipe does not suit the graph.
    """
    graph = simplified(model, data, fold=codes is None)
    make_plan = codes.plan if codes else partial(resolve_graph, recipe)
    plan = make_plan(graph, model.shown)
    opset, version = max(needed_opset(plan), OLDEST_OPSET), onnxruntime_version(recipe)
    if version:
        require_version(plan, graph, opset, version)
    if opset <= default_opset(graph):
        return graph, plan
    try:
        newer = upgraded(graph, opset, data)
    except InputError as error:
        return graph, _without_newer(plan, default_opset(graph), error, model.shown)
    # A plan speaks of a graph's own nodes.
    return newer, make_plan(newer, model.shown)


def _without_newer(plan: GraphPlan, opset: int, error: InputError, file: Path) -> GraphPlan:
    """The plan with layers left as they are whose form is none of this operator set; ``error``: why it stays.

    Raises:
        InputError: no layer remains.
    """
    from quantcli.onnx.plan.forms import form

    reason = f"it takes a newer operator set than the model's {opset}"
    nodes = tuple(
        node.left(reason) if node.form and form(node.form).opset(node) > opset else node for node in plan.nodes
    )
    if not any(node.form for node in nodes):
        raise InputError(
            f"{file}: {plan.scheme} takes a newer operator set. {error.message}",
            f"{error.hint or 'Export the model with a newer operator set.'} --scheme fp16 goes with any set.",
        ) from error
    return replace(plan, nodes=nodes, warnings=(*plan.warnings, f"{error} Layers that need it stay as they are."))


def _quantized(checkpoint: Checkpoint, recipe: Recipe) -> tuple[CheckpointCodes | None, dict[str, Any]]:
    """The codes of a quantized checkpoint, unless they are to be values again; and where they come from."""
    decoded = decoded_checkpoint(checkpoint)
    origin = decoded.origin() | {"sha256": checkpoint.sha256()}
    if dequantizes(recipe) or (decoded.is_read_only and recipe.scheme is not None):
        return None, origin
    return CheckpointCodes(checkpoint, open_quantized(checkpoint), recipe), origin
