"""`convert` to ONNX: by a recipe, or by the mix of schemes that keeps a budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from quantcli.commands.convert_budget import convert_within, require_other_data
from quantcli.conversion.onnx.pipeline import convert_onnx
from quantcli.data.request import DataRequest
from quantcli.errors import UsageError
from quantcli.planning.recipe import Recipe
from quantcli.planning.steps import training_step
from quantcli.reporting.report import Report
from quantcli.search.budget import Budget
from quantcli.search.onnx_guard import StaticGuard
from quantcli.search.onnx_searches import GraphSearches
from quantcli.search.onnx_subject import GraphSubject
from quantcli.system import ranks
from quantcli.system.files import temporary_folder
from quantcli.system.progress import Progress


def convert_graph(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    request: DataRequest | None,
    statistics: Path | None,
    *,
    budget: Budget | None,
    weights: Path | None,
    device: str,
    dry_run: bool,
    force: bool,
    allow_larger: bool,
    histograms: int,
    progress: Progress | None,
    cache: bool = False,
) -> Report:
    """Convert a model to ONNX. Arguments and errors are those of `convert_onnx`.

    Raises:
        UsageError: also where a budget does not go with the rest.
    """
    by_recipe = partial(
        convert_onnx, model, weights=weights, device=device, allow_larger=allow_larger, histograms=histograms,
        progress=progress,
    )  # fmt: skip
    if budget is None or budget == Budget():
        return by_recipe(
            output, recipe, request, statistics, dry_run=dry_run, force=force, guard=StaticGuard(), cache=cache
        )
    ranks.go_on_alone("The search for a budget")
    if recipe.runtime[0] == "transformers.js":
        raise UsageError(
            "A budget mixes schemes, and transformers.js has names for files of one.", "Name one with --scheme."
        )
    if recipe.scheme is not None:
        raise UsageError("A budget chooses the scheme.", "Leave --scheme out, or name schemes with --allow.")
    if training_step(recipe):
        raise UsageError("A budget is for a model as it is, and qat trains it.", "Train by the recipe that is found.")
    calibrated = request is not None or statistics is not None
    budget = budget.checked(onnx=True, data=calibrated)
    require_other_data(recipe, budget, data=request is not None and recipe.algorithm != "auto")
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(f".{output.name}.search-", parent) as folder:
        subject = GraphSubject(
            str(model), output, recipe, request, statistics, weights, budget.allow, budget.eval_data, budget.metric,
            Path(folder), progress,
        )  # fmt: skip
        searches = GraphSearches(subject)

        def convert_by(found: Recipe, place: Path, planned: bool) -> Report:
            return by_recipe(
                place, found, request, statistics, dry_run=planned, force=not planned, material=subject.material
            )

        return convert_within(
            str(model), output, budget, searches.search, convert_by, searches.losses, dry_run=dry_run, force=force
        )
