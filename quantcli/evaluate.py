"""`eval`: a reference and its candidates on the same samples, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from quantcli import models
from quantcli.errors import UsageError
from quantcli.evaluation_data import Inputs, is_text, load_inputs, text_task
from quantcli.functions import is_function
from quantcli.gates import apply_gates, parse_gates
from quantcli.graph_layerwise import compare_graphs
from quantcli.layerwise import LayerComparison
from quantcli.leaks import LeakCheck
from quantcli.plugins import suggestion
from quantcli.progress import Progress
from quantcli.report import LayerRow, ModelRow, Report
from quantcli.runners import Arrays, Runner, TorchRunner, fit, open_runner
from quantcli.subject import Subject, open_subject, size_metrics
from quantcli.tasks import (
    CANDIDATE_METRICS,
    REFERENCE_METRICS,
    TASKS,
    Classification,
    Custom,
    Embedding,
    FidelityTask,
    LanguageModeling,
    Task,
)

#: Samples of the per-layer comparison, and their tokens at the most.
LAYERWISE_SAMPLES, LAYERWISE_LENGTH = 8, 128


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
            ``package.module:function`` (see `quantcli.tasks.Custom`), or ``auto`` to tell from model and data.
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
    if by_layer and not any(_layers_compare(subjects[0], other) for other in subjects[1:]):
        raise UsageError("--by-layer compares two Hugging Face folders, or two ONNX models.", "Name such a candidate.")
    if task == "auto" and is_text(str(data)):
        task = text_task(subjects[0])
    if task != "auto":
        parse_gates(require, _known_metrics(task, compared=bool(candidates)))
    inputs = load_inputs(
        subjects, str(data), task, samples=samples, seq_len=seq_len, tokenizer=tokenizer, preprocess=preprocess
    )
    parse_gates(require, _known_metrics(inputs.task, compared=bool(candidates)))
    scores = [_score(inputs.task, subject, subjects[0]) for subject in subjects]
    leaks = LeakCheck([(subject.path, subject.manifest) for subject in subjects])
    layers = _run(subjects, inputs, scores, leaks, by_layer, progress)
    rows = [_row(subject, index, score) for index, (subject, score) in enumerate(zip(subjects, scores, strict=True))]
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


def _score(task: str, subject: Subject, reference: Subject) -> Task:
    if task == "classification":
        return Classification(subject.path)
    if task == "language-modeling":
        return LanguageModeling(subject.path)
    if task == "embedding":
        pooling = models.pooling_of(reference.folder) if reference.folder else "mean"
        return Embedding(subject.path, pooling)
    return FidelityTask(subject.path) if task == "fidelity" else Custom(subject.path, task)


def _row(subject: Subject, index: int, score: Task) -> ModelRow:
    row = subject.row(index, score.metrics())
    row.details = score.details()
    return row


def _open(subject: Subject, task: str) -> Runner:
    causal = {"language-modeling": True, "embedding": False, "classification": False}.get(task)
    # A user's metric and classification see the model as its config.json names it, heads included.
    headed = task not in ("language-modeling", "embedding", "fidelity")
    runner = open_runner(subject.path, causal=causal, weights=subject.weights, headed=headed)
    subject.see(runner)
    return runner


def _run(
    subjects: Sequence[Subject],
    inputs: Inputs,
    scores: Sequence[Task],
    leaks: LeakCheck,
    by_layer: bool,
    progress: Progress | None,
) -> list[LayerRow]:
    """Feed all samples to all models, and return the rows of ``--by-layer``."""
    groups = list(_groups(subjects))
    layers: dict[int, list[LayerRow]] = {}
    done = 0
    for number, group in enumerate(groups):
        loaded = {index: _open(subjects[index], inputs.task) for index in (0, *group)}
        for feeds, labels in inputs.batches():
            outputs = {index: runner.run(feeds) for index, runner in loaded.items()}
            for position, label in enumerate(labels):
                single = {index: _single(found, position, len(labels)) for index, found in outputs.items()}
                sample = _single(feeds, position, len(labels))
                if number == 0:
                    leaks.add(sample)
                for index in loaded if number == 0 else group:
                    scores[index].add(sample, label, single[index], single[0] if index else None)
            done += len(labels)
            if progress:
                progress(done, len(inputs) * len(groups))
        for index in group if by_layer else ():
            if _layers_compare(subjects[0], subjects[index]):
                layers[index] = _compare_layers(subjects[0], subjects[index], loaded[0], loaded[index], inputs)
    return [row for index in sorted(layers) for row in layers[index]]


def _single(arrays: Arrays, position: int, count: int) -> Arrays:
    """One sample of a batch, where an array has as many entries as the batch."""
    if count == 1:
        return arrays
    return {
        name: value[position : position + 1] if value.shape[:1] == (count,) else value for name, value in arrays.items()
    }


def _groups(subjects: Sequence[Subject]) -> Iterator[list[int]]:
    """Candidates that are run together with the reference: all, where memory allows, else one by one."""
    import psutil

    others = list(range(1, len(subjects)))
    most = max(subject.float_bytes for subject in subjects)
    if len(others) <= 1 or most * len(subjects) < psutil.virtual_memory().available // 2:
        yield others
    else:
        yield from ([index] for index in others)


def _layers_compare(reference: Subject, candidate: Subject) -> bool:
    both = {reference.kind, candidate.kind}
    return both in ({"checkpoint"}, {"onnx"})


def _compare_layers(
    reference: Subject, candidate: Subject, ours: Runner, theirs: Runner, inputs: Inputs
) -> list[LayerRow]:
    few = [feeds for feeds, _ in islice(inputs.batches(), LAYERWISE_SAMPLES)]
    if reference.onnx and candidate.onnx:
        return compare_graphs(reference.onnx, candidate.onnx, few, candidate.path)
    assert isinstance(ours, TorchRunner) and isinstance(theirs, TorchRunner)
    assert reference.checkpoint and candidate.checkpoint
    comparison = LayerComparison()
    for feeds in few:
        fitting = fit(feeds, ours.inputs, ours.name)
        # Every layer's output of a sample is kept, so token sequences are cut short.
        short = {name: value[:, :LAYERWISE_LENGTH] if value.ndim == 2 else value for name, value in fitting.items()}
        with torch.inference_mode():
            comparison.add(ours.module, theirs.module, {key: torch.from_numpy(value) for key, value in short.items()})
    return comparison.rows(reference.checkpoint, candidate.checkpoint)
