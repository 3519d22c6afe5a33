"""Rows of a report, and entries of a manifest, about an ONNX graph: what became, or would become, of each weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.core.manifest import ManifestLayer
from quantcli.onnx.plan.constants import left_constants
from quantcli.onnx.plan.plan import GraphPlan, LayerOutcome, tensor_info
from quantcli.planning.rules import full_label
from quantcli.reporting.report import LayerRow

if TYPE_CHECKING:
    import onnx_ir as ir


def layer_rows(outcomes: Sequence[LayerOutcome]) -> list[LayerRow]:
    """One row per weight of a plan; where nodes that share one differ, one for each form, its bytes counted once."""
    rows = []
    labels: dict[str, set[str | None]] = {}
    for order, outcome in enumerate(outcomes):
        node = outcome.plan
        label = full_label(node.label, node.scheme)
        listed = labels.setdefault(node.name, set())
        if label in listed:
            continue
        before = 0 if listed else node.info.nbytes
        after = 0 if listed and label is None else outcome.bytes_after
        listed.add(label)
        details = {"shape": list(node.info.shape), "role": node.role, "node": node.node.name, "order": order}
        if node.note:
            details["note"] = node.note
        rows.append(LayerRow(node.name, label, before, after, outcome.sqnr_db, node.reason, details=details))
    return rows


def layer_entries(outcomes: Sequence[LayerOutcome]) -> dict[str, ManifestLayer]:
    """What the manifest says of each weight of a plan, by name."""
    entries: dict[str, ManifestLayer] = {}
    for outcome in outcomes:
        node = outcome.plan
        entry = ManifestLayer(node=node.node.name, mode=node.mode)
        if node.scheme is not None:
            entry.scheme, entry.algorithm, entry.note = node.label, node.algorithm, node.note
            entry.sqnr_db = None if outcome.sqnr_db is None else round(outcome.sqnr_db, 4)
        else:
            entry.reason = node.reason
        # A weight that several nodes read is one entry for each; all but the first go by their own names.
        name = node.name if node.name not in entries else node.node.name or node.name
        entries[name] = entry
    return entries


def left_rows(model: ir.Model, plan: GraphPlan, file: Path) -> list[LayerRow]:
    """Constants that are no layer's weight, in one row each."""
    rows = []
    for value, reason in left_constants(model, {node.name for node in plan.nodes}):
        info = tensor_info(value, file)
        details = {"shape": list(info.shape), "role": "parameter"}
        rows.append(LayerRow(info.name, None, info.nbytes, info.nbytes, None, reason, details=details))
    return rows
