"""What a page shows of a graph's worst layers: weights beside what their codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantcli.core.histogram import TensorHistogram, of_weight
from quantcli.onnx.graph.values import array
from quantcli.onnx.plan.plan import LayerOutcome

if TYPE_CHECKING:
    import onnx_ir as ir


def weight_histograms(model: ir.Model, outcomes: Sequence[LayerOutcome], most: int) -> list[dict[str, Any]]:
    """Histograms of the worst weights whose codes tell what they stand for, the worst first.

    ``model`` still has the weights as they were.
    """
    values = {name: value for graph in model.graphs() for name, value in graph.initializers.items()}
    told = {
        outcome.plan.name: outcome
        for outcome in outcomes
        if outcome.decoded is not None and outcome.sqnr_db is not None and outcome.plan.name in values
    }
    worst = sorted(told.values(), key=lambda outcome: outcome.sqnr_db or 0.0)[:most]
    found = [_of_weight(values[outcome.plan.name], outcome) for outcome in worst]
    return [histogram.to_json() for histogram in found if histogram is not None]


def _of_weight(value: ir.Value, outcome: LayerOutcome) -> TensorHistogram | None:
    before, decoded = array(value), outcome.decoded
    if before is None or decoded is None:
        return None
    after = decoded()
    return of_weight(outcome.plan.name, lambda: [before], lambda: [after], outcome.sqnr_db)
