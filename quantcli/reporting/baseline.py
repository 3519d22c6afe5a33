"""``--baseline REPORT.json``: an earlier report of the same command, as the reference of gates.

Each model is compared with the baseline's model of the same path and role; else of the same path; else, where either
report has only one of the role, with that one. Only numbers are taken from the baseline: its models are not run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quantcli.errors import InputError, UsageError
from quantcli.reporting.gates import DROP, Gate, apply_gates, gated, value_of
from quantcli.reporting.report import SCHEMA_VERSION, GateRow, ModelRow, Report
from quantcli.system.text import first_line

#: What gates measure against the baseline beside drops, and the metric that each is made of.
_RATIOS = {"size_ratio": "size_bytes", "speedup": "latency_ms_p50"}
#: Measured in rounds with the reference of the same run: with a model of another run there are none.
_INTERVALS = frozenset({"speedup_low", "speedup_high"})
#: What should be as it was, and what it is called.
_CONDITIONS = {
    "task": "task", "samples": "number of samples", "cpu": "CPU", "threads": "number of threads",
    "runtimes": "versions of the runtimes", "inputs": "shapes of the inputs",
}  # fmt: skip
_MOST_BYTES = 256 << 20


class _Entry(BaseModel):
    """A part of the document; keys that later versions add are allowed."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Entry):
    path: str
    role: str
    sha256: str | None = None
    size_bytes: int | None = None
    metrics: dict[str, float | int | None]


class _Document(_Entry):
    schema_version: int
    command: str
    quantcli: str
    models: list[_Model]


@dataclass(frozen=True)
class Baseline:
    """An earlier report, and the models of it that this run's models are compared with, in their order."""

    path: str
    quantcli: str
    models: Sequence[ModelRow]
    details: dict[str, Any]

    def metrics_of(self, index: int) -> dict[str, float]:
        """The metrics that the baseline has of a model of this run."""
        return {name: value for name, value in self.models[index].metrics.items() if value is not None}

    def require(self, gates: Sequence[Gate]) -> None:
        """Raise UsageError for a gate on what the baseline does not hold, or cannot be compared with."""
        for gate in gates:
            if gate.metric in _INTERVALS:
                raise UsageError(
                    f"--require {gate.text!r}: {gate.metric} comes from rounds in which models take turns, and those "
                    "of --baseline took other turns.",
                    "Ask for speedup.",
                )
            needed = _RATIOS.get(gate.metric) or gate.metric.removesuffix(DROP)
            if needed == gate.metric:
                continue
            for index in gated(len(self.models)):
                known = self.metrics_of(index)
                if needed not in known:
                    raise UsageError(
                        f"--require {gate.text!r}: {self.path} has no {needed} of {self.models[index].path}.",
                        f"It has: {', '.join(sorted(known)) or 'no metrics'}.",
                    )

    def apply(self, gates: Sequence[Gate], models: Sequence[ModelRow]) -> list[GateRow]:
        """Check every gate on every candidate, or on the reference where it stands alone, against the baseline."""
        return [
            gate.check(models[index], _value(gate.metric, self.models[index], models[index]))
            for gate in gates
            for index in gated(len(models))
        ]

    def changes(self, report: Report) -> list[str]:
        """Warnings: what differs between the baseline and a report of this run beside the figures."""
        warnings = []
        for before, now in zip(self.models, report.models, strict=True):
            if before.sha256 and now.sha256 and before.sha256 != now.sha256:
                other = "" if before.path == now.path else f" {before.path}"
                warnings.append(
                    f"{now.path} is not the model{other} of {self.path}: its sha256 was {before.sha256[:12]}... and is "
                    f"{now.sha256[:12]}...."
                )
        then = self.details.get("data_sha256")
        if then is None or report.details.get("data_sha256") is None:
            warnings.append(f"Whether {self.path} was measured on the same data cannot be told: it does not say.")
        elif then != report.details["data_sha256"]:
            warnings.append(
                f"The data is not that of {self.path}: its sha256 was {then[:12]}... and is "
                f"{report.details['data_sha256'][:12]}.... Differences may come from the data alone."
            )
        for key, name in _CONDITIONS.items():
            if key in self.details and key in report.details and self.details[key] != report.details[key]:
                was, is_now = (_text(found[key]) for found in (self.details, report.details))
                warnings.append(f"The {name} is not that of {self.path}: {was} then, {is_now} now.")
        return warnings

    def to_json(self) -> dict[str, Any]:
        """What a report says of its baseline."""
        models = [{"path": row.path, "sha256": row.sha256, "metrics": row.metrics} for row in self.models]
        return {"path": self.path, "quantcli": self.quantcli, "models": models}


