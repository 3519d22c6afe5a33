"""The tables of `bench`."""

from __future__ import annotations

from quantcli.reporting.metric_labels import GENERATION_METRICS, GENERATION_SPEEDUPS, metric_label, metric_text
from quantcli.reporting.report import ModelRow, Report, Table
from quantcli.reporting.tables.baseline import baseline_tables
from quantcli.reporting.tables.common import MODEL_NAMES, gate_table, scheme_text, short_names
from quantcli.system.text import format_bytes

_RIGHT = frozenset({"Batch", "p50 ms", "p90 ms", "p99 ms", "Per second", "Size", "Ratio", "Load", "Peak memory"})


def bench_tables(report: Report) -> list[Table]:
    """Latency of every model and batch size; what models take and run on; gates."""
    tables = [_latency(report), *_generation(report), _resources(report), *baseline_tables(report)]
    return [*tables, gate_table(report)] if report.gates else tables


def _latency(report: Report) -> Table:
    rows = []
    names, folder = short_names(report.models)
    count = len(report.models[0].details["batches"])
    for number in range(count):
        for model in report.models:
            batch = model.details["batches"][number]
            rows.append(
                (
                    names[model.path],
                    scheme_text(model, report),
                    str(batch["batch_size"]),
                    *(_number(batch[f"latency_ms_{name}"]) for name in ("p50", "p90", "p99")),
                    _rate(batch["throughput_per_s"]),
                    _speedup(batch),
                )
            )
    details = report.details
    threads = "1 thread" if details["threads"] == 1 else f"{details['threads']} threads"
    shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in details["inputs"].items())
    rounds = report.models[0].details["batches"][0]["rounds"]
    note = (
        f"{details['cpu']}, {threads}; {', '.join(details['runtimes'])}; {rounds} interleaved rounds on "
        f"{details['data'] if details['data'] != 'made up' else 'made-up inputs'} ({shapes}); "
        "speed-up with its interval of 95%"
    )
    columns = ("Model", "Scheme", "Batch", "p50 ms", "p90 ms", "p99 ms", "Per second", "Speed-up")
    return Table(f"Latency{folder}", columns, rows, _RIGHT, note, MODEL_NAMES)


def _generation(report: Report) -> list[Table]:
    """How fast models that generate read a prompt and continue it; nothing where none does."""
    metrics = (*GENERATION_METRICS, *GENERATION_SPEEDUPS)
    shown = [model for model in report.models if GENERATION_METRICS[0] in model.metrics]
    if not shown:
        return []
    names, folder = short_names(report.models)
    rows = [(names[model.path], *(metric_text(model.metrics, name) for name in metrics)) for model in shown]
    note = "One text at a time, from its key-value cache; interleaved rounds, speed-ups paired with the reference."
    columns = ("Model", *map(metric_label, metrics))
    return [Table(f"Generation{folder}", columns, rows, frozenset(columns[1:]), note, MODEL_NAMES)]


def _resources(report: Report) -> Table:
    names, folder = short_names(report.models)
    rows = [
        (
            names[model.path],
            "-" if model.size_bytes is None else format_bytes(model.size_bytes),
            "-" if model.metrics["size_ratio"] is None else f"{model.metrics['size_ratio']:.3f}",
            f"{_number(model.metrics['load_ms'] or 0)} ms",
            f"{format_bytes(model.metrics['peak_rss_bytes'] or 0)}",
            _kernels(model),
        )
        for model in report.models
    ]
    return Table(
        f"Resources{folder}",
        ("Model", "Size", "Ratio", "Load", "Peak memory", "Kernels"),
        rows,
        _RIGHT,
        "Load time and peak memory in a process of its own, of which "
        f"{format_bytes(max(model.details['baseline_rss_bytes'] for model in report.models))} at the most were there "
        "before the model.",
        MODEL_NAMES,
    )


def _kernels(model: ModelRow) -> str:
    """Integer kernels, then float ones that do heavy work; of a torch module its dtypes."""
    kernels = model.details["kernels"]
    if "dtypes" in kernels:
        return ", ".join(kernels["dtypes"])
    integer = [f"{count} {name}" for name, count in kernels["integer_kernels"].items()]
    floating = [f"{count} {name}" for name, count in kernels["float_kernels"].items()]
    parts = [f"integer: {', '.join(integer)}"] if integer else []
    return "; ".join([*parts, f"float: {', '.join(floating)}"] if floating else parts) or "-"


def _number(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speedup(batch: dict[str, float | str]) -> str:
    if "speedup" not in batch:
        return "-"
    return f"{batch['speedup']:.2f}x [{batch['speedup_low']:.2f}, {batch['speedup_high']:.2f}] {batch['verdict']}"
