"""Reports as tables for people: alike layers in one row, sizes and ratios in units."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from quantcli.report import LayerRow, ModelRow, Report, Table
from quantcli.units import format_bytes, format_seconds

#: What `training_table` calls the models of `Report.details["training"]`.
_TRAINED = {"original": "original", "ptq": "PTQ", "qat": "QAT"}
_SIZES = frozenset({"Before", "After", "Size", "SQNR", "Ratio", "Tensors", "Value"})
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=[./])")
_ANY_NUMBER = re.compile(r"\d+")
#: More rows than this are too many to read, if their names differ in numbers only.
_MANY_ROWS = 24
_METRICS = {
    "top1": ("Top-1", "{:.2%}"),
    "top5": ("Top-5", "{:.2%}"),
    "perplexity": ("Perplexity", "{:.4g}"),
    "kl_nats": ("KL (nats)", "{:.3g}"),
    "top1_agreement": ("Top-1 agreement", "{:.2%}"),
    "argmax_agreement": ("Argmax agreement", "{:.2%}"),
    "cosine": ("Cosine", "{:.5f}"),
    "cosine_min": ("Worst cosine", "{:.5f}"),
    "sqnr_db": ("SQNR", "{:.1f} dB"),
}


def decibel_text(value: float | None) -> str:
    """A signal-to-noise ratio, or a dash where nothing was lost."""
    return "-" if value is None else f"{value:.1f} dB"


def _ratio_text(value: float) -> str:
    return f"{value:.3f}"


def convert_tables(report: Report) -> list[Table]:
    """Layers, what was left and why, totals."""
    source, artifact = report.models
    done = [row for row in report.layers if row.scheme]
    left = [row for row in report.layers if not row.scheme]
    layers = Table(
        f"{source.path} -> {artifact.path}",
        ("Layer", "Scheme", "Before", "After", "SQNR"),
        [
            (name, row[0].scheme or "", *_sizes(row), _worst(row))
            for name, row in collapse(done, key=lambda row: row.scheme or "")
        ],
        _SIZES,
        "SQNR: signal to quantization noise of the weights; of alike layers the worst." if done else None,
    )
    reasons: dict[str, list[LayerRow]] = {}
    for row in left:
        reasons.setdefault(row.reason or "", []).append(row)
    kept = Table(
        "Left unquantized",
        ("Why", "Tensors", "Before", "After"),
        [(reason, str(len(rows)), *_sizes(rows)) for reason, rows in reasons.items()],
        _SIZES,
    )
    runtime = report.details.get("verified", {}).get("runtime", {})
    proof = [_kernel_table(runtime)] if runtime.get("integer_kernels") or runtime.get("float_kernels") else []
    training = training_table(report)
    shown = [layers, *([kept] if left else []), *proof, *([training] if training else [])]
    return [*shown, _totals(report, source, artifact)]


def training_table(report: Report) -> Table | None:
    """The model before quantization, after it, and after training, side by side; None where nothing was trained."""
    training: Mapping[str, Any] | None = report.details.get("training")
    if training is None:
        return None
    models: Mapping[str, Mapping[str, float | None]] = training["models"]
    known = dict.fromkeys([*_METRICS, *(name for metrics in models.values() for name in metrics)])
    present = [
        name
        for name in known
        if _is_shown(name) and name != "loss" and any(metrics.get(name) is not None for metrics in models.values())
    ]
    rows = [
        (_TRAINED[name], _decimal(models[name].get("loss")), *(metric_text(models[name], each) for each in present))
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
        ("Ratio", f"{_ratio_text(ratio)} ({1 / ratio:.1f}x smaller)"),
        ("Format", f"{artifact.format}, algorithm {artifact.details['algorithm'] or 'cast'}"),
    ]
    if "seconds" in report.details:
        rows.append(("Time", format_seconds(report.details["seconds"])))
        rows.append(("Peak memory", format_bytes(report.details["peak_rss_bytes"])))
        verified = report.details["verified"]
        rows.append(("Verified", f"{verified['tensors']} tensors reopened and decoded, all codes equal"))
        rows.append(("Runtime", _runtime_text(verified["runtime"])))
        if "compared" in verified:
            compared = verified["compared"]
            outputs = f"{decibel_text(compared['sqnr_db'])} on {_count(compared['samples'], 'sample')} of the data"
            rows.append(("Outputs", outputs))
        speed = artifact.metrics.get("speed")
        if speed is not None:
            rows.append(("Speed", f"about {speed:.2g} times the model's, on these samples"))
    return Table(
        "Total" if "seconds" in report.details else "Total (dry run: nothing was written)", ("", "Value"), rows
    )


def _runtime_text(runtime: Mapping[str, Any]) -> str:
    """What the runtime said of an artifact."""
    if "integer_kernels" in runtime:
        return (
            f"{runtime['runtime']} loads it, with {_count(sum(runtime['integer_kernels'].values()), 'integer kernel')}"
        )
    if runtime["checked"]:
        return f"transformers {runtime['transformers']} finds every weight of {runtime['class']}"
    return f"not checked: {runtime['reason']}"


def _kernel_table(runtime: Mapping[str, Any]) -> Table:
    """Kernels of the runtime's optimized graph."""
    rows = [(name, str(count), "") for name, count in runtime["integer_kernels"].items()]
    rows += [(name, "", str(count)) for name, count in runtime["float_kernels"].items()]
    left = _count(runtime["conversions_left"], "QuantizeLinear or DequantizeLinear node")
    note = f"Beside them, {left} {'remains' if runtime['conversions_left'] == 1 else 'remain'}."
    return Table(f"Kernels, as {runtime['runtime']} optimized the graph", ("Kernel", "Integer", "Float"), rows,
                 frozenset({"Integer", "Float"}), note if runtime["conversions_left"] else None)  # fmt: skip


