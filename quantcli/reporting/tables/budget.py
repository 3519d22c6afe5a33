"""The tables of a budget: what was tried, what was chosen, and whether it keeps what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantcli.reporting.metric_labels import metric_label
from quantcli.reporting.report import Report, Table
from quantcli.system.text import format_bytes

#: Losses on samples that were held out, in the order in which one of them is shown.
_SHOWN = ("kl_nats", "perplexity", "top1", "argmax_agreement", "cosine")


def budget_tables(report: Report) -> list[Table]:
    """Candidates and ceilings; nothing where there was no budget."""
    budget: Mapping[str, Any] | None = report.details.get("budget")
    if budget is None:
        return []
    tables = [mixes_table("Mixes of schemes", budget["candidates"])] if budget.get("candidates") else []
    return [*tables, _ceilings(report, budget)]


def mixes_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Mixes with what is known of them: columns of what was measured of none are left out."""
    loss = loss_of(rows)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "Layers": lambda row: mix_text(row["layers"]),
        "Size": lambda row: format_bytes(row["size_bytes"]),
    }
    if any("latency_ms_p50" in row for row in rows):
        columns["Time (ms)"] = lambda row: _number(row.get("latency_ms_p50"))
    columns["Estimate"] = lambda row: f"{row['estimate']:.3g}"
    if loss:
        columns[f"Loss: {metric_label(loss)}"] = lambda row: _number(row.get("held_out", {}).get(loss))
    if own := any("perplexity" in row for row in rows):
        columns["Perplexity"] = lambda row: _number(row.get("perplexity"))
    numbers = frozenset([*columns][1:])
    if any("chosen" in row for row in rows):
        columns[""] = lambda row: "chosen" if row.get("chosen") else ""
    return Table(
        title,
        tuple(columns),
        [tuple(text(row) for text in columns.values()) for row in rows],
        numbers,
        "Estimate: of the loss, before anything was run."
        + (" Loss and perplexity: on samples that were held out." if loss or own else ""),
    )


def _ceilings(report: Report, budget: Mapping[str, Any]) -> Table:
    rows = [
        (gate.require, "-" if gate.value is None else _figure(gate.require, gate.value), "yes" if gate.passed else "NO")
        for gate in report.gates
    ]
    note = " ".join(budget[key] for key in ("unmet", "hint") if budget.get(key)) or None
    return Table("Budget", ("Asked for", "Has", "Kept"), rows, frozenset({"Has"}), note)


def loss_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The loss that candidates are shown with: the first that any of them was measured by."""
    known = dict.fromkeys(name for row in rows for name in row.get("held_out", {}))
    return next((name for name in (*_SHOWN, *known) if name in known), None)


def mix_text(layers: Mapping[str, int]) -> str:
    """How many layers are stored how."""
    return ", ".join(f"{count} {label}" for label, count in layers.items())


def _figure(require: str, value: float) -> str:
    return format_bytes(value) if require.startswith("max_size") else f"{value:.4g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
