"""Weights and activations of the worst layers: how their values are distributed, and what range the codes reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from quantcli.reporting.charts.base import COLOURS, Chart, new_figure, shorter
from quantcli.reporting.metric_labels import decibel_text
from quantcli.reporting.report import Report, Table
from quantcli.reporting.tables.common import LAYER_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "weight": "Weights of the worst layers",
    "activation": "Activations of the worst layers",
}
_NOTES = {
    "weight": "Grey: values of the model. Blue outline: what the codes stand for. Dashed: the range that these reach.",
    "activation": "Grey: values on the calibration data. Dashed: the range that codes reach; what lies outside is "
    "clipped.",
}


def charts(report: Report) -> list[Chart]:
    """A plot of weights and one of activations, where the report has their histograms."""
    found: Sequence[Mapping[str, Any]] = report.details.get("histograms", [])
    by_kind = {kind: [entry for entry in found if entry["kind"] == kind] for kind in _TITLES}
    return [_chart(kind, entries) for kind, entries in by_kind.items() if entries]


def _chart(kind: str, entries: Sequence[Mapping[str, Any]]) -> Chart:
    rows = [
        (entry["name"], *(f"{value:.4g}" for value in (entry["low"], entry["high"], *entry["range"])),
         f"{_outside(entry):.2%}", decibel_text(entry["sqnr_db"]))
        for entry in entries
    ]  # fmt: skip
    columns = ("Layer", "Smallest", "Largest", "Low", "High", "Outside", "SQNR")
    table = Table(_TITLES[kind], columns, rows, frozenset(columns[1:]), "Low and High: the range that codes reach. "
                  "Outside: share of the values beyond it, to the width of a bar.", LAYER_NAMES)  # fmt: skip
    alt = f"Histograms of {len(entries)} {kind}s with the range of their codes; the first is {entries[0]['name']}."
    return Chart(f"histograms-{kind}", _TITLES[kind], alt, table, partial(draw, entries), _NOTES[kind])


def _outside(entry: Mapping[str, Any]) -> float:
    """Share of values in bins that lie wholly outside the range."""
    counts: Sequence[int] = entry["counts"]
    low, high = entry["range"]
    width = (entry["high"] - entry["low"]) / len(counts)
    edges = [entry["low"] + index * width for index in range(len(counts) + 1)]
    lost = sum(count for index, count in enumerate(counts) if edges[index + 1] <= low or edges[index] >= high)
    return lost / (sum(counts) or 1)


def draw(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Two histograms in a row, on a logarithmic scale: what is clipped is rare."""
    lines = -(-len(entries) // 2)
    figure = new_figure(0.3 + 2.0 * lines)
    grid: list[list[Axes]] = figure.subplots(lines, 2, squeeze=False).tolist()
    places = [axes for row in grid for axes in row]
    for axes, entry in zip(places, entries, strict=False):
        _draw(axes, entry)
    for axes in places[len(entries) :]:
        axes.set_axis_off()
    return figure


def _counted(value: float) -> str:
    """A count of values, in units where there are many."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _draw(axes: Axes, entry: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    counts = entry["counts"]
    width = (entry["high"] - entry["low"]) / len(counts)
    edges = [entry["low"] + index * width for index in range(len(counts) + 1)]
    axes.stairs(counts, edges, fill=True, color=COLOURS["before"], label="before")
    if "counts_after" in entry:
        axes.stairs(entry["counts_after"], edges, color=COLOURS["after"], linewidth=1.1, label="after")
    for place in entry["range"]:
        axes.axvline(place, color=COLOURS["limit"], linestyle=(0, (4, 2)), linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _counted(value)))
    axes.set_title(f"{shorter(entry['name'], 44)}", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
