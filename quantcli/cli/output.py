"""What all commands share: where their report goes, how much is said meanwhile, and what a failed gate means."""

from __future__ import annotations

import gc
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quantcli.cli import options
from quantcli.cli.needs import require_needs
from quantcli.cli.terminal import Ui
from quantcli.errors import InputError
from quantcli.system import ranks

if TYPE_CHECKING:
    from quantcli.reporting.report import Report, Table


@dataclass(frozen=True)
class Outcome:
    """What a command found out, how it is shown, and what to do with it next."""

    report: Report
    tables: Sequence[Table]
    next_step: str | None = None


def _flag(name: str, annotation: Any, default: object = None) -> Parameter:
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


_JUNIT = _flag("junit", options.Junit)
_FLAGS = (
    _flag("json", options.AsJson, False),
    _flag("markdown", options.Markdown),
    _flag("html", options.Html),
    _JUNIT,
    _flag("quiet", options.Quiet, False),
    _flag("debug", options.Debug, False),
)


def reported(command: Callable[..., Outcome], *, shared: bool) -> Callable[..., None]:
    """A command with the options of reports, which shows and writes what it returns.

    Its first parameter is the `Ui`, which is set up before. A command with gates (``require``) has ``--junit`` too.
    Of the processes that torchrun starts, all work on a ``shared`` one, and the first alone on others.
    """
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    has_gates = any(parameter.name == "require" for parameter in own)
    flags = [flag for flag in _FLAGS if has_gates or flag is not _JUNIT]
    context = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)

    def run(context: typer.Context, **given: Any) -> None:
        if ranks.started()[0] and not shared:
            raise ranks.Dismissed
        gc.enable()
        chosen = {flag.name: given.pop(flag.name) for flag in flags}
        ui: Ui = context.obj
        ui.json, ui.quiet, ui.debug, ui.html = (chosen[name] for name in ("json", "quiet", "debug", "html"))
        require_needs(context)
        with ranks.joined() if shared else nullcontext():
            outcome = command(ui, **given)
            ranks.finish()
            outcome.report.warnings += ranks.unshared()
        asked = _command_line(context)
        next_step = outcome.next_step if outcome.report.passed else _nearest(context, outcome.report)
        ui.show(outcome.report, outcome.tables)
        _write(outcome, chosen["markdown"], chosen["html"], chosen.get("junit"), asked)
        if next_step:
            ui.talk(f"Next: {next_step}")
        if not outcome.report.passed:
            raise typer.Exit(1)

    parameters = [context, *own, *flags]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _nearest(context: typer.Context, report: Report) -> str | None:
    """The command with the nearest budget that can be kept, where this one could not; the report tells it, too."""
    budget = report.details.get("budget", {})
    near = {name: value for name, value in budget.get("nearest", {}).items() if context.params.get(name) is not None}
    if not near:
        return None
    budget["command"] = _command_line(context, near)
    return str(budget["command"])


def _command_line(context: typer.Context, changed: Mapping[str, Any] | None = None) -> str:
    """What was asked, as a command line to paste: arguments, and options that are not at their defaults.

    Options of reports are left out; those that are ``changed`` have other values.
    """
    left_out = {flag.name for flag in _FLAGS}
    words = ["quantcli", context.info_name or ""]
    for parameter in context.command.params:
        value = {**context.params, **(changed or {})}.get(parameter.name or "")
        if parameter.name in left_out or value in (None, False, [], ()) or value == parameter.default:
            continue
        flag = [max(parameter.opts, key=len)] if parameter.opts[0].startswith("-") else []
        values = value if isinstance(value, (list, tuple)) else [value]
        words += flag if value is True else [word for one in values for word in (*flag, str(one))]
    return shlex.join(words)


def _write(outcome: Outcome, markdown: Path | None, html: Path | None, junit: Path | None, asked: str) -> None:
    from quantcli.reporting.ci import write_junit, write_markdown

    try:
        write_markdown(outcome.tables, outcome.report, markdown)
        if html is not None:
            from quantcli.reporting.html import write_html

            write_html(outcome.tables, outcome.report, html, asked)
        if junit is not None:
            write_junit(outcome.report, junit)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}.") from error
