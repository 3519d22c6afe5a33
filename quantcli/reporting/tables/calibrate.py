"""Tables of what is done to ONNX graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.reporting.metric_labels import decibel_text
from quantcli.reporting.report import LayerRow, Report, Table
from quantcli.reporting.tables.common import LAYER_NAMES, collapse, error_bars
from quantcli.system.text import format_bytes

#: Tensors, or groups of alike ones, that the table of `calibrate` shows.
_SHOWN = 10


def calibrate_tables(report: Report) -> list[Table]:
    """What was observed, and the tensors that eight bits fit worst."""
    details = report.details
    tensors: Sequence[Mapping[str, Any]] = details["tensors"]
    facts = [
        ("Tensors", str(len(tensors))),
        ("Values", f"{sum(tensor['elements'] for tensor in tensors):,}"),
        ("Samples", f"{details['samples']} of {details['data']}"),
        ("Method", details["method"]),
        ("Model", f"{(report.models[0].sha256 or '')[:16]}..., {format_bytes(report.models[0].size_bytes or 0)}"),
    ]
    rows = [LayerRow(tensor["name"], None, 0, 0, tensor["sqnr_db"], details=dict(tensor)) for tensor in tensors]
    rows.sort(key=lambda row: math.inf if row.sqnr_db is None else row.sqnr_db)
    groups = collapse(rows, key=lambda row: None)
    shown = groups[:_SHOWN]
    cells = [
        (group.name, *(_number(group.rows[0].details[key]) for key in ("min", "max", "low", "high")),
         decibel_text(group.rows[0].sqnr_db))
        for group in shown
    ]  # fmt: skip
    note = "SQNR: expected signal to quantization noise of the tensor in 8 bits, with one scale, from Low to High."
    if len(groups) < len(tensors):
        note += " Of alike tensors the worst is shown."
    return [
        Table(f"{report.models[0].path} -> {details['output']}", ("", "Value"), facts),
        Table(
            "Hardest to quantize" if len(groups) > _SHOWN else "Tensors, hardest to quantize first",
            ("Tensor", "Smallest", "Largest", "Low", "High", "SQNR"),
            cells,
            frozenset({"Smallest", "Largest", "Low", "High", "SQNR"}),
            note,
            LAYER_NAMES,
            error_bars(group.rows[0].sqnr_db for group in shown),
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
