"""Rows of a report on a checkpoint's conversion, planned or done."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.roles import module_of
from quantcli.conversion.checkpoint.layout import Layout, plan_layout
from quantcli.conversion.checkpoint.proof import warning
from quantcli.models.source import ModelSource, open_model
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.recipe import Recipe
from quantcli.planning.resolve import resolve
from quantcli.planning.rules import full_label
from quantcli.reporting.report import LayerRow, ModelRow, Report

if TYPE_CHECKING:
    from quantcli.conversion.checkpoint.writer import LayerResult


def plan_rows(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Plan, Layout, list[LayerRow]]:
    """What a recipe would do to a checkpoint. Raises as `quantcli.planning.resolve.resolve`."""
    plan = resolve(recipe, checkpoint.infos(), checkpoint.config, data=None)
    layout = plan_layout(plan, checkpoint, Path("out"))
    return plan, layout, [_layer_row(layer, layout, None) for layer in plan.layers]


def reference_row(checkpoint: Checkpoint) -> ModelRow:
    """Of a model as it is before it is converted: the artifact may take its place."""
    known = ModelSource(str(checkpoint.path), "checkpoint", checkpoint=checkpoint)
    return ModelRow(known.path, "reference", known.format, known.scheme, None, checkpoint.size_bytes)


def conversion_report(
    checkpoint: Checkpoint,
    reference: ModelRow,
    target: Path,
    plan: Plan,
    layout: Layout,
    results: Mapping[str, LayerResult],
    details: dict[str, Any],
) -> Report:
    """The report of a conversion; without ``results``, and a hash in ``reference``, of one that is only planned."""
    before = checkpoint.size_bytes
    rows = [_layer_row(layer, layout, results.get(layer.info.name)) for layer in plan.layers]
    measured = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    metrics: dict[str, float | None] = {
        "size_ratio": layout.nbytes / before,
        "sqnr_db_min": min(measured, default=None),
    }
    sha256 = _sha256(target) if reference.sha256 else None
    artifact = ModelRow(
        str(target),
        "candidate",
        plan.format,
        plan.scheme,
        sha256,
        layout.nbytes,
        metrics,
        {"algorithm": plan.algorithm},
    )
    notes = Counter(result.rounding.note for result in results.values() if result.rounding.note)
    odd = [f"{count} layer{'s' * (count > 1)}: {note}." for note, count in notes.most_common(3)]
    warnings = [*checkpoint.warnings, *plan.warnings, *odd, *details.get("training", {}).get("warnings", [])]
    runtime = details["runtime"] if "runtime" in details else details["verified"]["runtime"]
    if results and (experts := _tokens_of_experts(plan, results)):
        details = details | {"experts": experts}
        if experts["under_fed"]:
            warnings.append(
                f"{experts['under_fed']} of {experts['count']} experts were given fewer tokens than they have inputs, "
                "so that their codes rest on little data: more --samples, or a longer --seq-len, helps."
            )
    unproven = warning(runtime)
    warnings += [unproven] if unproven else []
    return Report("convert", [reference, artifact], rows, [], warnings, details)


def _sha256(artifact: Path) -> str | None:
    """Hash of an artifact that was written, as that of any MODEL; a single file is not kept open for it."""
    if artifact.suffix != ".gguf":
        return open_model(artifact).sha256()
    with artifact.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tokens_of_experts(plan: Plan, results: Mapping[str, LayerResult]) -> dict[str, Any] | None:
    """How the data's tokens were spread over the experts; None where they were not counted.

    An expert is under-fed where one of its layers has more inputs than it was given tokens: these do not tell of all
    directions that the inputs may have.
    """
    given: dict[str, int] = {}
    under_fed: set[str] = set()
    for layer in plan.layers:
        result = results.get(layer.info.name)
        tokens = result.rounding.tokens if result else None
        if tokens is None:
            continue
        expert = module_of(module_of(layer.info.name))
        given[expert] = min(tokens, given.get(expert, tokens))
        if tokens < layer.matrix_shape[1]:
            under_fed.add(expert)
    if not given:
        return None
    counts = given.values()
    tokens_of = {"min": min(counts), "median": median(counts), "max": max(counts)}
    return {"count": len(given), "tokens": tokens_of, "under_fed": len(under_fed)}


def _layer_row(layer: LayerPlan, layout: Layout, result: LayerResult | None) -> LayerRow:
    after = sum(spec.nbytes for spec in layout.layer_specs[layer.info.name].values())
    reason = layer.reason or (result.rounding.note if result else None)
    if layer.reason and layer.dtype != layer.info.dtype:
        reason = f"{reason}; cast {layer.info.dtype} to {layer.dtype}"
    counted = {"tokens": result.rounding.tokens} if result and result.rounding.tokens is not None else {}
    return LayerRow(
        layer.info.name,
        full_label(layer.label, layer.scheme),
        layer.info.nbytes,
        after,
        result.rounding.sqnr_db if result else None,
        reason,
        details={"shape": list(layer.info.shape), "role": layer.role} | counted,
    )
