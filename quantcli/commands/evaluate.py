"""`eval`: a reference and its candidates on the same samples, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantcli.data.for_models import is_text
from quantcli.errors import UsageError
from quantcli.evaluation.contamination import LeakCheck
from quantcli.evaluation.inputs import load_inputs, text_task
from quantcli.evaluation.run import layers_compare, model_row, run_models, task_for
from quantcli.evaluation.tasks.base import CANDIDATE_METRICS, REFERENCE_METRICS, TASKS
from quantcli.models.source import open_subject, size_metrics
from quantcli.reporting.gates import apply_gates, parse_gates
from quantcli.reporting.report import Report
from quantcli.system.progress import Progress
from quantcli.system.text import suggestion
from quantcli.system.user_functions import is_function


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
    progress: Progress | None = None,
) -> Report:
    """Measure a reference model and compare candidates with it, on the same samples.

    Args:
        model: the reference: a Hugging Face folder, an ONNX file or a folder with model.onnx, a ``.pt2``, or
            ``package.module:function``, a function that returns a torch module.
        candidates: models of any kind to compare with it.
        data: a ``.txt``, ``.jsonl`` or ``.parquet`` text, ``.npz`` or ``.npy`` arrays or a folder of them, an
            image folder, or ``package.module:function``.
        task: ``classification``, ``language-modeling``, ``embedding``, ``fidelity``, a user's
            ``package.module:function`` (see `evaluation.tasks.custom`), or ``auto`` to tell from model and data.
        samples: how many samples at the most; they are spread evenly over the data.
        seq_len: tokens per sequence.
        tokenizer: a folder with the tokenizer, where no model has one.
        preprocess: a file that says how images become inputs.
        weights: a state dict for the modules of functions.
        by_layer: also compare every layer's output; of ONNX models every quantized tensor.
        require: gates such as ``"kl_nats <= 0.05"``.
        progress: called with samples done and samples in all.

    Returns:
        The report; its ``passed`` says whether every gate holds.

    Raises:
        UsageError: an unknown task or metric.
        InputError: a model or the data is missing or unsuitable, or a package is not installed.
    """
    if task not in TASKS and not is_function(task):
        raise UsageError(f"Unknown task {task!r}.", suggestion(task, TASKS))
    state = None if weights is None else Path(weights)
    subjects = [open_subject(path, state) for path in (model, *candidates)]
    if by_layer and not any(layers_compare(subjects[0], other) for other in subjects[1:]):
        raise UsageError("--by-layer compares two Hugging Face folders, or two ONNX models.", "Name such a candidate.")
    if task == "auto" and is_text(str(data)):
        task = text_task(subjects[0])
    if task != "auto":
        parse_gates(require, _known_metrics(task, compared=bool(candidates)))
    inputs = load_inputs(
        subjects, str(data), task, samples=samples, seq_len=seq_len, tokenizer=tokenizer, preprocess=preprocess
    )
    parse_gates(require, _known_metrics(inputs.task, compared=bool(candidates)))
    scores = [task_for(inputs.task, subject, subjects[0]) for subject in subjects]
    leaks = LeakCheck([(subject.path, subject.manifest.calibration_fingerprint) for subject in subjects])
    layers = run_models(subjects, inputs, scores, leaks, by_layer, progress)
    rows = [
        model_row(subject, index, score) for index, (subject, score) in enumerate(zip(subjects, scores, strict=True))
    ]
    size_metrics(rows)
    known = _known_metrics(inputs.task, compared=bool(candidates))
    gates = parse_gates(require, known or list(dict.fromkeys(name for row in rows for name in row.metrics)))
    warnings = [warning for subject in subjects for warning in subject.warnings] + inputs.samples.warnings
    warnings += leaks.warnings()
    if not candidates and REFERENCE_METRICS.get(inputs.task) == ():
        warnings.append(f"{inputs.task} compares candidates with a reference, and no candidate was named.")
    details = {"task": inputs.task, "samples": len(inputs), "data": str(data)}
    return Report("eval", rows, layers, apply_gates(gates, rows), warnings, details)


def _known_metrics(task: str, *, compared: bool) -> list[str] | None:
    """Metrics that gates may name; None where only the user's function knows."""
    if task not in REFERENCE_METRICS:
        return None
    return [*REFERENCE_METRICS[task], *(CANDIDATE_METRICS[task] if compared else ()), "size_ratio", "size_bytes"]
