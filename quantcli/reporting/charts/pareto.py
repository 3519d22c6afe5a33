"""Size against accuracy: of models side by side, or of the frontier that a search found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from quantcli.reporting.charts.base import COLOURS, Chart, new_figure, shorter
from quantcli.reporting.metric_labels import is_fraction, metric_label, metric_text
from quantcli.reporting.report import Report, Table
from quantcli.reporting.tables.budget import loss_of, mix_text
from quantcli.reporting.tables.common import MODEL_NAMES, short_names
from quantcli.system.text import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What quality is judged by, the first that all have; whether more of it is better.
_QUALITY = {
    "top1": True, "perplexity": False, "kl_nats": False, "cosine": True, "sqnr_db": True, "argmax_agreement": True,
    "loss": False, "estimate": False,
}  # fmt: skip


def charts(report: Report) -> list[Chart]:
    """Mixes that a search for a budget tried, with its frontier where that was asked for; else models compared."""
    budget = report.details.get("budget", {})
    mixes = [*(budget.get("frontier") or []), *(budget.get("candidates") or [])]
    return charts_of_points(points_of(mixes) if mixes else _models(report))


def charts_of_points(points: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The chart of dicts with ``label``, ``size_bytes`` and a metric that at least two of them have."""
    for metric in _QUALITY:
        measured = [point for point in points if _has(point, metric)]
        if len(measured) > 1:
            return [_chart(measured, metric)]
    return []


def points_of(mixes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Points of a chart from mixes of schemes, each once, with what they lose on samples that were held out."""
    loss = loss_of(mixes)
    name = loss if loss == "kl_nats" else "loss"
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for mix in sorted(mixes, key=lambda mix: not mix.get("chosen")):
        label = mix_text(mix["layers"])
        values = {name: mix.get("held_out", {}).get(loss), "estimate": mix["estimate"]}
        # So many mixes lie side by side that only single schemes, and what was chosen, have their names in the plot.
        mark = "chosen" if mix.get("chosen") else label if len(mix["layers"]) == 1 else ""
        point = {"label": label, "mark": mark, "size_bytes": mix["size_bytes"]} | values
        found.setdefault((label, mix["size_bytes"]), point)
    return list(found.values())


def frontier(points: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """Points that no other one beats: none is as small and better. From the smallest to the largest."""
    best: list[Mapping[str, Any]] = []
    sign = 1 if _QUALITY[metric] else -1
    for point in sorted(points, key=lambda point: (point["size_bytes"], -sign * point[metric])):
        if not best or sign * point[metric] > sign * best[-1][metric]:
            best.append(point)
    return best


def _has(point: Mapping[str, Any], name: str) -> bool:
    return point.get(name) is not None and point.get("size_bytes") is not None


def _models(report: Report) -> list[Mapping[str, Any]]:
    names, _ = short_names(report.models)
    return [{"label": names[model.path], "size_bytes": model.size_bytes} | model.metrics for model in report.models]


def _chart(points: Sequence[Mapping[str, Any]], metric: str) -> Chart:
    label = metric_label(metric)
    title = f"Size against {label}"
    best = frontier(points, metric)
    rows = [
        (point["label"], format_bytes(point["size_bytes"]), metric_text(point, metric), "yes" if point in best else "")
        for point in sorted(points, key=lambda point: point["size_bytes"])
    ]
    table = Table(title, ("Model", "Size", label, "Frontier"), rows, frozenset({"Size", label}), None, MODEL_NAMES)
    better = "higher" if _QUALITY[metric] else "lower"
    alt = f"{len(points)} models by size and {label}, {better} is better; on the frontier: " + ", ".join(
        str(point["label"]) for point in best
    )
    note = (
        f"The line joins what no other beats: none that is as small has a {better} {label}."
        if len(best) > 1
        else f"{best[0]['label']} is the smallest, and none has a {better} {label}."
    )
    return Chart("pareto", title, f"{alt}.", table, partial(draw, points, metric), note)


def draw(points: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """A point for each model, and a line through those that none beats."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    figure = new_figure(3.6)
    axes = figure.subplots()
    best = frontier(points, metric)
    axes.plot([point["size_bytes"] for point in best], [point[metric] for point in best], "-",
              color=COLOURS["series-1"], linewidth=1.2, gid="frontier")  # fmt: skip
    largest = max(point["size_bytes"] for point in points)
    for point in points:
        place = point["size_bytes"], point[metric]
        colour = COLOURS["series-1" if point in best else "before"]
        axes.errorbar(*place, yerr=point.get(f"{metric}_se") or 0.0, fmt="o", markersize=6, elinewidth=1, color=colour)
        left = point["size_bytes"] < 0.6 * largest
        name = shorter(str(point.get("mark", point["label"])))
        axes.annotate(name, place, fontsize=8.5, xytext=(7 if left else -7, 6),
                      textcoords="offset points", ha="left" if left else "right")  # fmt: skip
    axes.set_xlim(0, 1.06 * largest)
    errors = [point.get(f"{metric}_se") or 0.0 for point in points]
    values = [point[metric] + sign * se for point, se in zip(points, errors, strict=True) for sign in (-1, 1)]
    spare = max(0.15 * (max(values) - min(values)), 0.01 * abs(max(values)), 1e-6)
    top = max(values) + spare
    axes.set_ylim(min(values) - spare, min(top, 1.0 + spare / 4) if is_fraction(metric) else top)
    axes.set_xlabel("Size")
    axes.set_ylabel(metric_label(metric))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value))))
    if is_fraction(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    return figure