def read_baseline(path: str | Path, command: str, models: Sequence[str | Path]) -> Baseline:
    """The report in a file, and its counterparts of the models of this run, the first of which is the reference.

    Raises:
        InputError: the file cannot be read, is no report of quantcli, or of a version or command that does not fit.
        UsageError: it has no model to compare one of these with.
    """
    document = _document(Path(path))
    if document.command != command:
        raise InputError(f"{path} is a report of quantcli {document.command}, and this is {command}.")
    rows = [ModelRow(m.path, m.role, None, None, m.sha256, m.size_bytes, dict(m.metrics)) for m in document.models]
    for row, model in zip(rows, document.models, strict=True):
        row.details = dict(model.model_extra or {})
    roles = ["reference", *["candidate"] * (len(models) - 1)]
    pairs = [_counterpart(str(model), role, roles, rows, path) for model, role in zip(models, roles, strict=True)]
    return Baseline(str(path), document.quantcli, pairs, dict(document.model_extra or {}))


def require_batch_size(baseline: Baseline, size: int) -> None:
    """Raise UsageError where a baseline's latencies are of another batch size: their ratio would mean nothing."""
    for row in baseline.models:
        batches = row.details.get("batches")
        first = batches[0].get("batch_size") if isinstance(batches, list) and batches else None
        if isinstance(first, int) and first != size:
            raise UsageError(
                f"{baseline.path} has latencies of batch size {first}, and this run of {size}.",
                f"Name the same size first: --batch-size {first}.",
            )


def judge(report: Report, gates: Sequence[Gate], baseline: Baseline | None) -> None:
    """Put gates into a report whose models are measured, and what is to be said of its baseline."""
    if baseline is None:
        report.gates = apply_gates(gates, report.models)
        return
    report.gates = baseline.apply(gates, report.models)
    report.warnings += baseline.changes(report)
    report.details["baseline"] = baseline.to_json()


def _document(path: Path) -> _Document:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"The baseline {path} is over {_MOST_BYTES >> 20} MiB, too much for what it should be.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The baseline {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The baseline {path} is no JSON: {first_line(error)}.", "Make it with: quantcli ... --json > REPORT.json"
        ) from error
    version = found.get("schema_version") if isinstance(found, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise InputError(
            f"The baseline {path} has schema_version {version}, and this quantcli knows {SCHEMA_VERSION}.",
            "Write it anew with this version, or use the quantcli that wrote it.",
        )
    try:
        return _Document.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"The baseline {path} is no report of quantcli: {f'{where}: ' if where else ''}{first['msg']}.",
            "Make one with: quantcli ... --json > REPORT.json",
        ) from error


def _counterpart(model: str, role: str, roles: Sequence[str], rows: Sequence[ModelRow], path: str | Path) -> ModelRow:
    same = [row for row in rows if PurePath(row.path) == PurePath(model)]
    fitting = [row for row in same if row.role == role] or same
    if not fitting and roles.count(role) == 1:
        fitting = [row for row in rows if row.role == role]
    if len(fitting) == 1 or same:
        return fitting[0]
    listed = ", ".join(f"{row.path} ({row.role})" for row in rows) or "no models"
    raise UsageError(
        f"{path} has no model to compare {model} with: none of this path, and not one {role} alone in both.",
        f"It has: {listed}.",
    )


def _value(metric: str, before: ModelRow, now: ModelRow) -> float | None:
    if metric not in _RATIOS:
        return value_of(metric, before, now)
    then, this = before.metrics.get(_RATIOS[metric]), now.metrics.get(_RATIOS[metric])
    # A speed-up is of times, of which fewer are more.
    over, under = (then, this) if metric == "speedup" else (this, then)
    return over / under if over is not None and under else None


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
