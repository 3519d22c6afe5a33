"""Which scheme to take: where fixed ranges lose much, dynamic ones are tried on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.onnx.graph.model import OnnxModel
from quantcli.onnx.graph.opset import QDQ_OPSET, upgrade
from quantcli.onnx.graph.prepare import prepare
from quantcli.onnx.graph.save import save_graph
from quantcli.onnx.plan.judge import Hessians, without_inputs
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.onnx.rewrite.transform import transform
from quantcli.planning.recipe import Recipe

if TYPE_CHECKING:
    from quantcli.calibration.statistics import CalibrationStats
    from quantcli.conversion.onnx.comparison import OutputComparison

#: Outputs that keep this much are good enough for most uses; below, another scheme is tried.
GOOD_OUTPUT_SQNR_DB = 20.0

#: By how much another scheme must be better to be recommended.
_BETTER_BY_DB = 3.0


def recommend(
    recipe: Recipe,
    original: OnnxModel,
    statistics: CalibrationStats | None,
    hessians: Hessians | None,
    comparison: OutputComparison,
    kept_db: float | None,
    folder: Path,
) -> tuple[str | None, list[str]]:
    """The scheme to take in place of a recipe's, or that one; and what is to be said of it.

    Args:
        recipe: what was carried out.
        original: the model it was carried out on.
        statistics: what calibration knows.
        hessians: the same for gptq.
        comparison: of the model's outputs, once the recipe's artifact was compared.
        kept_db: signal to noise of that artifact's outputs; None: they are equal.
        folder: where the other artifact is written.
    """
    asked = recipe.scheme
    if not isinstance(asked, str):
        return None, []
    if asked != "int8-static" or kept_db is None or kept_db >= GOOD_OUTPUT_SQNR_DB:
        return asked, []
    dynamic = recipe.with_flags(scheme="int8-dynamic")
    graph = upgrade(prepare(original), QDQ_OPSET)
    plan = resolve_graph(dynamic, graph, original.path)
    if hessians is not None:
        plan = without_inputs(plan, hessians)
    transform(graph, plan, statistics, hessians=hessians)
    other = folder / "alternative.onnx"
    save_graph(graph, other)
    better = comparison.against(other).sqnr_db
    if better is not None and better < kept_db + _BETTER_BY_DB:
        return asked, [f"{asked} leaves the outputs at {kept_db:.1f} dB; int8-dynamic would at {better:.1f} dB."]
    figure = "equal" if better is None else f"at {better:.1f} dB"
    return "int8-dynamic", [
        f"{asked} leaves the outputs at {kept_db:.1f} dB; int8-dynamic leaves them {figure} and is recommended."
    ]
