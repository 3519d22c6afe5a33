"""The tables of `eval`."""

from __future__ import annotations

from collections.abc import Sequence

from quantcli.reporting.metric_labels import METRICS, decibel_text, metric_label, metric_text
from quantcli.reporting.report import LayerRow, Report, Table
from quantcli.reporting.tables.baseline import baseline_tables
from quantcli.reporting.tables.common import (
    LAYER_NAMES,
    MODEL_NAMES,
    SIZES,
    collapse,
    error_bars,
    gate_table,
    is_shown,
    ratio_text,
    scheme_text,
    short_names,
    total_sizes,
)
from quantcli.system.text import format_bytes


def eval_tables(report: Report) -> list[Table]:
    """Models side by side; then layers, worst first; then gates."""
    known = dict.fromkeys([*METRICS, *(name for model in report.models for name in model.metrics)])
    present = [name for name in known if is_shown(name) and any(name in model.metrics for model in report.models)]
    # Worth a column only where there are such values.
    if not any(model.metrics.get("not_finite") for model in report.models):
        present = [name for name in present if name != "not_finite"]
    columns = ("Model", "Scheme", "Size", "Ratio", *(metric_label(name) for name in present))
    names, folder = short_names(report.models)
    rows = []
    for model in report.models:
        cells = [metric_text(model.metrics, name) for name in present]
        rows.append(
            (
                names[model.path], scheme_text(model, report), _size_text(model.size_bytes),
                ratio_text(model.metrics["size_ratio"] or 0), *cells,
            )
        )  # fmt: skip
    note = f"{report.details['samples']} samples of {report.details['data']}; +- is one standard error"
    right = SIZES | {metric_label(name) for name in present}
    task = str(report.details["task"])
    tables = [Table(f"{task if ':' in task else task.capitalize()}{folder}", columns, rows, right, note, MODEL_NAMES)]
    verdicts = [(names[row.path], row.details["verdict"]) for row in report.models if "verdict" in row.details]
    if verdicts:
        origin = "By KL divergence. Q8_0, Q6_K, Q4_K_M and Q4_0 are llama.cpp's formats, measured on Llama-3-8B."
        tables.append(Table("Verdict", ("Model", "Verdict"), verdicts, note=origin, names=MODEL_NAMES))
    for path in dict.fromkeys(row.model for row in report.layers):
        tables.append(_layer_table(path, [row for row in report.layers if row.model == path]))
    tables += baseline_tables(report)
    if report.gates:
        tables.append(gate_table(report))
    return tables


def _size_text(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


def _layer_table(path: str | None, layers: Sequence[LayerRow]) -> Table:
    """Layers of one candidate, alike ones together and by the worst of them."""
    groups = collapse(layers, key=lambda row: row.scheme)
    folded = any(group.worst for group in groups)
    rows: list[tuple[str, ...]] = []
    for group in groups:
        worst = (group.worst,) if folded else ()
        error = decibel_text(group.worst_sqnr_db)
        rows.append((group.name, group.rows[0].scheme or "", *_layer_sizes(group.rows), error, *worst))
    columns = ("Layer", "Scheme", "Before", "After", "SQNR", *(("Worst",) if folded else ()))
    note = "SQNR of each layer's output against the reference's; it holds the error of the layers before."
    if folded:
        note += " Of alike layers that of the worst, whose number is under Worst."
    bars = error_bars(group.worst_sqnr_db for group in groups)
    return Table(f"Layers of {path}, worst first", columns, rows, SIZES, note, LAYER_NAMES, bars)


def _layer_sizes(rows: Sequence[LayerRow]) -> tuple[str, str]:
    """Sizes of layers' weights; an activation has none."""
    return total_sizes(rows) if any(row.bytes_before for row in rows) else ("-", "-")
