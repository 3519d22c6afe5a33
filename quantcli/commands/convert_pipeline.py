"""A diffusers pipeline converted model by model, in its own layout.

The pipeline's index names its components. What denoises and what reads text is converted; autoencoders stay as they
are, since every error of theirs is seen in the image, and so does all that has no weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantcli.checkpoint.hugging_face import PIPELINE_INDEX, load_json
from quantcli.conversion.staging import open_staging
from quantcli.errors import InputError, UsageError
from quantcli.reporting.report import ModelRow, Report
from quantcli.system.files import check_target

#: Converts one component into a folder; the flag says whether it is only planned.
ConvertOne = Callable[[Path, Path, bool], Report]


def is_pipeline(path: Path) -> bool:
    """Whether a MODEL is a diffusers pipeline."""
    return (path / PIPELINE_INDEX).is_file()


def components(folder: Path) -> list[str]:
    """Folders of the models that are converted, in the order of the index. Raises InputError where there is none."""
    found = []
    for name, entry in load_json(folder / PIPELINE_INDEX).items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            continue
        library, kind = entry
        converted = library == "diffusers" and not str(kind).startswith("Autoencoder")
        converted |= library == "transformers" and name.startswith("text_encoder")
        if converted and (folder / name / "config.json").is_file() and _has_weights(folder / name):
            found.append(name)
    if not found:
        raise InputError(f"{folder / PIPELINE_INDEX} lists no model with weights that is converted.")
    return found


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def convert_pipeline(folder: Path, output: Path, convert_one: ConvertOne, *, dry_run: bool, force: bool) -> Report:
    """Convert every model of a pipeline that is to be, and copy the rest.

    Raises:
        UsageError, InputError: what `convert` raises for one of the models, before any is converted where it can.
    """
    names = components(folder)
    if output.suffix == ".safetensors":
        raise UsageError(f"{folder} is a pipeline, so the output is a folder; {output} names a file.")
    planned = {name: convert_one(folder / name, output / name, True) for name in names}
    if dry_run:
        return _joined(folder, output, planned)
    check_target(output, folder, force=force)
    with open_staging(output) as staging:
        staging.begin_anew()
        for path in sorted(folder.iterdir()):
            if path.name in names or path.name.startswith("."):
                continue
            if path.is_dir():
                shutil.copytree(path, staging.out / path.name)
            else:
                shutil.copyfile(path, staging.out / path.name)
        reports = {name: convert_one(folder / name, staging.out / name, False) for name in names}
        staging.publish()
    return _joined(folder, output, reports)


def _joined(folder: Path, output: Path, reports: dict[str, Report]) -> Report:
    """One report of all models: layers and warnings with the name of theirs."""
    before = sum(report.models[0].size_bytes or 0 for report in reports.values())
    after = sum(report.models[1].size_bytes or 0 for report in reports.values())
    worst = [report.models[1].metrics.get("sqnr_db_min") for report in reports.values()]
    metrics = {"size_ratio": after / before, "sqnr_db_min": min((db for db in worst if db is not None), default=None)}
    made = next(iter(reports.values())).models[1]
    kinds = " and ".join(dict.fromkeys(str(report.models[1].format) for report in reports.values()))
    rows = [
        ModelRow(str(folder), "reference", size_bytes=before),
        ModelRow(str(output), "candidate", kinds, made.scheme, None, after, metrics, dict(made.details)),
    ]
    layers = []
    for name, report in reports.items():
        for layer in report.layers:
            layer.name = f"{name}.{layer.name}"
            layers.append(layer)
    warnings = [f"{name}: {warning}" for name, report in reports.items() for warning in report.warnings]
    details = {"components": {name: report.details for name, report in reports.items()}}
    return Report("convert", rows, layers, [], warnings, details | _totals(details["components"]))


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
