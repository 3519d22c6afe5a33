"""The commands: thin, over the functions of the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli import __version__
from quantcli.cli import completion, options
from quantcli.cli.help import GroupedCommand, Overview
from quantcli.cli.output import Outcome, reported
from quantcli.cli.terminal import Ui
from quantcli.errors import UsageError
from quantcli.system.text import format_seconds, parse_bytes

if TYPE_CHECKING:
    from quantcli.reporting.report import Report

#: How long gptq and tune take together by gptq alone: SmolLM2-135M, 64 sequences of 512 tokens (docs/measured.md).
_TUNE_BY_GPTQ = 2.8

app = typer.Typer(
    name="quantcli",
    cls=Overview,
    add_completion=False,  # options of our own, whose errors are in words
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Make neural networks smaller by lowering numerical precision, and prove that they still work.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            callback=completion.install,
            is_eager=True,
            help="Install completion for this shell.",
        ),
    ] = False,
    show_completion: Annotated[
        bool,
        typer.Option(
            "--show-completion", callback=completion.show, is_eager=True, help="Print the script that completes."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _command(
    usage: str, *examples: str, shared: bool = False
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register a command: what stands before its arguments in the usage line, examples of its use; see `reported`."""

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        register_as = app.command(
            "eval" if function.__name__ == "evaluate" else None,
            cls=GroupedCommand,
            options_metavar=usage,
            epilog="\n".join(f"quantcli {example}" for example in examples),
        )
        register_as(reported(function, shared=shared))
        return function

    return register


@_command("[OPTIONS]", "inspect model/ --scheme int8 --scheme int4", "inspect net.onnx --layers")
def inspect(
    ui: Ui,
    model: options.Model,
    scheme: options.Schemes = None,
    custom_ops: options.CustomOps = None,
    layers: options.ListLayers = False,
) -> Outcome:
    """Show what a model is made of, and what a scheme would do to it. Reads headers only."""
    _register(custom_ops)
    from quantcli.commands.inspect import inspect as run
    from quantcli.reporting.tables.inspect import inspect_tables

    report = run(model, scheme or ())
    plain = report.models[0].details["parameters"] is not None
    next_step = "quantcli inspect MODEL --scheme int4 shows what a scheme would save." if plain and not scheme else None
    return Outcome(report, inspect_tables(report, layers=layers), next_step)


@_command("--data DATA -o STATS [OPTIONS]", "calibrate net.onnx --data train.npz -o ranges.safetensors", shared=True)
def calibrate(
    ui: Ui,
    model: options.RunnableModel,
    output: options.StatsOutput,
    data: options.Data = None,
    method: options.Method = None,
    samples: options.Samples = None,
    batch_size: options.BatchSize = 1,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    tokenizer: options.Tokenizer = None,
    preprocess: options.Preprocess = None,
    custom_ops: options.CustomOps = None,
    weights: options.Weights = None,
    force: options.Force = False,
) -> Outcome:
    """Observe activations on your data, for convert --calibration."""
    _register(custom_ops)
    if data is None:
        raise UsageError("calibrate needs --data.", "Name your data; nothing is fetched or made up.")
    from quantcli.calibration.ranges import DEFAULT_METHOD
    from quantcli.commands.calibrate import calibrate as run
    from quantcli.reporting.tables.calibrate import calibrate_tables

    with ui.progress("Calibrating", unit="samples") as progress:
        report = run(
            model,
            data=data,
            output=output,
            method=method or DEFAULT_METHOD,
            samples=samples,
            batch_size=batch_size,
            seq_len=seq_len,
            seed=seed,
            tokenizer=tokenizer,
            preprocess=preprocess,
            weights=weights,
            force=force,
            histograms=_histograms(ui),
            progress=progress,
        )
    next_step = f"quantcli convert {model} -o OUT --scheme int8-static --calibration {output}"
    return Outcome(report, calibrate_tables(report), next_step)


