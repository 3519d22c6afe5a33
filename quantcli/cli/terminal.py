"""What people see: tables on stdout, talk on stderr. The only importer of rich."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.cli.layout import fit

if TYPE_CHECKING:
    from rich.console import Console

    from quantcli.reporting.report import Report, Table

#: Width where there is no terminal to ask: wide enough that logs do not wrap tables.
_LOG_WIDTH = 200
#: Time whose speed tells how much is left. Parts of a block differ, and the blocks of a large model take minutes.
_PACE_SECONDS = 600.0


class Ui:
    """Output of one command."""

    def __init__(self) -> None:
        self.json = self.quiet = self.debug = False
        #: Where the report is to go as a page.
        self.html: Path | None = None
        # Names may hold characters that the encoding of a terminal or a log lacks, such as Windows' cp1252.
        _reconfigure(sys.stdout, errors="backslashreplace")
        _reconfigure(sys.stderr, errors="backslashreplace")

    def show(self, report: Report, tables: Sequence[Table]) -> None:
        """The report on stdout: one JSON document, or tables; warnings on stderr."""
        if self.json:
            _reconfigure(sys.stdout, encoding="utf-8", errors="backslashreplace")  # RFC 8259, section 8.1
            print(report.to_json(), flush=True)
        else:
            console = self._console(sys.stdout)
            # Captured, because rich itself ends the program when the reader of a pipe leaves.
            with console.capture() as capture:
                for table in tables:
                    _print_table(console, table)
            print("\n".join(line.rstrip() for line in capture.get().split("\n")), end="", flush=True)
        for warning in report.warnings:
            self.talk(f"Warning: {warning}", style="yellow")

    def talk(self, message: str, style: str = "") -> None:
        """A line on stderr, unless quiet."""
        if not self.quiet:
            self._say(message, style)

    def fail(self, message: str, hint: str | None = None) -> None:
        """An error: one paragraph on stderr, even when quiet."""
        self._say(f"Error: {message}" + (f" {hint}" if hint else ""), "bold red")

    def _say(self, message: str, style: str) -> None:
        text = message
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            text = textwrap.fill(message, width, break_long_words=False, break_on_hyphens=False)
        if style and sys.stderr.isatty() and "NO_COLOR" not in os.environ:
            head, colon, rest = text.partition(":")
            self._console(sys.stderr).print(f"[{style}]{head}{colon}[/{style}]", end="", highlight=False)
            text = rest
        print(text, file=sys.stderr)

    @contextmanager
    def progress(self, label: str, *, unit: str) -> Iterator[Callable[[int, int], None] | None]:
        """A progress bar on stderr: none when quiet or without a terminal.

        ``unit`` is ``bytes``, ``samples`` or ``percent``.
        """
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        amount: Any = {"bytes": DownloadColumn, "samples": MofNCompleteColumn, "percent": TaskProgressColumn}[unit]()
        left = (TimeRemainingColumn(compact=True), TextColumn("left"))
        columns = (TextColumn("{task.description}"), BarColumn(), amount, *left)
        console = self._console(sys.stderr)
        with Progress(*columns, console=console, transient=True, speed_estimate_period=_PACE_SECONDS) as bar:
            task = bar.add_task(label, total=None)
            yield _Shown(bar, task, label)

    @staticmethod
    def _console(stream: Any) -> Console:
        from rich.console import Console

        width = None if stream.isatty() else int(os.environ.get("COLUMNS", _LOG_WIDTH))
        return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def _reconfigure(stream: Any, **options: Any) -> None:
    """Change how a stream encodes; one that somebody put in its place is left as it is."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(**options)


class _Shown:
    """Progress as a bar, and in words before it."""

    def __init__(self, bar: Any, task: Any, label: str) -> None:
        self._bar, self._task, self._label = bar, task, label

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        """How it goes."""
        self._bar.update(self._task, description=f"{self._label} ({text})")


def _print_table(console: Console, table: Table) -> None:
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table as RichTable
    from rich.text import Text

    bare = not any(table.columns[:1])
    blocks, gap = fit(table, console.width, measure=cell_len, blocks=console.encoding.startswith("utf"))
    _print_text(console, table.title, "bold")
    for columns in blocks:
        shown = RichTable(box=box.SIMPLE_HEAD, show_header=not bare, pad_edge=False, padding=(0, 1, 0, gap - 2))
        for column in columns:
            shown.add_column(column.head, justify="right" if column.right else "left", no_wrap=True)
        for row in zip(*(column.cells for column in columns), strict=True):
            shown.add_row(*map(Text, row))
        # What cannot be narrower than the terminal is not cut off.
        console.print(shown, crop=False, overflow="ignore", width=max(console.width, _LOG_WIDTH))
    note = " ".join(filter(None, (table.note, table.bars.meaning if table.bars else None)))
    if note:
        _print_text(console, note, "dim")
        console.print()


def _print_text(console: Console, text: str, style: str) -> None:
    """Text in lines that end between words; a path that is longer than a line stays whole."""
    from rich.text import Text

    lines = textwrap.wrap(text, console.width, break_long_words=False, break_on_hyphens=False)
    for line in lines:
        console.print(Text(line, style=style), crop=False, overflow="ignore", no_wrap=True)
