"""What came out, in a few figures, for the top of a page."""

from __future__ import annotations

from collections.abc import Iterator

from quantcli.reporting.metric_labels import METRICS, decibel_text, metric_label, metric_text
from quantcli.reporting.report import LayerRow, ModelRow, Report
from quantcli.reporting.tables.common import counted_text, is_shown, short_names
from quantcli.system.text import format_bytes

#: A name, a figure, and what is to be said of it.
Fact = tuple[str, str, str]

#: How much of an artifact transformers ran.
_RUN = {"all": "by transformers", "part": "in part", "none": "not run"}


def headline(report: Report) -> list[Fact]:
    """The figures that tell most of a report."""
    return list(_BY_COMMAND[report.command](report)) if report.command in _BY_COMMAND and report.models else []


def _inspect(report: Report) -> Iterator[Fact]:
    (model,) = report.models
    parameters = model.details.get("parameters")
    yield "Size", format_bytes(model.size_bytes or 0), f"{parameters:,} parameters" if parameters else "quantized"
    for plan in report.details.get("schemes", []):
        if plan["applies"]:
            tensors = counted_text(plan["quantized_tensors"], "tensor")
            yield plan["scheme"], format_bytes(plan["size_bytes"]), f"{1 / plan['size_ratio']:.1f}x smaller, {tensors}"


def _calibrate(report: Report) -> Iterator[Fact]:
    tensors = report.details["tensors"]
    yield "Observed", counted_text(len(tensors), "tensor"), f"on {counted_text(report.details['samples'], 'sample')}"
    worst = min((one for one in tensors if one["sqnr_db"] is not None), key=lambda one: one["sqnr_db"], default=None)
    if worst:
        yield "Hardest to quantize", decibel_text(worst["sqnr_db"]), worst["name"]


def _convert(report: Report) -> Iterator[Fact]:
    source, artifact = report.models[0], report.models[-1]
    ratio = artifact.metrics.get("size_ratio")
    sizes = f"{format_bytes(source.size_bytes or 0)} to {format_bytes(artifact.size_bytes or 0)}"
    yield "Size", f"{1 / ratio:.1f}x smaller" if ratio else "-", sizes
    quantized = [row for row in report.layers if row.scheme]
    scheme = f"{artifact.scheme or 'by recipe'}, {artifact.details.get('algorithm') or 'cast'}"
    yield "Quantized", counted_text(len(quantized), "layer"), scheme
    yield from _worst_layer(quantized)
    outputs = report.details.get("outputs") or {}
    compared = report.details.get("verified", {}).get("compared") or (outputs if outputs.get("compared") else None)
    if compared:
        kind = "made-up " if outputs.get("made_up") else ""
        yield "Outputs", decibel_text(compared["sqnr_db"]), f"on {counted_text(compared['samples'], kind + 'sample')}"
    runtime = report.details.get("verified", {}).get("runtime", {})
    if runtime.get("integer_kernels"):
        kernels = counted_text(sum(runtime["integer_kernels"].values()), "integer kernel")
        yield "Proven", kernels, f"in the graph as {runtime['runtime']} optimizes it"
    elif "verified" in report.details:
        yield "Verified", counted_text(report.details["verified"]["tensors"], "tensor"), "decoded, all codes equal"
        if "run" in runtime:
            yield "Run", _RUN[runtime["run"]], runtime.get("reason", "layer by layer, as the codes say")
    if report.details.get("dry_run"):
        yield "Dry run", "nothing written", ""


def _evaluate(report: Report) -> Iterator[Fact]:
    names, _ = short_names(report.models)
    for model in report.models[1:] or report.models:
        shown = [name for name in METRICS if model.metrics.get(name) is not None and is_shown(name)][:2]
        for name in shown or [name for name in model.metrics if is_shown(name)][:2]:
            yield names[model.path], metric_text(model.metrics, name), metric_label(name)
    yield from _worst_layer(report.layers)


def _bench(report: Report) -> Iterator[Fact]:
    names, _ = short_names(report.models)
    for model in report.models[1:] or report.models:
        median = f"{model.metrics['latency_ms_p50']:.3g} ms at the median"
        yield names[model.path], _speed(model) or median, median if _speed(model) else ""


def _speed(model: ModelRow) -> str | None:
    speedup = model.metrics.get("speedup")
    verdict = model.details["batches"][0].get("verdict", "")
    if speedup is None:
        return None
    return verdict if verdict == "no difference" else f"{speedup:.2f}x as fast"


def _worst_layer(rows: list[LayerRow]) -> Iterator[Fact]:
    worst = min((row for row in rows if row.sqnr_db is not None), key=lambda row: row.sqnr_db or 0.0, default=None)
    if worst:
        yield "Worst layer", decibel_text(worst.sqnr_db), worst.name


_BY_COMMAND = {
    "inspect": _inspect, "calibrate": _calibrate, "convert": _convert, "eval": _evaluate, "bench": _bench,
}  # fmt: skip
