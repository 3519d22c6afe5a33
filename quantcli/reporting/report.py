"""The report of every command: one structure, rendered as JSON, Markdown or JUnit."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantcli.version import __version__

SCHEMA_VERSION = 1


@dataclass
class ModelRow:
    """One model of a report. ``metrics`` are finite numbers or None.

    ``manifest`` is what the model says of itself, for people: the JSON document does not repeat it.
    """

    path: str
    role: str
    format: str | None = None
    scheme: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None


@dataclass
class LayerRow:
    """One tensor of a report; ``sqnr_db`` None: nothing was lost, or it was not measured."""

    name: str
    scheme: str | None
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None = None
    reason: str | None = None
    model: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class GateRow:
    """One ``--require`` of one candidate."""

    require: str
    model: str
    value: float | None
    passed: bool


@dataclass
class Report:
    """What a command found out."""

    command: str
    models: list[ModelRow] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    gates: list[GateRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command line's contract."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "quantcli": __version__,
            "models": [_row(model) for model in self.models],
            "layers": [_row(layer) for layer in self.layers],
            "gates": [_row(gate) for gate in self.gates],
            "warnings": self.warnings,
            **self.details,
        }

    def to_json(self) -> str:
        """Canonical JSON: floats are finite or null."""
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False, allow_nan=False)


def _row(row: Any) -> dict[str, Any]:
    fields = {key: value for key, value in vars(row).items() if key not in ("details", "manifest")}
    return fields | getattr(row, "details", {})


def planned_for(scheme: str, rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Rows that say which of several schemes would do this to a layer."""
    for row in rows:
        row.details["plan"] = scheme
    return list(rows)


def finite(value: Any) -> Any:
    """The same data with every NaN and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


@dataclass(frozen=True)
class Bars:
    """A bar beside each row of a table, full where its share is 1; ``meaning`` is a sentence for people."""

    name: str
    shares: Sequence[float | None]
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table ready to be shown: cells are text, ``right`` names the columns that hold numbers.

    ``names`` are the columns that hold names, and what separates their parts, the likeliest first: a narrow terminal
    shortens them in the middle. ``bars`` are for the eye; what they show is in the cells, too.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[str] = frozenset()
    note: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    bars: Bars | None = None

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = "|" + "|".join(" ---: " if column in self.right else " --- " for column in self.columns) + "|"
        parts = [f"### {self.title}", "", line(self.columns), rule, *(line(row) for row in self.rows)]
        return "\n".join([*parts, "", self.note, ""] if self.note else [*parts, ""])


def bytes_by(pairs: Sequence[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """How many tensors there are of each kind, and their bytes, the largest sum first; of pairs of kind and bytes."""
    counts, sizes = Counter[str](), Counter[str]()
    for key, nbytes in pairs:
        counts[key] += 1
        sizes[key] += nbytes
    return {key: {"tensors": counts[key], "bytes": sizes[key]} for key, _ in sizes.most_common()}
