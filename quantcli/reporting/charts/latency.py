"""How latencies are distributed: what share of runs took at most so long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from quantcli.reporting.charts.base import COLOURS, Chart, legend_above, new_figure, shorter
from quantcli.reporting.report import Report, Table
from quantcli.reporting.tables.common import MODEL_NAMES, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Percentiles that the table shows, of those that a report has.
_SHOWN = (0, 25, 50, 75, 90, 100)


def charts(report: Report) -> list[Chart]:
    """One plot for each batch size of a `bench`."""
    names, _ = short_names(report.models)
    found = []
    for number in range(len(report.models[0].details.get("batches", [])) if report.models else 0):
        batches = [model.details["batches"][number] for model in report.models]
        curves = [
            (names[model.path], batch["latency_ms_percentiles"])
            for model, batch in zip(report.models, batches, strict=True)
            if "latency_ms_percentiles" in batch
        ]
        if curves:
            found.append(_chart(f"latency-{number}", batches[0]["batch_size"], curves))
    return found


def _chart(name: str, batch_size: int, curves: Sequence[tuple[str, Mapping[str, float]]]) -> Chart:
    title = f"Latencies at batch size {batch_size}"
    columns = ("Model", *(f"p{percent}" for percent in _SHOWN))
    rows = [(model, *(f"{values[str(percent)]:.3g}" for percent in _SHOWN)) for model, values in curves]
    table = Table(title, columns, rows, frozenset(columns[1:]), "Milliseconds of whole runs; p50 is the median, p0 the "
                  "fastest and p100 the slowest run.", MODEL_NAMES)  # fmt: skip
    medians = ", ".join(f"{model} {values['50']:.3g} ms" for model, values in curves)
    note = "How many of all runs took at most so long; the dots are medians. Curves to the left are faster."
    alt = f"Share of runs over their latency. Medians: {medians}."
    return Chart(name, title, alt, table, partial(draw, curves), note)


def draw(curves: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """A curve for each model; the scale is logarithmic, because a few runs are always slow."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    figure = new_figure(3.2)
    axes = figure.subplots()
    dashes = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
    for number, (model, values) in enumerate(curves):
        points = sorted((int(percent) / 100, value) for percent, value in values.items())
        colour = COLOURS[f"series-{number % 7 + 1}"]
        axes.plot([x for _, x in points], [y for y, _ in points], color=colour, linewidth=1.6,
                  linestyle=dashes[number % len(dashes)], label=shorter(model), gid=f"model-{number}")  # fmt: skip
        axes.plot([values["50"]], [0.5], "o", color=colour, markersize=4.5)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("Latency in ms, at most")
    axes.set_ylabel("Share of runs")
    legend_above(axes, 3)
    return figure
