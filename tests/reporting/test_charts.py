"""Plots of a report's page: which there are, what their tables hold, and that what is drawn is what was measured."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reporting.test_html import Checker, conversion, self_contained, training

from quantcli.core.histogram import BINS, of_activation, of_weight
from quantcli.reporting.charts import charts_of, latency, layers, pareto, sizes
from quantcli.reporting.charts.base import COLOURS, DARK, Chart, shorter
from quantcli.reporting.headline import headline
from quantcli.reporting.html import page, write_html
from quantcli.reporting.report import LayerRow, ModelRow, Report
from quantcli.reporting.tables.convert import convert_tables


def quantized() -> Report:
    """A conversion of two blocks, listed as a file lists them, with an embedding that is cast."""
    report = conversion()
    report.layers = [
        LayerRow(f"m.layers.{i}.{name}.weight", "int4", 400, 100, 20.0 - i, details={"role": "linear"})
        for i in (0, 1, 10, 2)
        for name in ("up", "down")
    ]
    report.layers.append(LayerRow("embed.weight", None, 800, 400, 57.0, details={"role": "embedding"}))
    values = np.linspace(-1, 1, 1000)
    weight = of_weight("m.layers.10.up.weight", lambda: [values], lambda: [values.clip(-0.5, 0.75)], 10.0)
    activation = of_activation("relu", np.arange(4.0), np.array([5, 3, 1, 1]), (0.0, 2.5), 40.0)
    assert weight and activation
    report.details["histograms"] = [weight.to_json(), activation.to_json()]
    report.details["training"] = training()
    return report


def evaluated(**reference: float) -> Report:
    models = [ModelRow("o/m", "reference", "onnx", None, "a", 400, {"top1": 0.9, "top1_se": 0.01} | reference)]
    for name, size, top1 in (("small", 100, 0.7), ("worse", 200, 0.6), ("good", 200, 0.88)):
        models.append(ModelRow(f"o/{name}", "candidate", "onnx", "int8", None, size, {"top1": top1, "kl_nats": 0.1}))
    return Report("eval", models)


def timed() -> Report:
    def model(path: str, factor: float) -> ModelRow:
        percentiles = {str(percent): factor * (1 + percent) for percent in range(0, 101, 5)}
        batches = [{"batch_size": size, "latency_ms_percentiles": percentiles} for size in (1, 8)]
        return ModelRow(path, "reference", size_bytes=10, metrics={"latency_ms_p50": 1.0}, details={"batches": batches})

    return Report("bench", [model("a", 1.0), model("b", 0.5)])


def every_report() -> list[Report]:
    return [quantized(), evaluated(), timed()]


def every_chart() -> list[Chart]:
    return [chart for report in every_report() for chart in charts_of(report)]


def test_every_report_has_its_plots() -> None:
    names = [[chart.name for chart in charts_of(report)] for report in every_report()]
    assert names == [
        ["sizes", "layers-0", "histograms-weight", "histograms-activation", "training"],
        ["sizes", "pareto"],
        ["sizes", "latency-0", "latency-1"],
    ]
    assert charts_of(Report("inspect", [ModelRow("m", "reference")])) == []


def test_every_plot_is_a_picture_with_a_name_a_table_and_ids_of_its_own() -> None:
    for report in every_report():
        seen: set[str] = set()
        for chart in charts_of(report):
            assert chart.alt.endswith(".")
            assert chart.table.rows
            assert {len(row) for row in chart.table.rows} == {len(chart.table.columns)}
            svg = chart.to_svg()
            assert svg == chart.to_svg()
            ids = set(re.findall(r'\sid="([^"]+)"', svg))
            assert not ids & seen
            seen |= ids
            assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)) <= ids
            ET.fromstring(svg)
            # Every colour is one that a page can exchange.
            assert set(re.findall(r"#[0-9a-f]{6}", svg)) <= set(COLOURS.values())
            assert "mathdefault" not in svg


def test_colours_are_told_apart_and_have_counterparts_in_the_dark() -> None:
    assert COLOURS.keys() == DARK.keys()
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_bytes_by_role() -> None:
    (chart,) = sizes.charts(quantized())
    assert chart.table.columns == ("Role", "Before", "After")
    assert chart.table.rows == [("linear", "3.2 kB", "800 B"), ("embedding", "800 B", "400 B")]
    assert chart.note == "In all: 4 kB before, 1.2 kB after."
    plans = [
        LayerRow("a", None, 100, after, details={"role": "linear", "plan": plan})
        for plan, after in (("x", 50), ("y", 25))
    ]
    (chart,) = sizes.charts(Report("inspect", [ModelRow("m", "reference")], plans))
    assert chart.table.columns == ("Role", "As it is", "x", "y")
    assert chart.table.rows == [("linear", "100 B", "50 B", "25 B")]


def test_layers_come_in_the_order_of_the_model() -> None:
    (chart,) = layers.charts(quantized())
    assert [row[0] for row in chart.table.rows][::2] == [f"m.layers.{i}.down.weight" for i in (0, 1, 2, 10)]
    assert "the worst is m.layers.10.down.weight with 10.0 dB" in chart.alt
    rows = [
        LayerRow(name, "int8", 1, 1, 1.0, details={"order": order}) for name, order in (("b", 2), ("z", 0), ("a", 1))
    ]
    assert [row.name for row in layers.in_order(rows)] == ["z", "a", "b"]
    mixed = [LayerRow(name, "int8", 1, 1, 1.0) for name in ("1.weight", "a.1", "conv")]
    assert len(layers.in_order(mixed)) == 3  # names that begin with numbers meet names that do not


def test_layers_are_coloured_by_what_they_are_called() -> None:
    rows = [LayerRow(f"m.{i}.{name}.weight", "int4", 1, 1, 1.0) for i in range(3) for name in ("up", "down")]
    assert layers.kinds_of(rows) == ["up", "down"] * 3
    assert set(layers.kinds_of([LayerRow(f"{i}.weight", "int4", 1, 1, 1.0) for i in range(4)])) == {"others"}
    many = [LayerRow(f"m.{i}.{name}", "x", 1, 1, 1.0) for name in "abcdefghij" for i in range(3)]
    assert len(set(layers.kinds_of(many))) == 8


def test_points_are_the_errors() -> None:
    rows = layers.in_order([row for row in quantized().layers if row.scheme])
    figure = layers.draw(rows)
    lines = {str(line.get_label()): line.get_xydata() for line in figure.axes[0].lines}
    assert lines["down"].tolist() == [[0, 20.0], [2, 19.0], [4, 18.0], [6, 10.0]]


def test_the_frontier_is_what_none_beats() -> None:
    points = [
        {"label": name, "size_bytes": size, "top1": top1, "kl_nats": 1 - top1}
        for name, size, top1 in (("a", 100, 0.7), ("b", 200, 0.6), ("c", 200, 0.88), ("d", 400, 0.9), ("e", 500, 0.9))
    ]
    assert [point["label"] for point in pareto.frontier(points, "top1")] == ["a", "c", "d"]
    assert [point["label"] for point in pareto.frontier(points, "kl_nats")] == ["a", "c", "d"]
    (chart,) = pareto.charts(evaluated())
    assert chart.table.rows == [
        ("small", "100 B", "70.00%", "yes"),
        ("worse", "200 B", "60.00%", ""),
        ("good", "200 B", "88.00%", "yes"),
        ("m", "400 B", "90.00% +- 1.00%", "yes"),
    ]
    report = Report(
        "convert",
        details={
            "budget": {
                "candidates": [
                    {
                        "layers": {f"int{bits}": 9},
                        "size_bytes": bits,
                        "estimate": 0.5,
                        "held_out": {"kl_nats": 1 / bits},
                    }
                    for bits in (4, 8)
                ]
            }
        },
    )
    (chart,) = pareto.charts(report)
    assert [row[:3] for row in chart.table.rows] == [("9 int4", "4 B", "0.25"), ("9 int8", "8 B", "0.125")]
    # Of a reference without the metric there is no point.
    assert [row[0] for row in pareto.charts(evaluated(top1=None))[0].table.rows] == ["small", "worse", "good"]  # type: ignore[arg-type]


def test_curves_of_latency_are_the_percentiles() -> None:
    charts = latency.charts(timed())
    assert charts[0].table.rows == [
        ("a", "1", "26", "51", "76", "91", "101"),
        ("b", "0.5", "13", "25.5", "38", "45.5", "50.5"),
    ]
    figure = charts[0].draw()
    line = next(line for line in figure.axes[0].lines if line.get_gid() == "model-0")
    assert [tuple(point) for point in line.get_xydata()][:2] == [(1.0, 0.0), (6.0, 0.05)]


def test_histograms_hold_every_value_and_the_range_of_the_codes() -> None:
    values = np.array([-2.0, -1.0, 0.0, 1.0, np.nan, np.inf])
    found = of_weight("w", lambda: [values[:3], values[3:]], lambda: [values[1:3], np.array([3.0])], 12.0)
    assert found is not None
    assert (found.low, found.high, found.range) == (-2.0, 3.0, (-1.0, 3.0))
    assert (sum(found.counts), sum(found.counts_after or []), len(found.counts)) == (4, 3, BINS)
    constant = of_weight("w", lambda: [np.ones(5)], lambda: [np.ones(5)], None)
    assert constant is not None and sum(constant.counts) == 5
    assert of_weight("w", lambda: [np.array([np.nan])], lambda: [np.ones(1)], None) is None
    chart = next(chart for chart in every_chart() if chart.name == "histograms-weight")
    name, smallest, largest, low, high, outside, sqnr = chart.table.rows[0]
    assert (name, smallest, largest, low, high, sqnr) == (
        "m.layers.10.up.weight", "-1", "1", "-0.5", "0.75", "10.0 dB",
    )  # fmt: skip
    assert float(outside.removesuffix("%")) == pytest.approx(37.5, abs=1.5)


def test_a_page_says_what_was_asked_and_what_came_out(tmp_path: Path) -> None:
    report = quantized()
    report.models[1].manifest = {"quantcli": "0.1.0", "layers": {"a": {}, "b": {}}, "scheme": "<int4>"}
    asked = "quantcli convert a -o 'b <c>'"
    write_html(convert_tables(report), report, tmp_path / "page.html", asked)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    checker = Checker(text)
    self_contained(checker)
    assert asked in checker.cells("code")
    assert "4.0x smaller" in checker.cells("strong")
    assert [attributes.get("aria-label") for _, attributes in checker.tags if attributes.get("role") == "img"] == [
        chart.alt for chart in charts_of(report)
    ]
    assert "Manifest of b" in checker.cells("h2")
    assert '"scheme": "<int4>"' in "".join(checker.cells("pre"))
    assert "2 layers, told in the tables above" in "".join(checker.cells("pre"))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert len(checker.cells("caption")) == [tag for tag, _ in checker.tags].count("table")
    write_html(convert_tables(report), report, tmp_path / "again.html", asked)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def test_without_matplotlib_a_page_has_the_numbers_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = evaluated()
    write_html([], report, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<svg" not in text
    assert "Plots need matplotlib" in text
    assert "<details open>" in text.replace(' class="short"', "")
    assert "88.00%" in Checker(text).cells("td")


def test_the_json_document_does_not_repeat_manifests() -> None:
    report = quantized()
    report.models[1].manifest = {"quantcli": "0.1.0"}
    assert "manifest" not in report.to_dict()["models"][1]


@pytest.mark.parametrize(
    ("report", "figures"),
    [
        (quantized(), ["4.0x smaller", "8 layers", "10.0 dB"]),
        (evaluated(), ["70.00%", "0.1", "60.00%", "0.1", "88.00%", "0.1"]),
        (
            Report("inspect", [ModelRow("m", "reference", size_bytes=1000, details={"parameters": 250})],
                   details={"schemes": [{"scheme": "int4", "applies": True, "size_bytes": 250, "size_ratio": 0.25,
                                         "quantized_tensors": 1}, {"scheme": "nf4", "applies": False}]}),
            ["1 kB", "250 B"],
        ),
        (Report("bench"), []),
    ],
)  # fmt: skip
def test_the_figures_on_top(report: Report, figures: list[str]) -> None:
    assert [figure for _, figure, _ in headline(report)] == figures


def test_long_names_lose_their_middle_on_axes() -> None:
    assert shorter("short") == "short"
    long: Any = shorter("a" * 50 + "end", 20)
    assert (len(long), long[-3:]) == (20, "end")
    assert page([], evaluated())
