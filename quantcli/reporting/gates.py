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


#: End of a metric's name that stands for what was lost of it.
DROP = "_drop"


@dataclass(frozen=True)
class Gate:
    """One requirement. ``METRIC_drop`` is the earlier model's value minus this one's."""

    text: str
    metric: str
    operator: str
    bound: float

    def check(self, model: ModelRow, value: float | None) -> GateRow:
        """Apply the gate to a value of one model; without a value it does not pass."""
        passed = value is not None and _OPERATORS[self.operator](value, self.bound)
        return GateRow(self.text, model.path, value, passed)


def parse_gates(texts: Iterable[str], known: Sequence[str] | None, *, alone: bool = False) -> list[Gate]:
    """Parse requirements.

    Args:
        texts: ``METRIC OP NUMBER`` each.
        known: the metrics that may be named, as they are or with ``_drop``; None where they are not known before they
            are measured.
        alone: one model is measured, with nothing to compare it with. What it loses to itself is always 0: such a
            gate would pass whatever the model is worth.

    Raises:
        UsageError: bad syntax, a metric that is not known, or a comparison where there is nothing to compare with.
    """
    gates = []
    for text in texts:
        match = _EXPRESSION.fullmatch(text)
        if not match:
            raise UsageError(
                f"--require {text!r} is not METRIC OP NUMBER.", 'Write for example: --require "size_ratio <= 0.5"'
            )
        metric, symbol, bound = match.groups()
        if known is not None and metric not in known and metric.removesuffix(DROP) not in known:
            listed = ", ".join(sorted(known))
            raise UsageError(
                f"--require names the unknown metric {metric!r}.", f"Known: {listed}; each also with _drop."
            )
        compares = metric == "size_ratio" or (known is not None and metric not in known)
        if alone and compares:
            raise UsageError(
                f"--require {text!r} compares a model with another, and only one is given.",
                "Name a CANDIDATE behind MODEL, or an earlier report with --baseline.",
            )
        try:
            gates.append(Gate(text, metric, symbol, float(bound)))
        except ValueError as error:
            raise UsageError(f"--require {text!r}: {bound!r} is not a number.") from error
    return gates


def gated(count: int) -> range:
    """Which of so many models gates are about: the candidates, or the reference where it stands alone."""
    return range(1 if count > 1 else 0, count)


def apply_gates(gates: Iterable[Gate], models: Sequence[ModelRow]) -> list[GateRow]:
    """Check every gate on every candidate against the reference, or on the reference where it stands alone."""
    return [
        gate.check(models[index], value_of(gate.metric, models[0], models[index]))
        for gate in gates
        for index in gated(len(models))
    ]


def value_of(metric: str, before: ModelRow, model: ModelRow) -> float | None:
    """A metric of a model, or for ``METRIC_drop`` what ``before`` has more of it; None where there is no value."""
    if metric in model.metrics or not metric.endswith(DROP):
        return model.metrics.get(metric)
    name = metric.removesuffix(DROP)
    then, now = before.metrics.get(name), model.metrics.get(name)
    return None if then is None or now is None else then - now
