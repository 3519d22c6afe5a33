"""Tables of what is done to ONNX graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.reporting.metric_labels import decibel_text
from quantcli.reporting.report import Report, Table
from quantcli.system.text import format_bytes

#: Tensors that the table of `calibrate` shows.
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
    worst = sorted(tensors, key=lambda tensor: (tensor["sqnr_db"] is None, tensor["sqnr_db"]))[:_SHOWN]
    rows = [
        (
            tensor["name"],
            *(_number(tensor[key]) for key in ("min", "max", "low", "high")),
            decibel_text(tensor["sqnr_db"]),
        )
        for tensor in worst
    ]
    return [
        Table(f"{report.models[0].path} -> {details['output']}", ("", "Value"), facts),
        Table(
            "Hardest to quantize" if len(tensors) > _SHOWN else "Tensors, hardest to quantize first",
            ("Tensor", "Smallest", "Largest", "Low", "High", "SQNR"),
            rows,
            frozenset({"Smallest", "Largest", "Low", "High", "SQNR"}),
            "SQNR: expected signal to quantization noise of the tensor in 8 bits, with one scale, from Low to High.",
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
