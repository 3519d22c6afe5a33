"""`calibrate`: run a model on data of one's own, and keep what its activations were like in a STATS file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.calibration.collect import DEFAULT_SAMPLES, collect
from quantcli.calibration.histograms import activation_histograms
from quantcli.calibration.ranges import DEFAULT_METHOD, METHODS
from quantcli.calibration.statistics import CalibrationStats
from quantcli.conversion.onnx.equivalence import Data, simplified, upgraded
from quantcli.conversion.staging import locked
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.errors import InputError, UsageError
from quantcli.models.source import ModelSource, model_sha256, open_model, source_sha256
from quantcli.onnx.graph.model import OnnxModel, open_onnx
from quantcli.onnx.graph.opset import QDQ_OPSET
from quantcli.onnx.plan.plan import graph_quantization, observed_tensors
from quantcli.reporting.report import ModelRow, Report
from quantcli.system import ranks
from quantcli.system.files import check_name, check_target, temporary_folder
from quantcli.system.progress import Progress
from quantcli.system.text import suggestion

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DEFAULT_SAMPLES", "calibrate", "collect", "model_sha256"]


def calibrate(
    model: str | Path,
    *,
    data: str | Path,
    output: str | Path,
    method: str = DEFAULT_METHOD,
    samples: int | None = None,
    batch_size: int = 1,
    seq_len: int | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    preprocess: str | Path | None = None,
    weights: str | Path | None = None,
    force: bool = False,
    histograms: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Observe a model's activations on data, and write a STATS file for `convert`.

    Args:
        model: an ``.onnx`` file, or what can be exported to one: a Hugging Face folder, a ``.pt2``, or
            ``package.module:function``.
        data: see `quantcli.data.request.DataRequest`.
        output: the STATS file, ``.safetensors``.
        method: how ranges are chosen: ``minmax``, ``percentile``, ``entropy`` or ``mse``.
        samples: how many at the most; by default 128.
        batch_size: samples per run. The values seen are the same for all sizes, but for the last bits where the
            runtime has other kernels for other sizes.
        seq_len: tokens of a text sample.
        seed: what images are chosen by.
        tokenizer: a folder with the tokenizer, where the model has none.
        preprocess: a file with the preprocessing of images.
        weights: a state dict for the module of a function.
        force: replace an existing output.
        histograms: of how many of the worst tensors the report has histograms, for a page.
        progress: called with sample runs done and in all.

    Returns:
        The report: every tensor's range and expected signal-to-noise ratio, and what was odd.

    Raises:
        UsageError: an unknown method, or the output exists.
        InputError: the model or the data is missing or unsuitable, or the output cannot be written, or another process
            is writing it.
    """
    if method not in METHODS:
        raise UsageError(f"Unknown method {method!r}.", suggestion(method, METHODS))
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: at least one is needed.")
    given, target = str(model), Path(output)
    source = open_model(given, None if weights is None else Path(weights))
    check_target(target, Path(given), force=force)
    check_name(target, ".safetensors", folder=False)
    if target.is_dir():
        raise UsageError(f"The output {target} is a folder.", "Name a file, such as stats.safetensors.")
    with locked(target), temporary_folder() as scratch:
        request = DataRequest.of(
            data, samples=samples, seq_len=seq_len, seed=seed, tokenizer=tokenizer, preprocess=preprocess
        )
        onnx, warnings = _as_onnx(source, Path(scratch), request)
        opened = cache(partial(load_samples, request.at_most(DEFAULT_SAMPLES), onnx.inputs, folder=source.folder))
        graph = _as_quantized(simplified(onnx, opened), opened)
        names, quantized = observed_tensors(graph), graph_quantization(graph)
        if quantized and not names:
            raise InputError(f"{given} is quantized already ({quantized}).", "Calibrate the model it was made from.")
        if not names:
            raise InputError(f"{given} has nothing to calibrate: no operator that static quantization covers.")
        chosen = opened()
        stats = collect(
            graph,
            chosen,
            names,
            model_sha256=source_sha256(source),
            method=method,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        stats.find_ranges()
        if source.onnx is not None:
            source.onnx.require_unchanged()
        chosen.require_unchanged()
        ranks.finish()
        stats.save(target)
    report = _report(source, chosen, stats, target, [*warnings, *chosen.warnings])
    if histograms:
        report.details["histograms"] = activation_histograms(stats, histograms)
    return report


def _as_onnx(source: ModelSource, scratch: Path, request: DataRequest) -> tuple[OnnxModel, Sequence[str]]:
    """The model as a graph, exported into a folder where it is none, and warnings."""
    if source.onnx is not None:
        return source.onnx, source.warnings
    from quantcli.export.export import export_to_onnx

    exported = export_to_onnx(source.path, scratch, data=request, weights=source.weights)
    return open_onnx(exported.path), [*source.warnings, *exported.warnings]


def _as_quantized(graph: ir.Model, data: Data) -> ir.Model:
    """The graph in the operator set that it will be quantized in, where values have other names in its own."""
    try:
        return upgraded(graph, QDQ_OPSET, data)
    except InputError:
        # What needs no newer set is quantized all the same.
        return graph


def _report(
    source: ModelSource, samples: Samples, stats: CalibrationStats, target: Path, warnings: Sequence[str]
) -> Report:
    row = ModelRow(
        source.path, "reference", source.format, source.scheme, stats.model_sha256, source.size_bytes
    )  # fmt: skip
    tensors = []
    for name, tensor in stats.tensors.items():
        low, high = stats.range(name)
        entry = {"name": name, "min": tensor.minimum, "max": tensor.maximum, "low": low, "high": high}
        tensors.append(entry | {"sqnr_db": stats.sqnr_db(name, low, high), "elements": tensor.elements})
    details = {
        "output": str(target),
        "data": samples.source,
        "data_sha256": stats.data_sha256,
        "samples": stats.samples,
        "seed": stats.seed,
        "method": stats.method,
        "tensors": tensors,
    }
    return Report("calibrate", [row], warnings=[*warnings, *stats.warnings()], details=details)
