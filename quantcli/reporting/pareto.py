"""The frontier of size against loss, as files: JSON, a table, and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantcli.errors import InputError, UsageError
from quantcli.reporting.charts.base import require_matplotlib
from quantcli.reporting.charts.pareto import charts_of_points, points_of
from quantcli.reporting.report import finite
from quantcli.reporting.tables.budget import mixes_table
from quantcli.system.files import whole_file, write_text


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
    files = {path: document + "\n", path.with_suffix(".md"): mixes_table("Size against loss", points).to_markdown()}
    files |= {path.with_suffix(".svg"): chart.to_svg() for chart in charts_of_points(points_of(points))}
    try:
        for file, text in files.items():
            with whole_file(file) as unfinished:
                write_text(unfinished, text)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}.") from error
