"""Sizes as bars: of models, or of what a model is made of, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from quantcli.reporting.charts.base import COLOURS, Chart, legend_above, new_figure, shorter
from quantcli.reporting.report import LayerRow, Report, Table
from quantcli.reporting.tables.common import scheme_text, short_names
from quantcli.system.text import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Series of bars by name: bytes of every category.
Series = Sequence[tuple[str, Sequence[int]]]


def charts(report: Report) -> list[Chart]:
    """Bytes by role where layers tell them, else bytes of every model."""
    found = _by_role(report) if report.command in ("convert", "inspect") else _by_model(report)
    return [] if found is None else [found]


def _by_role(report: Report) -> Chart | None:
    rows = [row for row in report.layers if "role" in row.details]
    plans = list(dict.fromkeys(row.details.get("plan") for row in rows))
    if not rows:
        return None
    first = [row for row in rows if row.details.get("plan") == plans[0]]
    totals = _totals(first)
    roles = sorted(totals, key=lambda role: -totals[role][0])
    series = [("before" if report.command == "convert" else "as it is", [totals[role][0] for role in roles])]
    for plan in plans:
        if report.command == "convert" or plan is not None:
            after = _totals([row for row in rows if row.details.get("plan") == plan])
            series.append((plan or "after", [after.get(role, (0, 0))[1] for role in roles]))
    return _chart("What its bytes are made of", "role", roles, series)


def _by_model(report: Report) -> Chart | None:
    models = [model for model in report.models if model.size_bytes is not None]
    if len(models) < 2:
        return None
    names, _ = short_names(report.models)
    labels = [f"{names[model.path]} ({scheme_text(model, report)})" for model in models]
    return _chart("Size of the models", "model", labels, [("size", [model.size_bytes or 0 for model in models])])


def _totals(rows: Sequence[LayerRow]) -> dict[str, tuple[int, int]]:
    """Bytes before and after by role."""
    totals: dict[str, tuple[int, int]] = {}
    for row in rows:
        before, after = totals.get(row.details["role"], (0, 0))
        totals[row.details["role"]] = before + row.bytes_before, after + row.bytes_after
    return totals


def _chart(title: str, kind: str, categories: Sequence[str], series: Series) -> Chart:
    columns = (kind.capitalize(), *(name.capitalize() if name in _PLAIN else name for name, _ in series))
    rows = [
        (category, *(format_bytes(values[index]) for _, values in series)) for index, category in enumerate(categories)
    ]
    alt = "; ".join(f"{category}: {', '.join(sizes)}" for category, *sizes in rows)
    totals = ", ".join(f"{format_bytes(sum(values))} {name}" for name, values in series)
    note = f"In all: {totals}." if len(series) > 1 else None
    table = Table(title, columns, rows, frozenset(columns[1:]))
    return Chart("sizes", title, f"Sizes as bars. {alt}.", table, partial(draw, categories, series), note)


_PLAIN = ("before", "after", "as it is", "size")


def draw(categories: Sequence[str], series: Series) -> Figure:
    """Bars of every category, those of a category side by side, each with its size."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = new_figure(0.9 + len(categories) * (0.2 + 0.26 * len(series)))
    axes = figure.subplots()
    thick = 0.8 / len(series)
    for number, (name, values) in enumerate(series):
        colour = COLOURS["after"] if len(series) == 1 else COLOURS["before"] if number == 0 else _colour(number, series)
        places = [index + (number - (len(series) - 1) / 2) * thick for index in range(len(categories))]
        bars = axes.barh(places, values, thick * 0.9, color=colour, label=name)
        axes.bar_label(bars, [format_bytes(value) for value in values], padding=4, fontsize=8.5)
    axes.set_yticks(range(len(categories)), [shorter(category) for category in categories])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value))))
    if len(series) > 1:
        legend_above(axes)
    return figure


def _colour(number: int, series: Series) -> str:
    return COLOURS["after"] if len(series) == 2 else COLOURS[f"series-{(number - 1) % 7 + 1}"]
