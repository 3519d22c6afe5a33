"""The tables of `convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantcli.reporting.metric_labels import METRICS, decibel_text, metric_label, metric_text
from quantcli.reporting.report import LayerRow, ModelRow, Report, Table
from quantcli.reporting.tables.budget import budget_tables
from quantcli.reporting.tables.common import (
    LAYER_NAMES,
    SIZES,
    collapse,
    counted_text,
    error_bars,
    is_shown,
    ratio_text,
    total_sizes,
)
from quantcli.system.text import format_bytes, format_seconds

#: What `training_table` calls the models of `Report.details["training"]`.
_TRAINED = {"original": "original", "ptq": "PTQ", "qat": "QAT"}


def convert_tables(report: Report) -> list[Table]:
    """Layers, what was left and why, totals."""
    budget = budget_tables(report)
    if len(report.models) == 1:
        return budget  # one that nothing keeps
    source, artifact = report.models
    done = [row for row in report.layers if row.scheme]
    left = [row for row in report.layers if not row.scheme]
    groups = collapse(done, key=lambda row: row.scheme or "")
    errors = [group.worst_sqnr_db for group in groups]
    layers = Table(
        f"{source.path} -> {artifact.path}",
        ("Layer", "Scheme", "Before", "After", "SQNR"),
        [
            (group.name, group.rows[0].scheme or "", *total_sizes(group.rows), decibel_text(error))
            for group, error in zip(groups, errors, strict=True)
        ],
        SIZES,
        "SQNR: signal to quantization noise of the weights; of alike layers the worst." if done else None,
        LAYER_NAMES,
        error_bars(errors) if any(error is not None for error in errors) else None,
    )
    reasons: dict[str, list[LayerRow]] = {}
    for row in left:
        reasons.setdefault(row.reason or "", []).append(row)
    kept = Table(
        "Left unquantized",
        ("Why", "Tensors", "Before", "After"),
        [(reason, str(len(rows)), *total_sizes(rows)) for reason, rows in reasons.items()],
        SIZES,
    )
    runtime = report.details.get("verified", {}).get("runtime", {})
    proof = [_kernel_table(runtime)] if runtime.get("integer_kernels") or runtime.get("float_kernels") else []
    training = training_table(report)
    parts = [_components_table(report)] if "converted" in report.details else []
    shown = [layers, *([kept] if left else []), *parts, *proof, *([training] if training else [])]
    return [*shown, *budget, _totals(report, source, artifact)]


def _components_table(report: Report) -> Table:
    """What became of each component of a pipeline."""
    converted: Mapping[str, Mapping[str, Any]] = report.details["converted"]
    rows = [
        (name, str(made["scheme"]), format_bytes(made["bytes_before"]), format_bytes(made["bytes_after"]))
        for name, made in converted.items()
    ]
    rows += [(name, f"copied: {reason}", "", "") for name, reason in report.details["copied"].items()]
    return Table("Components", ("Component", "Became", "Before", "After"), rows, SIZES)


def training_table(report: Report) -> Table | None:
    """The model before quantization, after it, and after training, side by side; None where nothing was trained."""
    training: Mapping[str, Any] | None = report.details.get("training")
    if training is None:
        return None
    models: Mapping[str, Mapping[str, float | None]] = training["models"]
    known = dict.fromkeys([*METRICS, *(name for metrics in models.values() for name in metrics)])
    present = [
        name
        for name in known
        if is_shown(name) and name != "loss" and any(metrics.get(name) is not None for metrics in models.values())
    ]
    rows = [
        (_TRAINED[name], _decimal(models[name].get("loss")), *(metric_text(models[name], metric) for metric in present))
        for name in _TRAINED
        if name in models
    ]
    columns = ("Model", "Held-out loss", *map(metric_label, present))
    epochs = f"{round(training['epochs'], 2):,g}"
    end = "stopped early" if training["stopped"] == "early" else "ran to its end"
    note = (
        f"{training['steps']:,} steps, {epochs} {'epoch' if epochs == '1' else 'epochs'}; {end}, best at step "
        f"{training['best_step']:,}. Loss: {training['loss']}. PTQ: quantized, before training; QAT: after it."
    )
    return Table("Quantization-aware training", columns, rows, frozenset(columns[1:]), note)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _totals(report: Report, source: ModelRow, artifact: ModelRow) -> Table:
    ratio = artifact.metrics["size_ratio"] or 1.0
    about = "about " if report.details.get("estimated") else ""
    rows = [
        ("Size", f"{format_bytes(source.size_bytes or 0)} -> {about}{format_bytes(artifact.size_bytes or 0)}"),
        ("Ratio", f"{ratio_text(ratio)} ({1 / ratio:.1f}x smaller)"),
        ("Format", f"{artifact.format}, algorithm {artifact.details['algorithm'] or 'cast'}"),
    ]
    if "experts" in report.details:
        rows.append(("Experts", _experts_text(report.details["experts"])))
    if "seconds" in report.details:
        rows.append(("Time", format_seconds(report.details["seconds"])))
        rows.append(("Peak memory", format_bytes(report.details["peak_rss_bytes"])))
        verified = report.details["verified"]
        rows.append(("Verified", f"{verified['tensors']} tensors reopened and decoded, all codes equal"))
        rows.append(("Runtime", _runtime_text(verified["runtime"])))
        if "compared" in verified:
            rows.append(("Outputs", _outputs_text(verified["compared"], "sample of the data", "samples of the data")))
        elif report.details.get("outputs", {}).get("compared"):
            text = _outputs_text(report.details["outputs"], "made-up sample", "made-up samples")
            rows.append(("Outputs", f"of the model's names, types and shapes; {text}"))
        speed = artifact.metrics.get("speed")
        if speed is not None:
            rows.append(("Speed", f"about {speed:.2g} times the model's, on these samples"))
    elif "runtime" in report.details:
        rows.append(("Runtime", report.details["runtime"]["summary"]))
    return Table(
        "Total" if "seconds" in report.details else "Total (dry run: nothing was written)", ("", "Value"), rows
    )


def _experts_text(experts: Mapping[str, Any]) -> str:
    """How the data's tokens were spread over the experts."""
    low, middle, high = (f"{experts['tokens'][name]:,}" for name in ("min", "median", "max"))
    spread = f"{experts['count']} were given {low} to {high} tokens, median {middle}"
    return f"{spread}; {experts['under_fed']} fewer than they have inputs"


