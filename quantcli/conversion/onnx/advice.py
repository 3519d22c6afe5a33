"""Which scheme to take: where fixed ranges lose much, dynamic ones are tried on the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantcli.conversion.onnx.comparison import OutputComparison
from quantcli.conversion.onnx.equivalence import Data
from quantcli.conversion.onnx.source import planned_graph
from quantcli.onnx.graph.model import OnnxModel
from quantcli.onnx.graph.save import save_graph
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.judge import without_inputs
from quantcli.onnx.rewrite.transform import transform
from quantcli.planning.recipe import Recipe

#: Outputs that keep this much are good enough for most uses; below, another scheme is tried.
GOOD_OUTPUT_SQNR_DB = 20.0

#: By how much another scheme must be better to be recommended.
_BETTER_BY_DB = 3.0


@dataclass(frozen=True)
class Advice:
    """The scheme to take, if one can be named, and what is to be said of it."""

    scheme: str | None = None
    warnings: tuple[str, ...] = ()


def advise(
    recipe: Recipe,
    original: OnnxModel,
    data: Data,
    evidence: Evidence,
    comparison: OutputComparison,
    kept_db: float | None,
    folder: Path,
) -> Advice:
    """The scheme to take in place of a recipe's, or that one.

    Args:
        recipe: what was carried out.
        original: the model it was carried out on.
        data: of the user.
        evidence: what it was carried out by.
        comparison: of the model's outputs, once the recipe's artifact was compared.
        kept_db: signal to noise of that artifact's outputs; None: they are equal.
        folder: where the other artifact is written.
    """
    scheme = recipe.scheme
    if not isinstance(scheme, str):
        return Advice()
    if scheme != "int8-static" or kept_db is None or kept_db >= GOOD_OUTPUT_SQNR_DB:
        return Advice(scheme)
    graph, plan = planned_graph(original, recipe.with_flags(scheme="int8-dynamic"), data)
    if evidence.hessians is not None:
        plan = without_inputs(plan, evidence.hessians)
    transform(graph, plan, evidence)
    other = folder / "alternative.onnx"
    save_graph(graph, other)
    better = comparison.against(other).sqnr_db
    outcome = f"{scheme} leaves the outputs at {kept_db:.1f} dB; int8-dynamic"
    if better is not None and better < kept_db + _BETTER_BY_DB:
        return Advice(scheme, (f"{outcome} would at {better:.1f} dB.",))
    figure = "equal" if better is None else f"at {better:.1f} dB"
    return Advice("int8-dynamic", (f"{outcome} leaves them {figure} and is recommended.",))
