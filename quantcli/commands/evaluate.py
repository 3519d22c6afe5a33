"""`eval`: a reference and its candidates on the same samples, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantcli.data.request import DataRequest
from quantcli.errors import UsageError
from quantcli.evaluation.contamination import LeakCheck
from quantcli.evaluation.inputs import load_inputs, named_task
from quantcli.evaluation.run import layers_compare, model_row, run_models
from quantcli.evaluation.tasks import task_of
from quantcli.evaluation.tasks.base import Task
from quantcli.models.source import open_model, size_metrics
from quantcli.reporting.baseline import Baseline, judge, read_baseline
from quantcli.reporting.gates import Gate, parse_gates
from quantcli.reporting.report import Report
from quantcli.system.progress import Progress


def evaluate(
    model: str | Path,
    candidates: Sequence[str | Path] = (),
    *,
    data: str | Path,
    task: str = "auto",
    samples: int | None = None,
    seq_len: int | None = None,
    tokenizer: str | Path | None = None,
    preprocess: str | Path | None = None,
    weights: str | Path | None = None,
    by_layer: bool = False,
    require: Sequence[str] = (),
    baseline: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure a reference model and compare candidates with it, on the same samples.

    Args:
        model: the reference: a Hugging Face folder, an ONNX file or a folder with model.onnx, a ``.pt2``, or
            ``package.module:function``, a function that returns a torch module.
        candidates: models of any kind to compare with it.
        data: a ``.txt``, ``.jsonl`` or ``.parquet`` text, ``.npz`` or ``.npy`` arrays or a folder of them, an
            image or sound folder, a ``.jsonl`` that names such files, or ``package.module:function``.
        task: ``classification``, ``speech-recognition``, ``language-modeling``, ``embedding``, ``fidelity``, a user's
            ``package.module:function`` (see `evaluation.tasks.custom`), or ``auto`` to tell from model and data.
        samples: how many samples at the most; they are spread evenly over the data.
        seq_len: tokens per sequence.
        tokenizer: a folder with the tokenizer, where no model has one.
        preprocess: a file that says how images become inputs.
        weights: a state dict for the modules of functions.
        by_layer: also compare every layer's output; of ONNX models every quantized tensor.
        require: gates such as ``"kl_nats <= 0.05"``.
        baseline: an earlier report of this command, in JSON, that drops and ratios of gates are measured against in
            place of the reference.
        progress: called with samples done and samples in all.

    Returns:
        The report; its ``passed`` says whether every gate holds.

    Raises:
        UsageError: an unknown task or metric, or one that the baseline does not have.
        InputError: a model, the data or the baseline is missing or unsuitable, or a package is not installed.
    """
    earlier = None if baseline is None else read_baseline(baseline, "eval", (model, *candidates))
    if task != "auto":
        task_of(task)
    state = None if weights is None else Path(weights)
    sources = [open_model(path, state) for path in (model, *candidates)]
    if by_layer and not any(layers_compare(sources[0], other) for other in sources[1:]):
        raise UsageError("--by-layer compares two Hugging Face folders, or two ONNX models.", "Name such a candidate.")
    named = named_task(task, sources[0], str(data))
    if named:
        _gates(require, named, candidates, earlier)
    request = DataRequest.of(data, samples=samples, seq_len=seq_len, tokenizer=tokenizer, preprocess=preprocess)
    inputs = load_inputs(sources, request, named)
    _gates(require, inputs.task, candidates, earlier)
    scores = [inputs.task.scorer(source, sources[0]) for source in sources]
    leaks = LeakCheck([(source.path, source.manifest.calibration_fingerprint) for source in sources])
    layers = run_models(sources, inputs, scores, leaks, by_layer, progress)
    rows = [model_row(source, index, score) for index, (source, score) in enumerate(zip(sources, scores, strict=True))]
    size_metrics(rows)
    measured = list(dict.fromkeys(name for row in rows for name in row.metrics))
    gates = _gates(require, inputs.task, candidates, earlier, measured)
    warnings = [warning for source in sources for warning in source.warnings] + inputs.samples.warnings
    warnings += leaks.warnings()
    if not candidates and inputs.task.METRICS == ():
        warnings.append(f"{inputs.task.NAME} compares candidates with a reference, and no candidate was named.")
    details = {"task": inputs.task.NAME, "samples": len(inputs), "data": str(data)}
    report = Report("eval", rows, layers, [], warnings, details | {"data_sha256": inputs.samples.sha256})
    judge(report, gates, earlier)
    return report


def _gates(
    require: Sequence[str],
    task: Task,
    candidates: Sequence[str | Path],
    earlier: Baseline | None,
    measured: list[str] | None = None,
) -> list[Gate]:
    """Gates on the task's metrics, or on those that a user's function gave where only it knows them."""
    known = _known_metrics(task, compared=bool(candidates)) or measured
    gates = parse_gates(require, known, alone=not candidates and earlier is None)
    if earlier:
        earlier.require(gates)
    return gates


def _known_metrics(task: Task, *, compared: bool) -> list[str] | None:
    """Metrics that gates may name; None where only the user's function knows."""
    if task.METRICS is None:
        return None
    return [*task.METRICS, *(task.CANDIDATE_METRICS if compared else ()), "size_ratio", "size_bytes"]
