"""The tables of `inspect`."""

from __future__ import annotations

from collections.abc import Sequence

from quantcli.reporting.report import LayerRow, Report, Table
from quantcli.reporting.tables.common import LAYER_NAMES, SIZES, collapse, counted_text, ratio_text, total_sizes
from quantcli.system.text import format_bytes


def inspect_tables(report: Report, *, layers: bool) -> list[Table]:
    """The model, what it is made of, and what schemes would do."""
    (model,) = report.models
    details = model.details
    facts = [
        ("Architecture", details["architecture"] or "unknown (no config.json)"),
        ("Format", " ".join(filter(None, (model.format, model.scheme)))),
        ("Size", format_bytes(model.size_bytes or 0) + _in_files(details["files"])),
        ("Parameters", f"{details['parameters']:,}" if details["parameters"] else "quantized"),
        ("Tensors", str(details["tensors"])),
        ("Dtypes", ", ".join(f"{dtype} {format_bytes(entry['bytes'])}" for dtype, entry in details["dtypes"].items())),
    ]
    facts += [(name.capitalize(), port) for name in ("inputs", "outputs") for port in details.get(name, [])]
    if "operators" in details:
        facts.append(("Operators", ", ".join(f"{count} {name}" for name, count in details["operators"].items())))
    facts += [
        ("Quantized", f"{counted_text(count, 'layer')}: {name}") for name, count in details["quantized_layers"].items()
    ]
    roles = [(role, str(entry["tensors"]), format_bytes(entry["bytes"])) for role, entry in details["roles"].items()]
    tables = [Table(model.path, ("", "Value"), facts)]
    if roles:
        tables.append(Table("By role", ("Role", "Tensors", "Size"), roles, SIZES))
    schemes = report.details.get("schemes", [])
    if schemes:
        rows: list[tuple[str, ...]] = [
            (
                entry["scheme"], entry["format"], format_bytes(entry["size_bytes"]), ratio_text(entry["size_ratio"]),
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
            tables.append(Table("What convert would write", columns, rows, SIZES, note))
    if layers:
        # Of several schemes each decides on every tensor.
        for scheme in dict.fromkeys(row.details.get("plan") for row in report.layers):
            part = [row for row in report.layers if row.details.get("plan") == scheme]
            tables.append(_layer_table(part, "Tensors" if scheme is None else f"Tensors with {scheme}"))
    return tables


def _in_files(count: int) -> str:
    """Of a function there are none."""
    return f" in {counted_text(count, 'file')}" if count else ""


def _layer_table(layers: Sequence[LayerRow], title: str) -> Table:
    groups = collapse(layers, key=lambda row: (str(row.details["shape"]), _decision(row)))
    rows = [
        (group.name, str(group.rows[0].details["shape"]), _decision(group.rows[0]), *total_sizes(group.rows))
        for group in groups
    ]
    return Table(title, ("Name", "Shape", "Decision", "Before", "After"), rows, SIZES, names=LAYER_NAMES)


def _decision(row: LayerRow) -> str:
    return str(row.scheme or row.reason or row.details["role"])
