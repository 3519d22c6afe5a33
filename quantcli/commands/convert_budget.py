"""`convert` with a budget: search for a mix of schemes, convert by it, judge what was written, then publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from quantcli.conversion.staging import Staging, open_staging, refuse_to_overwrite
from quantcli.errors import BudgetError, InputError, UsageError
from quantcli.models.source import open_model
from quantcli.planning.recipe import Recipe
from quantcli.planning.steps import named_steps, parse_steps
from quantcli.reporting.pareto import require_pareto, write_pareto
from quantcli.reporting.report import GateRow, Report
from quantcli.search.budget import Budget
from quantcli.search.choices import Found
from quantcli.system.files import check_target, whole_file, write_text
from quantcli.system.user_functions import is_function

#: Converts by a recipe into a place; the flag says whether it is only planned.
ConvertOne = Callable[[Recipe, Path, bool], Report]
#: What an artifact loses on data that the search did not see, by the option that limits it: mean and bound.
Losses = Mapping[str, tuple[float, float]]


def convert_within(
    model: str,
    output: Path,
    budget: Budget,
    search: Callable[[Budget], Found],
    convert_one: ConvertOne,
    judged: Callable[[Path], Losses],
    *,
    dry_run: bool,
    force: bool,
) -> Report:
    """Search, convert, judge, publish. What cannot be met is a report with a gate that fails, and no artifact.

    Args:
        model: what is converted, as the user gave it.
        output: where the artifact goes; its recipe goes beside it.
        budget: what is asked for.
        search: finds a recipe.
        convert_one: carries a recipe out.
        judged: what an artifact loses; nothing where the budget does not limit that.
        dry_run: search and report only.
        force: replace what exists.

    Raises:
        UsageError: an output exists.
        InputError: it cannot be written.
    """
    if budget.pareto is not None:
        require_pareto(budget.pareto)
    recipe_file = output.with_name(f"{output.name}.recipe.yaml")
    if not dry_run:
        check_target(output, None if is_function(model) else Path(model), force=force)
        if recipe_file.exists() and not force:
            raise UsageError(f"The output {recipe_file} exists.", "Use --force to replace it.")
    try:
        if dry_run:
            found = search(budget)
            report = convert_one(found.recipe, output, True)
            gates = _gates(budget, output, found.details["chosen"]["size_bytes"], {})
        else:
            found, report, gates = _published(output, budget, search, convert_one, judged, force=force)
            _write_recipe(recipe_file, found.recipe)
            found.details["recipe_file"] = str(recipe_file)
    except BudgetError as error:
        return _unmet(model, output, budget, error)
    if budget.pareto is not None:
        write_pareto(budget.pareto, found.details["frontier"])
    report.models[1].path = str(output)
    report.gates = gates
    report.warnings += found.warnings
    report.details["budget"] = found.details
    return report


def _published(
    output: Path,
    budget: Budget,
    search: Callable[[Budget], Found],
    convert_one: ConvertOne,
    judged: Callable[[Path], Losses],
    *,
    force: bool,
) -> tuple[Found, Report, list[GateRow]]:
    """The artifact under its name, once it keeps the budget; a stricter search follows where it does not."""
    stricter = budget
    with open_staging(output) as staging:
        try:
            for _ in range(3):
                staging.begin_anew()
                found = search(stricter)
                candidate = staging.out / output.name
                report = convert_one(found.recipe, candidate, False)
                # A single file may have others beside it, which hold its weights.
                size, losses = _size_of(staging.out), judged(candidate)
                gates = _gates(budget, output, size, losses)
                if all(gate.passed for gate in gates):
                    _publish(staging, candidate, output, force=force)
                    found.details["artifact_bytes"] = size
                    return found, report, gates
                stricter = _stricter(budget, stricter, found.details["chosen"]["size_bytes"], size, losses)
        except UsageError:
            staging.discard()
            raise
        staging.discard()
    broken = next(gate for gate in gates if not gate.passed)
    raise BudgetError(
        f"No artifact was found that keeps {broken.require}: the last one had {broken.value:.6g}.",
        "Allow more, or give --data that is more like what the model is judged on.",
    )


def _publish(staging: Staging, candidate: Path, output: Path, *, force: bool) -> None:
    if candidate.is_dir():
        staging.publish(built=candidate)
        return
    if not force:
        refuse_to_overwrite(staging.out, output)
    staging.publish(single_file=output.name)


def _stricter(budget: Budget, last: Budget, planned: int, size: int, losses: Losses) -> Budget:
    """A budget whose limits are lower by as much as the artifact missed what was planned, or asked for."""
    changed: dict[str, Any] = {}
    if budget.max_size is not None and last.max_size is not None and size > budget.max_size:
        changed["max_size"] = budget.max_size - max(size - planned, 0)
    for option, name in (("--max-kl", "max_kl"), ("--max-drop", "max_drop"), ("--max-latency-p50", "max_latency_p50")):
        limit = getattr(budget, name)
        if limit is not None and option in losses and losses[option][1] > limit:
            changed[name] = getattr(last, name) * 0.9 * limit / losses[option][1]
    return replace(last, **changed)


def _size_of(built: Path) -> int:
    return sum(path.stat().st_size for path in built.rglob("*") if path.is_file())


def _gates(budget: Budget, output: Path, size: int, losses: Losses) -> list[GateRow]:
    """The ceilings as gates, with what the artifact has of each; of outputs the bound, not the mean."""
    gates = []
    if budget.max_size is not None:
        gates.append(GateRow(f"max_size<={budget.max_size}", str(output), size, size <= budget.max_size))
    limits = budget.ceilings
    for option in ("--max-kl", "--max-drop", "--max-latency-p50"):
        limit = limits.get(option)
        if limit is not None and option in losses:
            name = option.strip("-").replace("-", "_")
            bound = losses[option][1]
            gates.append(GateRow(f"{name}<={limit:g}", str(output), bound, bound <= limit))
    return gates


def _unmet(model: str, output: Path, budget: Budget, error: BudgetError) -> Report:
    """The report of a budget that nothing keeps: a failed gate for each ceiling, and what was tried."""
    rows = [open_model(model).row(0, {})]
    gates = [
        GateRow(f"{option.strip('-').replace('-', '_')}<={limit:g}", str(output), None, False)
        for option, limit in budget.ceilings.items()
    ]
    details = {"budget": {"asked": budget.ceilings} | error.details | {"unmet": error.message, "hint": error.hint}}
    return Report("convert", rows, [], gates, [str(error)], details)


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """The recipe that makes the same artifact without a search."""
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    try:
        with whole_file(path) as unfinished:
            write_text(unfinished, text)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def uses_data(recipe: Recipe) -> bool:
    """Whether a conversion by a recipe takes calibration data where there is some."""
    steps = named_steps(recipe)
    return bool(parse_steps(steps).needs) if steps else True


def require_other_data(recipe: Recipe, budget: Budget, *, data: bool) -> None:
    """Raise UsageError where an artifact would be judged on the very data that its codes were fitted to."""
    if data and budget.judges_outputs and budget.eval_data is None and uses_data(recipe):
        name = "gptq" if recipe.algorithm == "auto" and not recipe.steps else "The algorithm"
        raise UsageError(
            f"{name} learns from all of --data, so that the result cannot be judged on it.",
            "Name other data with --eval-data, or choose codes without data: --algorithm mse.",
        )
