"""The table of `--baseline`: figures of an earlier report beside those of this one."""

from __future__ import annotations

from quantcli.reporting.metric_labels import is_fraction, metric_label, metric_text
from quantcli.reporting.report import Report, Table
from quantcli.reporting.tables.common import MODEL_NAMES, is_shown, short_names


def baseline_tables(report: Report) -> list[Table]:
    """Every metric that both reports have, model by model; nothing without a baseline."""
    baseline = report.details.get("baseline")
    if baseline is None:
        return []
    names, folder = short_names(report.models)
    rows = []
    for model, earlier in zip(report.models, baseline["models"], strict=True):
        before = earlier["metrics"]
        for name in model.metrics:
            then, now = before.get(name), model.metrics[name]
            if then is not None and now is not None and _is_compared(name):
                cells = (metric_text(before, name), metric_text(model.metrics, name), _change(name, then, now))
                rows.append((names[model.path], metric_label(name), *cells))
    columns = ("Model", "Metric", "Baseline", "Now", "Change")
    note = f"Baseline: {baseline['path']}, of quantcli {baseline['quantcli']}."
    return [Table(f"Since the baseline{folder}", columns, rows, frozenset(columns[2:]), note, MODEL_NAMES)]


def _is_compared(name: str) -> bool:
    """Whether a metric has a row: its own error and its interval have none."""
    return name == "size_bytes" or (is_shown(name) and not name.endswith(("_low", "_high")))


def _change(name: str, then: float, now: float) -> str:
    """The change of a share in points, of anything else in percent."""
    if is_fraction(name):
        return f"{100 * (now - then):+.2f} points"
    return f"{now / then - 1:+.1%}" if then else "-"
