"""The error of every layer, in the order of the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from quantcli.reporting.charts.base import COLOURS, MARKERS, Chart, legend_above, new_figure
from quantcli.reporting.metric_labels import decibel_text
from quantcli.reporting.report import LayerRow, Report, Table
from quantcli.reporting.tables.common import LAYER_NAMES, error_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Kinds of layers that have a colour of their own; more could not be told apart.
_KINDS = 7
_OTHERS = "others"
_NUMBERS = re.compile(r"\d+")
_PART = re.compile(r"[./]")


def charts(report: Report) -> list[Chart]:
    """One plot for the layers of each candidate whose error is known."""
    found = []
    for number, path in enumerate(dict.fromkeys(row.model for row in report.layers)):
        rows = in_order([row for row in report.layers if row.model == path and _is_shown(row, report)])
        if len(rows) > 1:
            found.append(_chart(f"layers-{number}", path, rows))
    return found


def _is_shown(row: LayerRow, report: Report) -> bool:
    """Whether an error is known; of a conversion that of layers which were quantized, not cast."""
    return row.sqnr_db is not None and (row.scheme is not None or report.command != "convert")


def in_order(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Layers as the model has them: by their place where the report tells it, else by the numbers in their names."""
    if all("order" in row.details for row in rows):
        return sorted(rows, key=lambda row: int(row.details["order"]))
    return sorted(rows, key=lambda row: [int(part) if part.isdigit() else part for part in _parts(row.name)])


def _parts(name: str) -> list[str]:
    """Text and numbers in turn, so that numbers only meet numbers."""
    return re.split(r"(\d+)", name)


def kinds_of(rows: Sequence[LayerRow]) -> list[str]:
    """What every layer is called but for numbers: its last part, or ``others`` where kinds are many."""
    names = [_kind(row.name) for row in rows]
    if len(set(names)) > len(names) / 2:
        return [_OTHERS] * len(names)  # a kind for each would tell nothing
    common = {kind for kind, _ in Counter(names).most_common(_KINDS)}
    return [name if name in common else _OTHERS for name in names]


def _kind(name: str) -> str:
    parts = [_NUMBERS.sub("", part).strip("_") for part in _PART.split(name)]
    telling = [part for part in parts if part and part not in ("weight", "bias")]
    return telling[-1] if telling else name


def _chart(name: str, path: str | None, rows: Sequence[LayerRow]) -> Chart:
    errors = [row.sqnr_db for row in rows]
    worst = min(rows, key=lambda row: row.sqnr_db or 0.0)
    alt = (
        f"Signal to noise of {len(rows)} layers in the order of the model; the worst is {worst.name} with "
        f"{decibel_text(worst.sqnr_db)}."
    )
    cells = [(row.name, row.scheme or "", decibel_text(row.sqnr_db)) for row in rows]
    title = "Error of every layer" if path is None else f"Error of every layer of {path}"
    table = Table(title, ("Layer", "Scheme", "SQNR"), cells, frozenset({"SQNR"}), None, LAYER_NAMES, error_bars(errors))
    note = "SQNR: signal to quantization noise, in dB. Higher is better; at 0 dB noise is as strong as the signal."
    return Chart(name, title, alt, table, partial(draw, rows), note)


def draw(rows: Sequence[LayerRow]) -> Figure:
    """A point for every layer, coloured by its kind, those of a kind joined; the worst is named."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(3.8)
    axes = figure.subplots()
    kinds = kinds_of(rows)
    shown = [kind for kind in dict.fromkeys(kinds) if kind != _OTHERS] + ([_OTHERS] if _OTHERS in kinds else [])
    for number, kind in enumerate(shown):
        points = [(index, row.sqnr_db or 0.0) for index, row in enumerate(rows) if kinds[index] == kind]
        joined = kind != _OTHERS and len(points) > 1 and len(shown) < len(rows)
        axes.plot(
            [x for x, _ in points], [y for _, y in points], MARKERS[number % 7], markersize=3.6, label=kind,
            color=COLOURS["best"] if kind == _OTHERS and len(shown) > 1 else COLOURS[f"series-{number % 7 + 1}"],
            linestyle="-" if joined else "none", linewidth=0.9, alpha=0.95, gid=f"kind-{number}",
        )  # fmt: skip
    place, worst = min(enumerate(rows), key=lambda pair: pair[1].sqnr_db or 0.0)
    left = place < len(rows) / 2
    axes.annotate(
        f"{worst.name}: {decibel_text(worst.sqnr_db)}", (place, worst.sqnr_db or 0.0), fontsize=8.5,
        xytext=(8 if left else -8, -4), textcoords="offset points", ha="left" if left else "right", va="top",
    )  # fmt: skip
    low, high = worst.sqnr_db or 0.0, max(row.sqnr_db or 0.0 for row in rows)
    if low < high / 3:  # else zero is far off, and would hide how layers differ
        low = min(low, 0.0)
    spare = max(high - low, 1.0)
    axes.set_ylim(low - 0.12 * spare, high + 0.06 * spare)
    axes.set_ylabel("SQNR in dB")
    axes.set_xlabel("Layer, in the order of the model")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    if len(shown) > 1:
        legend_above(axes)
    return figure
