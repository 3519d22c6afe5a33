"""The frontier of size against loss, as files: JSON, a table, and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantcli.errors import InputError, UsageError
from quantcli.reporting.charts.base import require_matplotlib
from quantcli.reporting.charts.pareto import charts_of_points, points_of
from quantcli.reporting.metric_labels import metric_label
from quantcli.reporting.report import Table, finite
from quantcli.reporting.tables.budget import loss_of, mix_text
from quantcli.system.files import whole_file
from quantcli.system.text import format_bytes


def frontier_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """The points of a frontier, smallest first."""
    loss = loss_of(points)
    timed = any("milliseconds" in point for point in points)
    columns = ["Layers", "Size", *(["Time (ms)"] if timed else []), "Estimate"]
    columns += [f"Loss: {metric_label(loss)}"] if loss else []
    rows = []
    for point in points:
        row = [mix_text(point["layers"]), format_bytes(point["size_bytes"])]
        row += [f"{point['milliseconds']:.3g}" if "milliseconds" in point else "-"] if timed else []
        row.append(f"{point['estimate']:.3g}")
        value = point.get("held_out", {}).get(loss) if loss else None
        row += ["-" if value is None else f"{value:.4g}"] if loss else []
        rows.append(tuple(row))
    return Table("Size against loss", tuple(columns), rows, frozenset(columns[1:]))


def require_pareto(path: Path) -> None:
    """Refuse, before a search, what could not be written after it.

    Raises:
        UsageError: the name is the one that the table or the plot would take.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix in (".md", ".svg"):
        raise UsageError(
            f"--pareto {path} names the JSON file; the table and the plot go beside it.",
            f"Name for example: --pareto {path.with_suffix('.json')}",
        )
    require_matplotlib()


def write_pareto(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Write the frontier to a JSON file, and beside it as ``.md`` and, if it has two points, as ``.svg``.

    Raises:
        InputError: one of them cannot be written.
    """
    document = json.dumps(finite({"schema_version": 1, "frontier": list(points)}), indent=1, ensure_ascii=False)
    files = {path: document + "\n", path.with_suffix(".md"): frontier_table(points).to_markdown()}
    files |= {path.with_suffix(".svg"): chart.to_svg() for chart in charts_of_points(points_of(points))}
    try:
        for file, text in files.items():
            with whole_file(file) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}.") from error
