"""A diffusers pipeline converted model by model, in its own layout.

The pipeline's index names its components. What denoises and what reads text is converted; autoencoders stay as they
are, since every error of theirs is seen in the image, and so does all that has no weights. Globs of a recipe have a
component's name in front: ``unet.conv_in``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.hugging_face import PIPELINE_INDEX, load_json
from quantcli.conversion.staging import open_staging
from quantcli.errors import InputError, UsageError
from quantcli.planning.recipe import Recipe
from quantcli.planning.rules import SKIPPED, means
from quantcli.reporting.report import ModelRow, Report
from quantcli.system import ranks
from quantcli.system.files import check_target

#: Converts one component into a folder by its own recipe; the flag says whether it is only planned.
ConvertOne = Callable[[Path, Path, Recipe, bool], Report]


def is_pipeline(path: Path) -> bool:
    """Whether a MODEL is a diffusers pipeline."""
    return (path / PIPELINE_INDEX).is_file()


def components(folder: Path) -> tuple[list[str], dict[str, str]]:
    """What of a pipeline is converted, in the order of its index, and why each other folder of it is copied.

    Raises:
        InputError: nothing is converted.
    """
    found, copied = [], {}
    for name, entry in load_json(folder / PIPELINE_INDEX).items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or not (folder / name).is_dir():
            continue
        library, kind = entry
        if not (folder / name / "config.json").is_file() or not _has_weights(folder / name):
            copied[name] = "it has no weights"
        elif str(kind).startswith("Autoencoder"):
            copied[name] = "an autoencoder, whose every error is seen in the image"
        elif library == "diffusers" or (library == "transformers" and name.startswith("text_encoder")):
            found.append(name)
        else:
            copied[name] = "it neither denoises nor reads text"
    if not found:
        raise InputError(f"{folder / PIPELINE_INDEX} lists no model with weights that is converted.")
    return found, copied


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def recipes_for(recipe: Recipe, layers: Mapping[str, Sequence[str]], others: Sequence[str]) -> dict[str, Recipe | None]:
    """What a recipe of a whole pipeline says of each component; None where it skips all of it.

    Args:
        recipe: with globs that have a component's name in front, or that mean layers of any component.
        layers: names of the tensors of each component that is converted.
        others: components that are not.

    Raises:
        UsageError: a glob means no layer of any component.
    """
    for glob in (*recipe.skip, *(glob for rule in recipe.rules for glob in rule.globs)):
        copied = any(_inside(glob, name) is not None for name in others)
        if not copied and not any(_own_globs([glob], name, names) for name, names in layers.items()):
            raise UsageError(
                f"{glob!r} matches no layer.",
                f"The pipeline's components are {', '.join((*layers, *others))}; one stands in front of a layer's "
                f"name, as in {next(iter(layers))}.*",
            )
    found: dict[str, Recipe | None] = {}
    for name, names in layers.items():
        skip = _own_globs(recipe.skip, name, names)
        means_some = ((rule, _own_globs(rule.globs, name, names)) for rule in recipe.rules)
        rules = [rule.model_copy(update={"match": globs}) for rule, globs in means_some if globs]
        found[name] = None if "*" in skip else recipe.model_copy(update={"skip": skip, "rules": rules})
    return found


def _inside(glob: str, component: str) -> str | None:
    """What a glob with a component's name in front means within it; None where that is another component's."""
    head, _, rest = glob.partition(".")
    return rest if rest and fnmatchcase(component, head) else None


def _own_globs(globs: Sequence[str], component: str, names: Sequence[str]) -> list[str]:
    """Those globs that mean layers of a component, as they are written within it."""
    read = (each for glob in globs for each in dict.fromkeys((_inside(glob, component), glob)) if each)
    return [each for each in read if any(means(each, name) for name in names)]


def convert_pipeline(
    folder: Path, output: Path, recipe: Recipe, convert_one: ConvertOne, *, dry_run: bool, force: bool
) -> Report:
    """Convert every model of a pipeline that is to be, and copy the rest.

    Raises:
        UsageError, InputError: what `convert` raises for one of the models, before any is converted where it can.
    """
    ranks.go_on_alone("The conversion of a pipeline")
    names, copied = components(folder)
    if output.suffix == ".safetensors":
        raise UsageError(f"{folder} is a pipeline, so the output is a folder; {output} names a file.")
    layers = {name: [info.name for info in open_checkpoint(folder / name).infos()] for name in names}
    recipes = recipes_for(recipe, layers, list(copied))
    copied |= {name: SKIPPED for name, own in recipes.items() if own is None}
    own = {name: each for name, each in recipes.items() if each is not None}
    if not own:
        raise UsageError(f"Every model of {folder} is skipped, so nothing would be converted.")
    planned = {name: convert_one(folder / name, output / name, each, True) for name, each in own.items()}
    if dry_run:
        return _joined(folder, output, planned, copied)
    check_target(output, folder, force=force)
    with open_staging(output) as staging:
        staging.begin_anew()
        for path in sorted(folder.iterdir()):
            if path.name in own or path.name.startswith("."):
                continue
            if path.is_dir():
                shutil.copytree(path, staging.out / path.name)
            else:
                shutil.copyfile(path, staging.out / path.name)
        reports = {name: convert_one(folder / name, staging.out / name, each, False) for name, each in own.items()}
        staging.publish()
    return _joined(folder, output, reports, copied)


def _joined(folder: Path, output: Path, reports: dict[str, Report], copied: Mapping[str, str]) -> Report:
    """One report of all models: layers and warnings with the name of theirs."""
    before = sum(report.models[0].size_bytes or 0 for report in reports.values())
    after = sum(report.models[1].size_bytes or 0 for report in reports.values())
    worst = [report.models[1].metrics.get("sqnr_db_min") for report in reports.values()]
    metrics = {"size_ratio": after / before, "sqnr_db_min": min((db for db in worst if db is not None), default=None)}
    made = next(iter(reports.values())).models[1]
    kinds = " and ".join(dict.fromkeys(str(report.models[1].format) for report in reports.values()))
    rows = [
        ModelRow(str(folder), "reference", "diffusers", size_bytes=before),
        ModelRow(str(output), "candidate", kinds, made.scheme, None, after, metrics, dict(made.details)),
    ]
    layers = []
    for name, report in reports.items():
        for layer in report.layers:
            layer.name = f"{name}.{layer.name}"
            layers.append(layer)
    warnings = [f"{name}: {warning}" for name, report in reports.items() for warning in report.warnings]
    details: dict[str, Any] = {"components": {name: report.details for name, report in reports.items()}}
    details |= _totals(details["components"]) | {"copied": dict(copied), "converted": _sizes(reports)}
    return Report("convert", rows, layers, [], warnings, details)


def _sizes(reports: Mapping[str, Report]) -> dict[str, dict[str, Any]]:
    """Of each converted model its scheme, and its bytes before and after."""
    models = {name: report.models for name, report in reports.items()}
    return {
        name: {"scheme": after.scheme, "bytes_before": before.size_bytes, "bytes_after": after.size_bytes}
        for name, (before, after) in models.items()
    }


def _totals(components: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Details of the whole pipeline, in the keys of one model's."""
    each = list(components.values())
    runtimes = {name: one.get("runtime") or one["verified"]["runtime"] for name, one in components.items()}
    shares = {runtime["run"] for runtime in runtimes.values()}
    runtime = {
        "checked": all(runtime["checked"] for runtime in runtimes.values()),
        "run": shares.pop() if len(shares) == 1 else "part",
        "foreseen": all(runtime["foreseen"] for runtime in runtimes.values()),
        "summary": "; ".join(f"{name}: {runtime['summary']}" for name, runtime in runtimes.items()),
    }
    if "dry_run" in each[0]:
        return {"dry_run": True, "runtime": runtime}
    tensors = sum(one["verified"]["tensors"] for one in each)
    return {
        "verified": each[0]["verified"] | {"tensors": tensors, "runtime": runtime},
        "threads": each[0]["threads"],
        "seconds": round(sum(one["seconds"] for one in each), 3),
        "peak_rss_bytes": max(one["peak_rss_bytes"] for one in each),
    }
