"""Reports as HTML: sound pages that hold what the report holds, and the curve of training as it was."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.tiny_onnx import classifier, weights

from quantcli.cli.app import main
from quantcli.errors import MissingExtraError
from quantcli.reporting.charts.training import training_figure, training_svg
from quantcli.reporting.ci import write_markdown
from quantcli.reporting.html import page, write_html
from quantcli.reporting.report import GateRow, LayerRow, ModelRow, Report, Table
from quantcli.reporting.tables.common import gate_table
from quantcli.reporting.tables.convert import convert_tables, training_table
from quantcli.version import __version__

VOID = {"meta", "br", "hr", "img", "link", "input"}


def training(points: int = 24) -> dict[str, Any]:
    """A curve with a point each 50 steps, measured on held-out data at every second."""
    curve = []
    for step in range(50, 50 * points + 1, 50):
        measured = step % 100 == 0
        loss = 0.02 + 0.6 * math.exp(-step / 200)
        curve.append(
            {
                "step": step, "loss": loss, "learning_rate": 1e-3,
                "held_out_loss": 1.2 * loss if measured else None, "top1": 0.9 - 0.1 * loss if measured else None,
            }
        )  # fmt: skip
    return {
        "steps": 50 * points, "epochs": 2.0, "best_step": 100, "stopped": "finished", "loss": "distillation + labels",
        "models": {
            "original": {"loss": 0.0, "top1": 0.912}, "ptq": {"loss": 0.31, "top1": 0.8}, "qat": {"loss": 0.05}
        },
        "curve": curve,
    }  # fmt: skip


def conversion(**details: Any) -> Report:
    models = [ModelRow("a", "source", "safetensors", size_bytes=1000)]
    models.append(ModelRow("b", "artifact", "onnx", metrics={"size_ratio": 0.25}, details={"algorithm": "qat"}))
    return Report("convert", models, [LayerRow("fc", "int8", 1000, 250, 40.0)], details=details)


class Checker(HTMLParser):
    """Fails where tags do not nest; keeps tags, and text by the tag it stands in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def cells(self, kind: str) -> list[str]:
        return [text for tag, text in self.text if tag == kind]


def self_contained(checker: Checker) -> None:
    names = [name for name, _ in checker.tags]
    assert names.count("style") == 1
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    for _, attributes in checker.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href", "src"):
            assert (attributes.get(name) or "#").startswith("#")
    style = next(text for tag, text in checker.text if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_text_is_escaped_everywhere() -> None:
    bad = "<script>alert('&\"')</script>"
    report = Report(bad, [ModelRow(bad, "candidate")], gates=[GateRow(bad, bad, 1.0, passed=False)], warnings=[bad])
    table = Table(bad, ("Layer", bad), [(bad, bad)], frozenset({bad}), bad)
    text = page([table, gate_table(report)], report)
    checker = Checker(text)
    self_contained(checker)
    shown = "".join(text for tag, text in checker.text if tag != "style")
    # Title and heading; gate and warning above; title, caption, head, cells, note; the gate's row.
    assert shown.count(bad) == 2 + 3 + 6 + 2
    assert any(attributes.get("aria-label") == bad for _, attributes in checker.tags)


def test_a_page_holds_tables_with_numbers_to_the_right() -> None:
    tables = [
        Table("Facts", ("", "Value"), [("Size", "1 GB")]),
        Table("T", ("Layer", "Size"), [("fc", "12 kB")], frozenset({"Size"}), "a note"),
    ]
    checker = Checker(page(tables, Report("inspect")))
    self_contained(checker)
    assert checker.cells("th") == ["Layer", "Size"]  # a list of facts has no head
    assert checker.cells("td") == ["Size", "1 GB", "fc", "12 kB"]
    classes = [attributes.get("class") for tag, attributes in checker.tags if tag in ("th", "td")]
    assert classes == [None, None, None, "number", None, "number"]
    assert sum(attributes.get("class") == "wide" for _, attributes in checker.tags) == 2
    assert "a note" in checker.cells("p")
    assert any(f"quantcli {__version__}" in text for text in checker.cells("footer"))
    assert checker.cells("caption") == ["Facts", "T"]
    assert checker.cells("title") == checker.cells("h1") == ["quantcli inspect"]
    assert not any("⚠" in text or "✓" in text or "✗" in text for _, text in checker.text)


def test_gates_and_warnings_are_told_in_words() -> None:
    report = Report("eval", [ModelRow("m", "candidate")], warnings=["Few samples."])
    report.gates = [GateRow("top1 >= 0.9", "m", 0.95, passed=True), GateRow("kl_nats <= 0.1", "m", 0.3, passed=False)]
    checker = Checker(page([gate_table(report)], report))
    assert "✗ 1 of 2 gates FAILED:" in checker.cells("p")
    assert checker.cells("li") == ["kl_nats <= 0.1: m", "Few samples."]
    assert {"✓ passed", "✗ FAILED"} <= set(checker.cells("td"))
    assert [attributes["class"] for tag, attributes in checker.tags if tag == "td" and "class" in attributes] == [
        "number", "passed", "number", "failed",
    ]  # fmt: skip
    report.gates.pop()
    assert "✓ All gates passed: 1" in Checker(page([gate_table(report)], report)).cells("p")


def test_the_curve_stands_in_the_page_and_beside_it(tmp_path: Path) -> None:
    report = conversion(training=training())
    write_html(convert_tables(report), report, tmp_path / "report.html")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report-training.svg"}
    root = ET.parse(tmp_path / "report-training.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    checker = Checker(text)
    self_contained(checker)
    assert [tag for tag, _ in checker.tags].count("svg") == 1
    assert "Training curve" in checker.cells("h2")
    assert "Quantization-aware training" in checker.cells("h2")
    # The same plot, in colours that change in the dark: each of them is a property of the page.
    inside = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + len("</svg>")])
    paths = "{http://www.w3.org/2000/svg}path"
    assert [path.get("d") for path in inside.iter(paths)] == [path.get("d") for path in root.iter(paths)]
    styles = " ".join(element.get("style") or "" for element in inside.iter())
    assert not re.search(r"#[0-9a-f]{6}", styles)
    used = set(re.findall(r"var\((--[a-z-]+)\)", styles))
    assert len(used) == 8
    for name in used:
        assert text.count(f"{name}: #") == 3  # in light, in dark, and on paper


