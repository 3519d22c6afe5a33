"""A report as one HTML page: no scripts, nothing to fetch, readable in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from quantcli.errors import MissingExtraError
from quantcli.reporting.report import Report, Table
from quantcli.reporting.training_plot import COLOURS, training_svg
from quantcli.system.files import whole_file
from quantcli.version import __version__

#: Colours of the plot in the dark.
_DARK = {
    "paper": "#14181d",
    "ink": "#e4e8ec",
    "faint": "#2f363d",
    "best": "#8b949e",
    "training": "#3c6ca8",
    "held-out": "#7ab8ff",
    "original": "#56c26e",
    "ptq": "#f0a060",
}
_STYLE = """
:root { color-scheme: light dark; %(light)s --good: #1a6b33; --bad: #b3261e; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { %(dark)s --good: #56c26e; --bad: #ff8a80; --warn: #e3b341; } }
body { margin: 2rem auto; padding: 0 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--faint); text-align: left; vertical-align: top; }
thead th { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.note { font-size: 0.85rem; opacity: 0.8; }
.passed { color: var(--good); }
.failed { color: var(--bad); font-weight: bold; }
.warnings { border-left: 0.25rem solid var(--warn); padding-left: 1rem; }
.warnings h2 { color: var(--warn); }
figure { margin: 0; }
svg { max-width: 100%%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
"""
#: What matplotlib writes into a plot: inside a page it would be for all of the page.
_OWN_STYLE = re.compile(r"\s*<defs>\s*<style\b.*?</style>\s*</defs>", re.DOTALL)


def write_html(tables: Sequence[Table], report: Report, path: Path) -> None:
    """Write a report as a page, and the curve of training, if there is one, also beside it.

    Raises:
        MissingExtraError: there is a curve, and matplotlib is not installed. The page is written without it.
    """
    training = report.details.get("training")
    try:
        plot = None if training is None else training_svg(training)
    except MissingExtraError:
        # Training takes hours: what it found is not to be lost over a picture.
        _write(path, page(tables, report, None))
        raise
    _write(path, page(tables, report, plot))
    if plot is not None and path.is_file():
        _write(path.with_name(f"{path.stem}-training.svg"), plot)


def page(tables: Sequence[Table], report: Report, plot: str | None) -> str:
    """The HTML document."""
    title = escape(f"quantcli {report.command}")
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="generator" content="quantcli {escape(__version__)}">',
        f"<title>{title}</title>",
        f"<style>{_STYLE % {'light': _properties(COLOURS), 'dark': _properties(_DARK)}}</style>",
        "</head>",
        "<body>",
        f"<h1>{title}</h1>",
        *_verdict(report),
        *_warnings(report),
    ]
    for table in tables:
        lines += _table(table)
    if plot is not None:
        lines += _figure(plot)
    lines += [f'<p class="note">Written by quantcli {escape(__version__)}.</p>', "</body>", "</html>", ""]
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


def _warnings(report: Report) -> Iterator[str]:
    if report.warnings:
        yield '<section class="warnings">'
        yield "<h2>⚠ Warnings</h2>"
        yield "<ul>"
        yield from (f"<li>{escape(warning)}</li>" for warning in report.warnings)
        yield "</ul>"
        yield "</section>"


def _table(table: Table) -> Iterator[str]:
    """A table; one whose first column has no name is a list of facts, and needs no head."""
    right = [column in table.right for column in table.columns]
    yield "<section>"
    yield f"<h2>{escape(table.title)}</h2>"
    # To be scrolled with the keyboard as well.
    yield f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}">'
    yield "<table>"
    if any(table.columns[:1]):
        heads = (_cell("th", name, number) for name, number in zip(table.columns, right, strict=True))
        yield f"<thead><tr>{''.join(heads)}</tr></thead>"
    yield "<tbody>"
    for row in table.rows:
        head, *cells = (_cell("td", text, number) for text, number in zip(row, right, strict=True))
        yield f"<tr>{head}{''.join(cells)}</tr>"
    yield "</tbody>"
    yield "</table>"
    yield "</div>"
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'
    yield "</section>"


def _cell(tag: str, text: str, number: bool) -> str:
    """A cell; the result of a gate is told by its sign and word, not by colour alone."""
    sign = {"passed": "✓ ", "FAILED": "✗ "}.get(text, "")
    kind = "number" if number else text.lower() if sign else ""
    attributes = (' scope="col"' if tag == "th" else "") + (f' class="{kind}"' if kind else "")
    return f"<{tag}{attributes}>{sign}{escape(text)}</{tag}>"


def _figure(plot: str) -> Iterator[str]:
    """The plot inside the page, in the page's colours, which change in the dark."""
    svg = _OWN_STYLE.sub("", plot[plot.index("<svg") :].rstrip())
    for name, colour in COLOURS.items():
        svg = svg.replace(f": {colour}", f": var(--{name})")
    yield "<section>"
    yield "<h2>Training curve</h2>"
    yield '<figure class="wide" role="img" aria-label="Loss and quality over the steps of training">'
    yield svg
    yield "</figure>"
    yield "</section>"


def _write(path: Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", "replace"))
