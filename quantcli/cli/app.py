"""The command line: thin commands over the library, and the exit statuses. Only it and options.py import typer."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from quantcli import __version__
from quantcli.calibration.ranges import DEFAULT_METHOD
from quantcli.cli import options
from quantcli.cli.terminal import Ui
from quantcli.errors import InputError, QuantcliError, UsageError
from quantcli.reporting.ci import write_junit, write_markdown
from quantcli.reporting.report import Report, Table
from quantcli.system.text import parse_bytes

app = typer.Typer(
    name="quantcli",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make neural networks smaller by lowering numerical precision, and prove that they still work.",
)

#: Exit status after Ctrl-C or a termination signal; newer versions of typer return it themselves.
_INTERRUPTED = 130

#: What typer raises for a wrong command line. Whether it comes from click or from the copy of click that
#: newer versions of typer carry, typer's own BadParameter descends from it.
_CommandLineError: type[Any] = typer.BadParameter.__mro__[2]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"quantcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def inspect(
    context: typer.Context,
    model: options.Model,
    scheme: options.Schemes = None,
    layers: options.ListLayers = False,
    json: options.AsJson = False,
    markdown: options.Markdown = None,
    html: options.Html = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what a model is made of, and what a scheme would do to it. Reads headers only."""
    ui = _ui(context, json, quiet, debug)
    from quantcli.commands.inspect import inspect as run
    from quantcli.reporting.tables.inspect import inspect_tables

    report = run(model, scheme or ())
    _finish(ui, report, inspect_tables(report, layers=layers), markdown, html)
    if not scheme and report.models[0].details["parameters"] is not None:
        ui.talk("Next: quantcli inspect MODEL --scheme int4 shows what a scheme would save.")


