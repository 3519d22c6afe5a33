"""Gates: ``--require "METRIC OP NUMBER"``, the part of a report that becomes an exit status."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.reporting.report import GateRow, ModelRow

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_EXPRESSION = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|==|<|>)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Gate:
    """One requirement. ``METRIC_drop`` is the reference's value minus the candidate's."""

    text: str
    metric: str
    operator: str
    bound: float

    def check(self, reference: ModelRow, model: ModelRow) -> GateRow:
        """Apply the gate to one model; a metric without a value does not pass."""
        value = _value(self.metric, reference, model)
        passed = value is not None and _OPERATORS[self.operator](value, self.bound)
        return GateRow(self.text, model.path, value, passed)


def parse_gates(texts: Iterable[str], known: Sequence[str] | None) -> list[Gate]:
    """Parse requirements. Raises UsageError for bad syntax or a metric not in ``known`` (or its drop).

    ``known`` is None where metrics are not known before they are measured.
    """
    gates = []
    for text in texts:
        match = _EXPRESSION.fullmatch(text)
        if not match:
            raise UsageError(
                f"--require {text!r} is not METRIC OP NUMBER.", 'Write for example: --require "perplexity_drop >= -0.5"'
            )
        metric, symbol, bound = match.groups()
        if known is not None and metric not in known and metric.removesuffix("_drop") not in known:
            listed = ", ".join(sorted(known))
            raise UsageError(
                f"--require names the unknown metric {metric!r}.", f"Known: {listed}; each also with _drop."
            )
        try:
            gates.append(Gate(text, metric, symbol, float(bound)))
        except ValueError as error:
            raise UsageError(f"--require {text!r}: {bound!r} is not a number.") from error
    return gates


def apply_gates(gates: Iterable[Gate], models: Sequence[ModelRow]) -> list[GateRow]:
    """Check every gate on every candidate, or on the reference where it stands alone."""
    reference, *candidates = models
    return [gate.check(reference, model) for gate in gates for model in candidates or [reference]]


def _value(metric: str, reference: ModelRow, model: ModelRow) -> float | None:
    if metric in model.metrics or not metric.endswith("_drop"):
        return model.metrics.get(metric)
    name = metric.removesuffix("_drop")
    before, after = reference.metrics.get(name), model.metrics.get(name)
    return None if before is None or after is None else before - after