def inspect_tables(report: Report, *, layers: bool) -> list[Table]:
    """The model, what it is made of, and what schemes would do."""
    (model,) = report.models
    details = model.details
    facts = [
        ("Architecture", details["architecture"] or "unknown (no config.json)"),
        ("Format", " ".join(filter(None, (model.format, model.scheme)))),
        ("Size", f"{format_bytes(model.size_bytes or 0)} in {_count(details['files'], 'file')}"),
        ("Parameters", f"{details['parameters']:,}" if details["parameters"] else "quantized"),
        ("Tensors", str(details["tensors"])),
        ("Dtypes", ", ".join(f"{dtype} {format_bytes(entry['bytes'])}" for dtype, entry in details["dtypes"].items())),
    ]
    facts += [(name.capitalize(), each) for name in ("inputs", "outputs") for each in details.get(name, [])]
    if "operators" in details:
        facts.append(("Operators", ", ".join(f"{count} {name}" for name, count in details["operators"].items())))
    facts += [("Quantized", f"{_count(count, 'layer')}: {name}") for name, count in details["quantized_layers"].items()]
    roles = [(role, str(entry["tensors"]), format_bytes(entry["bytes"])) for role, entry in details["roles"].items()]
    tables = [Table(model.path, ("", "Value"), facts)]
    if roles:
        tables.append(Table("By role", ("Role", "Tensors", "Size"), roles, _SIZES))
    schemes = report.details.get("schemes", [])
    if schemes:
        rows: list[tuple[str, ...]] = [
            (
                entry["scheme"], entry["format"], format_bytes(entry["size_bytes"]), _ratio_text(entry["size_ratio"]),
                str(entry["quantized_tensors"]), ", ".join(f"{count} {role}" for role, count in entry["left"].items()),
            )
            for entry in schemes
            if entry["applies"]
        ]  # fmt: skip
        columns: tuple[str, ...] = ("Scheme", "Format", "Size", "Ratio", "Tensors", "Left")
        if not any(row[-1] for row in rows):
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        note = "The graph's new nodes add some kilobytes." if model.format == "onnx" else None
        if rows:
            tables.append(Table("What convert would write", columns, rows, _SIZES, note))
    if layers:
        tables.append(_layer_table(report.layers))
    return tables


def _layer_table(layers: Sequence[LayerRow]) -> Table:
    rows = [
        (row.name, str(row.details["shape"]), row.scheme or row.reason or row.details["role"], *_sizes([row]))
        for row in layers
    ]
    return Table("Tensors", ("Name", "Shape", "Decision", "Before", "After"), rows, _SIZES)


def eval_tables(report: Report) -> list[Table]:
    """Models side by side; then layers, worst first; then gates."""
    known = dict.fromkeys([*_METRICS, *(name for model in report.models for name in model.metrics)])
    present = [name for name in known if _is_shown(name) and any(name in model.metrics for model in report.models)]
    columns = ("Model", "Scheme", "Size", "Ratio", *(metric_label(name) for name in present))
    names, folder = short_names(report.models)
    rows = []
    for model in report.models:
        cells = [metric_text(model.metrics, name) for name in present]
        rows.append(
            (
                names[model.path], scheme_text(model, report), _size_text(model.size_bytes),
                _ratio_text(model.metrics["size_ratio"] or 0), *cells,
            )
        )  # fmt: skip
    note = f"{report.details['samples']} samples of {report.details['data']}; +- is one standard error"
    right = _SIZES | {metric_label(name) for name in present}
    task = str(report.details["task"])
    tables = [Table(f"{task if ':' in task else task.capitalize()}{folder}", columns, rows, right, note)]
    verdicts = [(names[each.path], each.details["verdict"]) for each in report.models if "verdict" in each.details]
    if verdicts:
        origin = "By KL divergence. Q8_0, Q6_K, Q4_K_M and Q4_0 are llama.cpp's formats, measured on Llama-3-8B."
        tables.append(Table("Verdict", ("Model", "Verdict"), verdicts, note=origin))
    for path in dict.fromkeys(row.model for row in report.layers):
        part = [row for row in report.layers if row.model == path]
        lines = [(row.name, row.scheme or "", *_layer_sizes(row), decibel_text(row.sqnr_db)) for row in part]
        tables.append(
            Table(
                f"Layers of {path}, worst first", ("Layer", "Scheme", "Before", "After", "SQNR"), lines, _SIZES,
                "SQNR of each layer's output against the reference's; it holds the error of the layers before.",
            )
        )  # fmt: skip
    if report.gates:
        tables.append(gate_table(report))
    return tables


