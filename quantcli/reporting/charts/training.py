"""The curve of training as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from quantcli.reporting.charts.base import COLOURS, Chart, legend_above, new_figure, svg
from quantcli.reporting.metric_labels import is_fraction, metric_label, metric_text
from quantcli.reporting.report import Report, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What a point of the curve holds beside metrics.
_NO_METRICS = frozenset({"step", "epoch", "loss", "held_out_loss", "learning_rate"})
#: Curves of no more points than this show each of them.
_FEW = 40
_PURPOSE = "--html with a training curve"


def charts(report: Report) -> list[Chart]:
    """The curve of a training, where there was one that has points."""
    training = report.details.get("training")
    if training is None or not has_curve(training):
        return []
    alt = "Loss and quality over the steps of training."
    columns = ("Step", "Loss", "Held-out loss")
    names = ("step", "loss", "held_out_loss")
    rows = [tuple(_cell(point.get(name)) for name in names) for point in training["curve"]]
    points = Table("Training curve", columns, rows, frozenset(columns))
    return [Chart("training", "Training curve", alt, points, partial(training_figure, training))]


def has_curve(training: Mapping[str, Any]) -> bool:
    """Whether anything was measured while training."""
    return any(_points(training["curve"], name)[0] for name in ("loss", "held_out_loss"))


def training_svg(training: Mapping[str, Any]) -> str | None:
    """The curve of ``Report.details["training"]`` as an SVG document, the same for the same curve; None without one.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return svg(partial(training_figure, training), _PURPOSE) if has_curve(training) else None


def training_figure(training: Mapping[str, Any]) -> Figure:
    """Loss over steps, and under it the first metric that was measured while training."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    curve: Sequence[Mapping[str, Any]] = training["curve"]
    models: Mapping[str, Mapping[str, float | None]] = training["models"]
    metric = _metric(curve)
    figure = new_figure(6 if metric else 3.6)
    rows: list[Axes] = figure.subplots(2 if metric else 1, sharex=True, squeeze=False)[:, 0].tolist()
    best = training["best_step"]
    _draw(rows[0], curve, "loss", "training", "training loss")
    _draw(rows[0], curve, "held_out_loss", "held-out", "held-out loss", best)
    _level(rows[0], models, "ptq", "loss")
    if metric:
        _draw(rows[1], curve, metric, "held-out", f"held-out {metric_label(metric)}", best)
        _level(rows[1], models, "original", metric)
        _level(rows[1], models, "ptq", metric)
    for axes, name in zip(rows, ("loss", metric or ""), strict=False):
        label = f"best step: {best:,}" if name == "loss" else None
        axes.axvline(best, color=COLOURS["best"], linewidth=1, linestyle=":", label=label, zorder=1)
        axes.set_ylabel("Loss" if name == "loss" else metric_label(name))
        _scale(axes, name)
        axes.margins(x=0.02, y=0.08)
        legend_above(axes)
    rows[-1].set_xlabel("Step")
    low, high = rows[-1].get_xlim()
    if high - low < 2:  # there are no fractions of steps to be seen
        rows[-1].set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    rows[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    figure.align_ylabels()
    return figure


def _metric(curve: Sequence[Mapping[str, Any]]) -> str | None:
    names = dict.fromkeys(name for point in curve for name in point if name not in _NO_METRICS)
    return next((name for name in names if _points(curve, name)[0]), None)


def _points(curve: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values where there is a finite value."""
    points = [(point["step"], point[name]) for point in curve if _finite(point.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def _cell(value: float | None) -> str:
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "-"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _draw(
    axes: Axes, curve: Sequence[Mapping[str, Any]], name: str, kind: str, label: str, best: int | None = None
) -> None:
    steps, values = _points(curve, name)
    if not steps:
        return
    marker = "o" if len(steps) <= _FEW else ""
    axes.plot(
        steps, values, color=COLOURS[kind], linewidth=1.2 if kind == "training" else 1.8, marker=marker, markersize=3,
        label=label, gid=name,
    )  # fmt: skip
    if best in steps:
        value = values[steps.index(best)]
        axes.plot(best, value, "o", markersize=8, markerfacecolor="none", color=COLOURS[kind], gid=f"{name}-best")


def _level(axes: Axes, models: Mapping[str, Mapping[str, float | None]], model: str, name: str) -> None:
    """A dashed line where a model that was not trained stands."""
    value = models.get(model, {}).get(name)
    if value is None or not _finite(value):
        return
    shown = f"{value:.3g}" if name == "loss" else metric_text({name: value}, name)
    dashes = (0, (6, 3)) if model == "original" else (0, (3, 2))
    label = f"{'PTQ' if model == 'ptq' else model}: {shown}"
    axes.axhline(value, color=COLOURS[model], linewidth=1.4, linestyle=dashes, label=label, gid=f"{name}-{model}")


def _scale(axes: Axes, name: str) -> None:
    """A logarithmic scale where values span more than a decade; percent for fractions."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    if is_fraction(name):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return
    lines: list[Any] = [line for line in axes.lines if line.get_gid()]
    values = [float(value) for line in lines for value in line.get_ydata()]
    decades = math.log10(max(values) / min(values)) if min(values) > 0 else 0
    if decades > 1:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