@app.command()
def calibrate(
    context: typer.Context,
    model: options.RunnableModel,
    output: options.StatsOutput,
    data: options.Data = None,
    method: options.Method = DEFAULT_METHOD,
    samples: options.Samples = None,
    batch_size: options.BatchSize = 1,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    tokenizer: options.Tokenizer = None,
    preprocess: options.Preprocess = None,
    weights: options.Weights = None,
    force: options.Force = False,
    json: options.AsJson = False,
    markdown: options.Markdown = None,
    html: options.Html = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Observe a model's activations on your data, for convert --calibration."""
    ui = _ui(context, json, quiet, debug)
    if data is None:
        raise UsageError("calibrate needs --data.", "Name your data; nothing is fetched or made up.")
    from quantcli.commands.calibrate import calibrate as run
    from quantcli.reporting.tables.calibrate import calibrate_tables

    with ui.progress("Calibrating", unit="samples") as progress:
        report = run(
            model,
            data=data,
            output=output,
            method=method,
            samples=samples,
            batch_size=batch_size,
            seq_len=seq_len,
            seed=seed,
            tokenizer=tokenizer,
            preprocess=preprocess,
            weights=weights,
            force=force,
            progress=progress,
        )
    _finish(ui, report, calibrate_tables(report), markdown, html)
    ui.talk(f"Next: quantcli convert {model} -o OUT --scheme int8-static --calibration {output}")


@app.command()
def convert(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    scheme: options.Scheme = None,
    format: options.Format = None,
    algorithm: options.Algorithm = None,
    recipe: options.RecipeFile = None,
    group_size: options.GroupSize = None,
    skip: options.Skip = None,
    rest: options.Rest = None,
    target: options.Target = None,
    calibration: options.Statistics = None,
    data: options.Data = None,
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    tokenizer: options.Tokenizer = None,
    preprocess: options.Preprocess = None,
    weights: options.Weights = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    max_memory: options.MaxMemory = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json: options.AsJson = False,
    markdown: options.Markdown = None,
    html: options.Html = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize a model, tensor by tensor, and verify the result."""
    ui = _ui(context, json, quiet, debug)
    from quantcli.commands.convert import convert as run
    from quantcli.reporting.tables.convert import convert_tables

    if html is not None:
        _require_curve(recipe, algorithm)
    limit = _bytes(max_memory, "--max-memory")
    with ui.progress("Converting", unit="percent" if data else "bytes") as progress:
        report = run(
            model,
            output,
            scheme=scheme,
            format=format,
            algorithm=algorithm,
            recipe=recipe,
            group_size=group_size,
            skip=skip or (),
            rest=rest,
            target=target,
            device=device,
            threads=threads,
            max_memory=limit,
            calibration=calibration,
            data=data,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            tokenizer=tokenizer,
            preprocess=preprocess,
            weights=weights,
            dry_run=dry_run,
            force=force,
            progress=progress,
        )
    _finish(ui, report, convert_tables(report), markdown, html)
    if not dry_run and (model.is_dir() or model.suffix == ".onnx"):
        ui.talk(f"Next: quantcli eval {model} {output} --data {data or 'DATA'} measures what it cost.")


@app.command("eval")
def evaluate(
    context: typer.Context,
    model: options.RunnableModel,
    candidates: options.Candidates = None,
    data: options.Data = None,
    task: options.Task = "auto",
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    tokenizer: options.Tokenizer = None,
    preprocess: options.Preprocess = None,
    weights: options.Weights = None,
    by_layer: options.ByLayer = False,
    require: options.Require = None,
    json: options.AsJson = False,
    markdown: options.Markdown = None,
    html: options.Html = None,
    junit: options.Junit = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure accuracy: a reference model and candidates on the same data. A gate that fails exits with 1."""
    ui = _ui(context, json, quiet, debug)
    if data is None:
        raise UsageError("eval needs --data.", "Name text, arrays or images; nothing is fetched or made up.")
    from quantcli.commands.evaluate import evaluate as run
    from quantcli.reporting.tables.evaluate import eval_tables

    with ui.progress("Evaluating", unit="samples") as progress:
        report = run(
            model,
            candidates or (),
            data=data,
            task=task,
            samples=samples,
            seq_len=seq_len,
            tokenizer=tokenizer,
            preprocess=preprocess,
            weights=weights,
            by_layer=by_layer,
            require=require or (),
            progress=progress,
        )
    _finish(ui, report, eval_tables(report), markdown, html, junit)


@app.command()
def bench(
    context: typer.Context,
    model: options.RunnableModel,
    candidates: options.Candidates = None,
    data: options.Data = None,
    batch_size: options.BatchSizes = None,
    seq_len: options.SeqLen = None,
    tokenizer: options.Tokenizer = None,
    preprocess: options.Preprocess = None,
    weights: options.Weights = None,
    threads: options.Threads = None,
    runs: options.Runs = None,
    require: options.Require = None,
    json: options.AsJson = False,
    markdown: options.Markdown = None,
    html: options.Html = None,
    junit: options.Junit = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure speed and memory on this machine, models taking turns. A gate that fails exits with 1."""
    ui = _ui(context, json, quiet, debug)
    from quantcli.commands.bench import bench as run
    from quantcli.reporting.tables.bench import bench_tables

    with ui.progress("Timing", unit="samples") as progress:
        report = run(
            model,
            candidates or (),
            data=data,
            batch_size=batch_size,
            seq_len=seq_len,
            tokenizer=tokenizer,
            preprocess=preprocess,
            weights=weights,
            threads=threads,
            runs=runs,
            require=require or (),
            progress=progress,
        )
    _finish(ui, report, bench_tables(report), markdown, html, junit)


def _ui(context: typer.Context, json: bool, quiet: bool, debug: bool) -> Ui:
    gc.enable()
    ui: Ui = context.obj
    ui.json, ui.quiet, ui.debug = json, quiet, debug
    return ui


def _bytes(text: str | None, flag: str) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}.") from error


def _require_curve(recipe: Path | None, algorithm: str | None) -> None:
    """Raise MissingExtraError now, not after hours of training, where its curve could not be drawn."""
    from quantcli.planning.recipe import Recipe, load_recipe
    from quantcli.planning.steps import training_step
    from quantcli.reporting.training_plot import require_matplotlib

    wishes = load_recipe(recipe) if recipe else Recipe()
    if training_step(wishes.with_flags(algorithm=algorithm)):
        require_matplotlib()


def _finish(
    ui: Ui,
    report: Report,
    tables: Sequence[Table],
    markdown: Path | None,
    html: Path | None,
    junit: Path | None = None,
) -> None:
    """Show and write a report; a failed gate ends the command with status 1."""
    ui.show(report, tables)
    try:
        write_markdown(tables, report, markdown)
        if html is not None:
            from quantcli.reporting.html import write_html

            write_html(tables, report, html)
        if junit is not None:
            write_junit(report, junit)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}.") from error
    if not report.passed:
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 done; 1 a gate failed; 2 usage; 3 input; 4 a defect of quantcli; 130 interrupted.
    """
    ui = Ui()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = app(args=None if argv is None else list(argv), obj=ui, standalone_mode=False)
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        if isinstance(status, int):
            return status
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _CommandLineError as error:
        where = getattr(error, "ctx", None)
        ui.fail(error.format_message(), f"See: {where.command_path if where else 'quantcli'} --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        ui.fail("Interrupted.", "The same command continues where it stopped.")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; that is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except QuantcliError as error:
        return _failed(ui, error, error.message, error.hint, error.exit_code)
    except MemoryError as error:
        return _failed(ui, error, "There is not enough memory.", "Use fewer --threads.", InputError.exit_code)
    except Exception as error:
        message = f"This is a defect of quantcli: {type(error).__name__}: {error}"
        return _failed(ui, error, message, "Run again with --debug and report what it prints.", QuantcliError.exit_code)
    return 0


def _failed(ui: Ui, error: BaseException, message: str, hint: str | None, status: int) -> int:
    if ui.debug:
        import traceback

        traceback.print_exception(error)
    ui.fail(message, hint)
    return status


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