def gate_table(report: Report) -> Table:
    """One row per gate."""
    names, folder = short_names(report.models)
    rows = [
        (
            gate.require,
            names.get(gate.model, gate.model),
            "none" if gate.value is None else f"{gate.value:.6g}",
            "passed" if gate.passed else "FAILED",
        )
        for gate in report.gates
    ]
    return Table(f"Gates{folder}", ("Require", "Model", "Value", "Result"), rows, _SIZES)


def _is_shown(name: str) -> bool:
    """Whether a metric has a column of its own: standard errors and sizes stand in others."""
    return not name.endswith("_se") and not name.startswith("size_")


def metric_label(name: str) -> str:
    """What people call a metric."""
    return _METRICS[name][0] if name in _METRICS else name


def is_fraction(name: str) -> bool:
    """Whether people read a metric in percent."""
    return name in _METRICS and _METRICS[name][1].endswith("%}")


def _size_text(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


def metric_text(metrics: Mapping[str, float | None], name: str) -> str:
    """A metric with its standard error, where that is known; a dash where there is none."""
    value = metrics.get(name)
    if value is None:
        return "-"
    form = _METRICS[name][1] if name in _METRICS else "{:.5g}"
    error = metrics.get(f"{name}_se")
    return form.format(value) if error is None else f"{form.format(value)} +- {form.format(error)}"


def _sizes(rows: Iterable[LayerRow]) -> tuple[str, str]:
    rows = list(rows)
    return format_bytes(sum(row.bytes_before for row in rows)), format_bytes(sum(row.bytes_after for row in rows))


def _layer_sizes(row: LayerRow) -> tuple[str, str]:
    """Sizes of a layer's weights; an activation has none."""
    return _sizes([row]) if row.bytes_before else ("-", "-")


def _worst(rows: Iterable[LayerRow]) -> str:
    return decibel_text(min((row.sqnr_db for row in rows if row.sqnr_db is not None), default=None))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def collapse(rows: Sequence[LayerRow], key: Callable[[LayerRow], str]) -> list[tuple[str, list[LayerRow]]]:
    """Rows that differ in layer numbers only, together: ``model.layers.{0-29}.mlp.up_proj x 30``.

    Where that leaves many, those that differ in any number: ``conv2d_{10-184}.w_0 x 37``.
    """
    groups = _group(rows, key, _LAYER_NUMBER)
    return groups if len(groups) <= _MANY_ROWS else _group(rows, key, _ANY_NUMBER)


def _group(
    rows: Sequence[LayerRow], key: Callable[[LayerRow], str], number: re.Pattern[str]
) -> list[tuple[str, list[LayerRow]]]:
    groups: dict[tuple[str, str], list[LayerRow]] = {}
    for row in rows:
        groups.setdefault((number.sub("#", row.name), key(row)), []).append(row)
    return [(_range_name(members, number), members) for members in groups.values()]


def _range_name(members: Sequence[LayerRow], number: re.Pattern[str]) -> str:
    """One name for members that are alike but for their numbers."""
    first = members[0].name
    if len(members) == 1:
        return first
    columns = zip(*(number.findall(row.name) for row in members), strict=True)
    ranges = iter([column[0] if len(set(column)) == 1 else _range(column) for column in columns])
    return f"{number.sub(lambda _: next(ranges), first)} x {len(members)}"


def _range(numbers: Iterable[str]) -> str:
    values = [int(number) for number in numbers]
    return f"{{{min(values)}-{max(values)}}}"


def scheme_text(model: ModelRow, report: Report) -> str:
    """Format and scheme of a model; the scheme alone where all models are of one format."""
    alike = len({each.format for each in report.models}) == 1
    return " ".join(filter(None, (None if alike and model.scheme else model.format, model.scheme)))


def short_names(models: Sequence[ModelRow]) -> tuple[dict[str, str], str]:
    """Paths without the folder that all models share, and that folder for a title, or nothing where there is none."""
    paths = [model.path for model in models]
    parents = [str(PurePath(path).parent) for path in paths]
    relative = any(PurePath(path).is_absolute() != PurePath(paths[0]).is_absolute() for path in paths)
    folder = "" if len(paths) < 2 or relative else os.path.commonpath(parents)
    if folder in ("", ".", PurePath(folder).anchor) or "." in parents:
        return {path: path for path in paths}, ""
    return {path: str(PurePath(path).relative_to(folder)) for path in paths}, f", models in {folder}"
