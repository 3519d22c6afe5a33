"""A report as one HTML page: no scripts, nothing to fetch, readable in light and in dark, on paper and aloud."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from quantcli.errors import MissingExtraError
from quantcli.reporting.charts import charts_of
from quantcli.reporting.charts.base import COLOURS, DARK, Chart, require_matplotlib
from quantcli.reporting.charts.training import training_svg
from quantcli.reporting.headline import headline
from quantcli.reporting.page_style import STYLE
from quantcli.reporting.report import ModelRow, Report, Table
from quantcli.system.files import whole_file
from quantcli.version import __version__

#: What matplotlib writes into a plot: inside a page it would be for all of the page.
_OWN_STYLE = re.compile(r"\s*<defs>\s*<style\b.*?</style>\s*</defs>", re.DOTALL)
#: Entries of a manifest that would fill pages, and what stands for them.
_LONG = {"layers": "{count} layers, told in the tables above", "calibration_fingerprint": "a sketch of the data"}
#: Rows of a table that is printed though it is folded.
_SHORT = 24
#: A chart and its picture.
Drawn = tuple[Chart, str]


def write_html(tables: Sequence[Table], report: Report, path: Path, asked: str | None = None) -> None:
    """Write a report as a page, and the curve of training, if there is one, also beside it.

    Without matplotlib the page has the numbers of its plots alone. ``asked`` is the command line.

    Raises:
        MissingExtraError: there is a curve, and matplotlib is not installed. The page is written without it.
    """
    charts = charts_of(report)
    training = report.details.get("training")
    try:
        require_matplotlib()
    except MissingExtraError:
        # Training takes hours: what it found is not to be lost over a picture.
        _write(path, page(tables, report, [(chart, "") for chart in charts], asked))
        if training is not None:
            training_svg(training)
        return
    _write(path, page(tables, report, [(chart, chart.to_svg()) for chart in charts], asked))
    plot = None if training is None else training_svg(training)
    if plot is not None and path.is_file():
        _write(path.with_name(f"{path.stem}-training.svg"), plot)


def page(tables: Sequence[Table], report: Report, drawn: Sequence[Drawn] = (), asked: str | None = None) -> str:
    """The HTML document: what was asked and what came out, plots, tables, and what artifacts say of themselves."""
    title = escape(f"quantcli {report.command}")
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta name="generator" content="quantcli {escape(__version__)}">',
        f"<title>{title}</title>",
        f"<style>{STYLE % {'light': _properties(COLOURS), 'dark': _properties(DARK)}}</style>",
        "</head>",
        "<body>",
        "<header>",
        f"<h1>{title}</h1>",
        *([f'<p class="asked"><code>{escape(asked)}</code></p>'] if asked else []),
        *_verdict(report),
        *_headline(report),
        "</header>",
        "<main>",
        *_warnings(report),
    ]
    if drawn and not all(svg for _, svg in drawn):
        lines.append(
            '<p class="note">Plots need matplotlib, which is not installed: pip install "quantcli[report]"</p>'
        )
    for chart, svg in drawn:
        lines += _figure(chart, svg)
    for table in tables:
        lines += _table(table)
    for model in report.models:
        lines += _manifest(model)
    lines += [
        "</main>",
        f'<footer class="note">Written by quantcli {escape(__version__)}.</footer>',
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(lines)


def _properties(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _verdict(report: Report) -> Iterator[str]:
    """Whether the gates hold, in words; which do not."""
    failed = [gate for gate in report.gates if not gate.passed]
    if failed:
        yield f'<p class="failed">✗ {len(failed)} of {len(report.gates)} gates FAILED:</p>'
        yield "<ul>"
        yield from (f"<li>{escape(gate.require)}: {escape(gate.model)}</li>" for gate in failed)
        yield "</ul>"
    elif report.gates:
        yield f'<p class="passed">✓ All gates passed: {len(report.gates)}</p>'


def _headline(report: Report) -> Iterator[str]:
    facts = headline(report)
    if facts:
        yield '<dl class="headline">'
        for name, figure, more in facts:
            yield f"<div><dt>{escape(name)}</dt><dd><strong>{escape(figure)}</strong> {escape(more)}</dd></div>"
        yield "</dl>"


def _warnings(report: Report) -> Iterator[str]:
    if report.warnings:
        yield '<section class="warnings">'
        yield "<h2>⚠ Warnings</h2>"
        yield "<ul>"
        yield from (f"<li>{escape(warning)}</li>" for warning in report.warnings)
        yield "</ul>"
        yield "</section>"


def _table(table: Table) -> Iterator[str]:
    yield "<section>"
    yield f"<h2>{escape(table.title)}</h2>"
    yield from _grid(table)
    yield "</section>"


def _grid(table: Table) -> Iterator[str]:
    """A table; one whose first column has no name is a list of facts, and needs no head."""
    right = [column in table.right for column in table.columns]
    # To be scrolled with the keyboard as well.
    yield f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}">'
    yield "<table>"
    yield f'<caption class="unseen">{escape(table.title)}</caption>'
    if any(table.columns[:1]):
        heads = [_cell("th", name, number) for name, number in zip(table.columns, right, strict=True)]
        heads += [_cell("th", table.bars.name, False)] if table.bars else []
        yield f"<thead><tr>{''.join(heads)}</tr></thead>"
    yield "<tbody>"
    for index, row in enumerate(table.rows):
        cells = [_cell("td", text, number) for text, number in zip(row, right, strict=True)]
        cells += [_bar(table.bars.shares[index])] if table.bars else []
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody>"
    yield "</table>"
    yield "</div>"
    note = " ".join(filter(None, (table.note, table.bars.meaning if table.bars else None)))
    if note:
        yield f'<p class="note">{escape(note)}</p>'


def _cell(tag: str, text: str, number: bool) -> str:
    """A cell; the result of a gate is told by its sign and word, not by colour alone."""
    sign = {"passed": "✓ ", "FAILED": "✗ "}.get(text, "")
    kind = "number" if number else text.lower() if sign else ""
    attributes = (' scope="col"' if tag == "th" else "") + (f' class="{kind}"' if kind else "")
    return f"<{tag}{attributes}>{sign}{escape(text)}</{tag}>"


def _bar(share: float | None) -> str:
    """A bar for the eye alone: its number stands in another cell."""
    inner = "" if not share else f'<span class="bar" style="width: {100 * share:.0f}%"></span>'
    return f'<td class="bars" aria-hidden="true">{inner}</td>'


def _figure(chart: Chart, svg: str) -> Iterator[str]:
    """The plot inside the page, in the page's colours, which change in the dark, and its numbers."""
    yield "<section>"
    yield f"<h2>{escape(chart.title)}</h2>"
    if svg:
        # The plot has a name as a whole; its parts are not to be read aloud.
        picture = _OWN_STYLE.sub("", svg).replace("<svg ", '<svg aria-hidden="true" ', 1)
        for name, colour in COLOURS.items():
            picture = picture.replace(f": {colour}", f": var(--{name})")
        yield "<figure>"
        yield f'<div class="plot" role="img" aria-label="{escape(chart.alt)}">'
        yield picture
        yield "</div>"
        if chart.note:
            yield f"<figcaption>{escape(chart.note)}</figcaption>"
        yield "</figure>"
    # On paper the numbers of a plot are there as well, where they do not fill pages.
    short = ' class="short"' if len(chart.table.rows) <= _SHORT else ""
    yield f"<details{short}{'' if svg else ' open'}>"
    yield f'<summary>The numbers<span class="unseen"> of {escape(chart.title)}</span></summary>'
    yield from _grid(chart.table)
    yield "</details>"
    yield "</section>"


def _manifest(model: ModelRow) -> Iterator[str]:
    """What an artifact says of itself."""
    if not model.manifest:
        return
    shown = {key: value for key, value in model.manifest.items() if key not in _LONG}
    for key, text in _LONG.items():
        if model.manifest.get(key):
            shown[key] = text.format(count=len(model.manifest[key]))
    yield "<section>"
    yield f"<h2>Manifest of {escape(model.path)}</h2>"
    yield "<details>"
    yield "<summary>What the artifact says of itself</summary>"
    yield f'<pre tabindex="0">{escape(json.dumps(shown, indent=2, ensure_ascii=False))}</pre>'
    yield "</details>"
    yield "</section>"


def _write(path: Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", "replace"))