def test_pages_and_plots_are_the_same_bytes_in_every_process() -> None:
    code = """if True:
        import json, sys
        from quantcli.reporting.charts.training import training_svg
        print(training_svg(json.load(sys.stdin)), end="")"""
    curve = training()
    wanted = training_svg(curve)
    assert wanted
    assert training_svg(curve) == wanted
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(curve), capture_output=True, text=True, check=True
    )
    assert done.stdout == wanted
    assert "<dc:" not in wanted  # no date, no version


def test_the_plot_shows_the_curve() -> None:
    told = training()
    figure = training_figure(told)
    loss, quality = figure.axes
    lines = {str(line.get_gid()): line for axes in figure.axes for line in axes.lines if line.get_gid()}
    for axes, name in ((loss, "loss"), (loss, "held_out_loss"), (quality, "top1")):
        points = [(point["step"], point[name]) for point in told["curve"] if point[name] is not None]
        assert lines[name].axes is axes
        assert list(map(tuple, lines[name].get_xydata())) == points
    assert tuple(lines["held_out_loss-best"].get_xydata()[0]) == (100, told["curve"][1]["held_out_loss"])
    assert tuple(lines["top1-best"].get_xydata()[0]) == (100, told["curve"][1]["top1"])
    assert {lines["top1-original"].get_ydata()[0], lines["top1-ptq"].get_ydata()[0]} == {0.912, 0.8}
    assert lines["loss-ptq"].get_ydata()[0] == 0.31
    assert (loss.get_yscale(), quality.get_yscale()) == ("log", "linear")
    names = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert names == [
        "training loss", "held-out loss", "PTQ: 0.31", "best step: 100",
        "held-out Top-1", "original: 91.20%", "PTQ: 80.00%",
    ]  # fmt: skip


def test_the_drawn_path_is_the_curve() -> None:
    told = training()
    root = ET.fromstring(training_svg(told) or "")
    (group,) = (element for element in root.iter() if element.get("id") == "loss")
    (path,) = (each for each in group if each.tag.endswith("path"))
    drawn = np.array([list(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path.get("d") or "")])
    steps = [point["step"] for point in told["curve"]]
    heights = [-math.log(point["loss"]) for point in told["curve"]]
    # Pictures run downwards, and the scale is logarithmic; a line through both leaves nothing over.
    for wanted, got in ((steps, drawn[:, 0]), (heights, drawn[:, 1])):
        assert np.abs(np.polyval(np.polyfit(wanted, got, 1), wanted) - got).max() < 1e-3
    assert drawn[0, 1] < drawn[-1, 1]


def test_curves_that_are_short_or_not_whole() -> None:
    told = training(1)
    told["curve"][0]["loss"] = float("nan")
    assert training_svg(told) is None
    assert training_svg(told | {"curve": []}) is None
    told = training(2)
    del told["models"]["original"]
    for point in told["curve"]:
        del point["top1"]
    told["curve"][0]["loss"] = 0.0
    (axes,) = training_figure(told).axes
    assert axes.get_yscale() == "linear"
    assert ET.fromstring(training_svg(told) or "")
    odd = training(2)
    odd["curve"] = [
        {(r"<&$\nonsense$" if key == "top1" else key): value for key, value in point.items()} for point in odd["curve"]
    ]
    assert ET.fromstring(training_svg(odd) or "")


