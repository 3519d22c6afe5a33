"""The plots of a report's page, one file each: what of a report they show, as a picture and as a table."""

from __future__ import annotations

from quantcli.reporting.charts import histograms, latency, layers, pareto, sizes, training
from quantcli.reporting.charts.base import Chart
from quantcli.reporting.report import Report

#: In the order of the page.
CHARTS = (sizes.charts, pareto.charts, layers.charts, histograms.charts, latency.charts, training.charts)


def charts_of(report: Report) -> list[Chart]:
    """Every plot that a report has something to show for."""
    return [chart for charts in CHARTS for chart in charts(report)]