@_command(
    "-o OUT [OPTIONS]",
    "convert model/ -o model-int4 --scheme int4",
    "convert model/ -o model-gptq --scheme int4 --data text.txt",
    "convert model/ -o model-80MB --max-size 80MB --data text.txt",
    "convert net.onnx -o int8.onnx --scheme int8-static --data train.npz",
    shared=True,
)
def convert(
    ui: Ui,
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
    custom_ops: options.CustomOps = None,
    weights: options.Weights = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    max_memory: options.MaxMemory = None,
    verify: options.Verify = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    allow_larger: options.AllowLarger = False,
    max_size: options.MaxSize = None,
    max_drop: options.MaxDrop = None,
    metric: options.Metric = None,
    eval_data: options.EvalData = None,
    max_kl: options.MaxKl = None,
    max_latency_p50: options.MaxLatency = None,
    allow: options.Allow = None,
    sensitivity: options.Sensitivity = None,
    search_time: options.SearchTime = None,
    pareto: options.Pareto = None,
) -> Outcome:
    """Quantize a model, tensor by tensor, and verify the result."""
    _register(custom_ops)
    from quantcli.commands.convert import convert as run
    from quantcli.reporting.tables.convert import convert_tables
    from quantcli.search.budget import Budget, parse_allow, parse_milliseconds, parse_seconds

    if ui.html is not None:
        _require_curve(recipe, algorithm)
    limit = _bytes(max_memory, "--max-memory")
    budget = Budget(
        max_size=_bytes(max_size, "--max-size"),
        max_drop=max_drop,
        metric=metric,
        max_kl=max_kl,
        max_latency_p50=None if max_latency_p50 is None else parse_milliseconds(max_latency_p50),
        eval_data=eval_data,
        allow=() if allow is None else parse_allow(allow),
        sensitivity=sensitivity,
        search_seconds=None if search_time is None else parse_seconds(search_time),
        pareto=pareto,
    )
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
            verify=verify,
            dry_run=dry_run,
            force=force,
            allow_larger=allow_larger,
            budget=budget,
            histograms=_histograms(ui),
            progress=progress,
        )
    runs = not dry_run and (model.is_dir() or model.suffix == ".onnx")
    next_step = f"quantcli eval {model} {output} --data {data or 'DATA'} measures what it cost." if runs else None
    if next_step and algorithm in (None, "auto") and recipe is None:
        next_step += _closer(report)
    return Outcome(report, convert_tables(report), next_step)


def _closer(report: Report) -> str:
    """What is known to bring four bits closer to the model than the default with data, and how long it takes."""
    artifact = report.models[-1]
    if (artifact.scheme, artifact.details.get("algorithm")) != ("int4", "gptq") or artifact.format == "onnx":
        return ""
    takes = format_seconds(_TUNE_BY_GPTQ * float(report.details["seconds"]))
    return f" Add --algorithm tune for a closer one: scales are learned after gptq, which takes about {takes} in all."


@_command(
    "--data DATA [OPTIONS]",
    "eval model/ model-int4 model-gptq --data held-out.txt",
    'eval net.onnx int8.onnx --data test.npz --require "top1_drop <= 0.01"',
    shared=True,
)
def evaluate(
    ui: Ui,
    model: options.RunnableModel,
    candidates: options.Candidates = None,
    data: options.Data = None,
    task: options.Task = "auto",
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    tokenizer: options.Tokenizer = None,
    preprocess: options.Preprocess = None,
    custom_ops: options.CustomOps = None,
    weights: options.Weights = None,
    by_layer: options.ByLayer = False,
    require: options.Require = None,
    baseline: options.Baseline = None,
) -> Outcome:
    """Measure accuracy: models beside a reference on the same data. A gate that fails exits with 1."""
    _register(custom_ops)
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
            baseline=baseline,
            progress=progress,
        )
    return Outcome(report, eval_tables(report))


@_command(
    "[OPTIONS]",
    "bench net.onnx int8.onnx --batch-size 1 --batch-size 8",
    'bench net.onnx int8.onnx --require "latency_ms_p50 <= 20"',
)
def bench(
    ui: Ui,
    model: options.RunnableModel,
    candidates: options.Candidates = None,
    data: options.Data = None,
    batch_size: options.BatchSizes = None,
    seq_len: options.SeqLen = None,
    tokenizer: options.Tokenizer = None,
    preprocess: options.Preprocess = None,
    custom_ops: options.CustomOps = None,
    weights: options.Weights = None,
    threads: options.Threads = None,
    runs: options.Runs = None,
    require: options.Require = None,
    baseline: options.Baseline = None,
) -> Outcome:
    """Measure speed and memory on this machine, models taking turns. A gate that fails exits with 1."""
    _register(custom_ops)
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
            baseline=baseline,
            progress=progress,
        )
    return Outcome(report, bench_tables(report))


def _register(custom_ops: list[Path] | None) -> None:
    """Have every session of this command know the user's custom operators."""
    from quantcli.models.custom_operators import register

    register(custom_ops or ())


def _histograms(ui: Ui) -> int:
    """Histograms are for the page alone."""
    from quantcli.core.histogram import SHOWN

    return 0 if ui.html is None else SHOWN


def _bytes(text: str | None, flag: str) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}.") from error


def _require_curve(recipe: Path | None, algorithm: str | None) -> None:
    """Raise MissingExtraError now, not after hours of training, where its curve could not be drawn."""
    from quantcli.planning.recipe import Recipe, load_recipe
    from quantcli.planning.steps import training_step
    from quantcli.reporting.charts.base import require_matplotlib

    wishes = load_recipe(recipe) if recipe else Recipe()
    if training_step(wishes.with_flags(algorithm=algorithm)):
        require_matplotlib("--html with a training curve")