def test_plots_leave_the_settings_of_others_alone() -> None:
    import matplotlib as mpl

    plain = training_svg(training())
    with mpl.rc_context({"xtick.labelsize": 30, "lines.markeredgewidth": 5}):
        assert training_svg(training()) == plain
    code = """if True:
        import json, sys
        import matplotlib
        from quantcli.reporting.charts.training import training_svg
        def settings():  # to ask for the backend is to choose one
            return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != 'backend'}
        before = settings()
        assert training_svg(json.load(sys.stdin))
        assert settings() == before
        assert 'matplotlib.pyplot' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], input=json.dumps(training()), text=True, check=True)


def test_without_matplotlib_the_page_has_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = conversion(training=training())
    with pytest.raises(MissingExtraError, match="--html with a training curve needs the package matplotlib") as caught:
        write_html(convert_tables(report), report, tmp_path / "report.html")
    assert "quantcli[report]" in str(caught.value)
    # What hours of training found is there all the same.
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "Quantization-aware training" in (tmp_path / "report.html").read_text(encoding="utf-8")
    plain = conversion()
    write_html(convert_tables(plain), plain, tmp_path / "plain.html")
    assert (tmp_path / "plain.html").is_file()


def test_the_table_of_training(tmp_path: Path) -> None:
    told = training()
    told["models"]["qat"] |= {"top1": 0.905, "top1_se": 0.01, "unknown": None}
    report = conversion(training=told)
    table = training_table(report)
    assert table is not None
    assert table.columns == ("Model", "Held-out loss", "Top-1")
    assert table.rows == [("original", "0", "91.20%"), ("PTQ", "0.31", "80.00%"), ("QAT", "0.05", "90.50% +- 1.00%")]
    assert table.note is not None
    assert table.note.startswith(
        "1,200 steps, 2 epochs; ran to its end, best at step 100. Loss: distillation + labels."
    )
    assert table in convert_tables(report)
    write_markdown(convert_tables(report), report, tmp_path / "report.md")
    assert "| PTQ | 0.31 | 80.00% |" in (tmp_path / "report.md").read_text(encoding="utf-8")

    early = told | {"stopped": "early", "epochs": 1.0, "models": {"qat": {"loss": None}}}
    table = training_table(conversion(training=early))
    assert table is not None
    assert (table.columns, table.rows) == (("Model", "Held-out loss"), [("QAT", "-")])
    assert "1 epoch; stopped early," in (table.note or "")
    assert training_table(conversion()) is None
    assert "Quantization-aware training" not in [each.title for each in convert_tables(conversion())]


def test_files_are_whole_or_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    link = tmp_path / "link.html"
    link.symlink_to(target)
    write_html([], Report("inspect"), link)
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:10])
        raise OSError(28, "No space left on device", str(self))

    before = target.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left") as caught:
        write_html([], Report("eval"), target)
    assert caught.value.filename == str(target)
    assert target.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "link.html"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({f"layers.{i}.<b>.weight": torch.randn(32, 128) for i in range(3)}, path)
    return path


def test_inspect_and_convert_write_pages(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, again = (tmp_path / name for name in ("first.html", "second.html", "again.html"))
    look = ["inspect", str(checkpoint), "--layers", "--scheme", "int4", "--html"]
    assert main([*look, str(first)]) == 0
    assert main([*look, str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
    out = ["-o", str(tmp_path / "out"), "--scheme", "int8", "--json", "--html", str(second)]
    assert main(["convert", str(checkpoint), *out]) == 0
    for path, name, cell in (
        (first, "inspect", "layers.{0-2}.<b>.weight x 3"),
        (second, "convert", "layers.{0-2}.<b>.weight x 3"),
    ):
        checker = Checker(path.read_text(encoding="utf-8"))
        self_contained(checker)
        assert checker.cells("h1") == [f"quantcli {name}"]
        assert cell in checker.cells("td")
    assert main(["inspect", str(checkpoint), "--html", str(tmp_path / "no" / "report.html")]) == 3
    assert "no/report.html cannot be written: No such file" in capsys.readouterr().err
    assert main(["inspect", str(checkpoint), "--html", str(tmp_path)]) == 3
    assert not list(tmp_path.glob("*.svg"))


def test_statistics_and_failed_gates_are_in_the_page(tmp_path: Path) -> None:
    model, data, html = (str(tmp_path / name) for name in ("model.onnx", "data.npz", "page.html"))
    classifier(Path(model), *weights())
    np.savez(data, x=np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32))
    common = ["--data", data, "--html", html, "-q"]
    statistics = ["-o", str(tmp_path / "statistics.safetensors"), "--method", "minmax"]
    assert main(["calibrate", model, *statistics, *common]) == 0
    checker = Checker(Path(html).read_text(encoding="utf-8"))
    self_contained(checker)
    assert "minmax" in checker.cells("td")
    gates = ["--require", "size_ratio < 0.5", "--require", "cosine >= 0"]
    assert main(["eval", model, model, *gates, *common]) == 1
    checker = Checker(Path(html).read_text(encoding="utf-8"))
    self_contained(checker)
    assert "✗ 1 of 2 gates FAILED:" in checker.cells("p")
    assert {"✓ passed", "✗ FAILED"} <= set(checker.cells("td"))