def _outputs_text(compared: Mapping[str, Any], one: str, many: str) -> str:
    """How an artifact's outputs compare with the model's."""
    parts = [] if compared["sqnr_db"] is None else [decibel_text(compared["sqnr_db"])]
    equal = compared.get("equal")
    if equal is not None:
        parts.append(f"{100 * equal:.1f}% of those that are no floats equal")
    samples = compared["samples"]
    return f"{', '.join(parts) or 'equal'} on {samples} {one if samples == 1 else many}"


def _runtime_text(runtime: Mapping[str, Any]) -> str:
    """What the runtime said of an artifact."""
    if "integer_kernels" in runtime:
        kernels = counted_text(sum(runtime["integer_kernels"].values()), "integer kernel")
        return f"{runtime['runtime']} loads it, with {kernels}"
    return str(runtime["summary"])


def _kernel_table(runtime: Mapping[str, Any]) -> Table:
    """Kernels of the runtime's optimized graph."""
    rows = [(name, str(count), "") for name, count in runtime["integer_kernels"].items()]
    rows += [(name, "", str(count)) for name, count in runtime["float_kernels"].items()]
    left = counted_text(runtime["conversions_left"], "QuantizeLinear or DequantizeLinear node")
    note = f"Beside them, {left} {'remains' if runtime['conversions_left'] == 1 else 'remain'}."
    return Table(f"Kernels, as {runtime['runtime']} optimized the graph", ("Kernel", "Integer", "Float"), rows,
                 frozenset({"Integer", "Float"}), note if runtime["conversions_left"] else None)  # fmt: skip
