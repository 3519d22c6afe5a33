"""`bench`: latency, throughput, load time and memory of a reference and its candidates, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantcli.benchmarking.feeds import load_feeds
from quantcli.benchmarking.generation import measure_generation, wants_generation
from quantcli.benchmarking.measure import (
    CANDIDATE_METRICS,
    METRICS,
    batch_metrics,
    load_and_peak,
    model_row,
    runtimes,
    timed_call,
)
from quantcli.benchmarking.timing import time_interleaved
from quantcli.data.request import DataRequest
from quantcli.errors import UsageError
from quantcli.models.source import open_model, size_metrics
from quantcli.reporting.baseline import judge, read_baseline, require_batch_size
from quantcli.reporting.gates import parse_gates
from quantcli.reporting.report import Report
from quantcli.system.hardware import cpu_features, cpu_name
from quantcli.system.parallel import usable_cores
from quantcli.system.progress import Progress


def bench(
    model: str | Path,
    candidates: Sequence[str | Path] = (),
    *,
    data: str | Path | None = None,
    batch_size: int | Sequence[int] | None = None,
    seq_len: int | None = None,
    tokenizer: str | Path | None = None,
    preprocess: str | Path | None = None,
    weights: str | Path | None = None,
    threads: int | None = None,
    runs: int | None = None,
    seed: int = 0,
    require: Sequence[str] = (),
    baseline: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Time a reference model and candidates side by side on the CPU.

    All models are loaded at once and take turns in rounds, in an order shuffled by ``seed``, so that what else
    the machine does falls on all of them. The speed-up is the median over rounds of the ratio of times, with
    an interval of 95%; its verdict is "no difference" where the interval holds 1. Load time and peak memory are
    measured in a process of its own for every model. Every model's ``metrics`` are those of the first batch
    size; ``batches`` in its row has them all. Where one is a decoder with a key-value cache, all that have one also
    read a prompt and generate.

    Args:
        model: the reference: a Hugging Face folder, an ONNX file or a folder with model.onnx, a ``.pt2``, or
            ``package.module:function``.
        candidates: models of any kind to compare with it.
        data: what to run on, as in `quantcli.evaluate`; without, made-up values, which the report says.
        batch_size: samples per run, one number or several; by default what the model takes, or 1.
        seq_len: tokens per sequence; by default 128.
        tokenizer: a folder with the tokenizer, where no model has one.
        preprocess: a file that says how images become inputs.
        weights: a state dict for the modules of functions.
        threads: threads within an operator; by default the usable cores.
        runs: rounds; by default about three seconds per model and batch size, and no less than 20.
        seed: what order and made-up values come from.
        require: gates such as ``"speedup >= 1.5"``.
        baseline: an earlier report of this command, in JSON, that drops and ratios of gates are measured against in
            place of the reference.
        progress: called with rounds done and rounds in all, for one batch size after the other.

    Returns:
        The report; its ``passed`` says whether every gate holds.

    Raises:
        UsageError: an unknown metric, one that the baseline does not have, or numbers that cannot be meant.
        InputError: a model, the data or the baseline is missing or unsuitable, or a package is not installed.
    """
    compared = bool(candidates or baseline)
    gates = parse_gates(require, [*METRICS, *(CANDIDATE_METRICS if compared else ())], alone=not compared)
    earlier = None if baseline is None else read_baseline(baseline, "bench", (model, *candidates))
    if earlier:
        earlier.require(gates)
    for name, value in (("--runs", runs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: at least one is needed.")
    threads = threads or usable_cores()
    state = None if weights is None else Path(weights)
    sources = [open_model(path, state) for path in (model, *candidates)]
    request = (
        None if data is None else DataRequest.of(data, seq_len=seq_len, tokenizer=tokenizer, preprocess=preprocess)
    )
    feeds = load_feeds(
        sources,
        request,
        [batch_size] if isinstance(batch_size, int) else batch_size,
        seq_len=seq_len,
        seed=seed,
    )
    if earlier:
        require_batch_size(earlier, next(iter(feeds.by_size)))
    first = next(iter(feeds.by_size.values()))[0]
    probes = [load_and_peak(source, first, threads, generates=wants_generation(sources)) for source in sources]
    runners = [source.runner(threads=threads, shared=True) for source in sources]
    batches: list[list[dict[str, Any]]] = [[] for _ in sources]
    for size, pool in feeds.by_size.items():
        timings = time_interleaved(
            [timed_call(runner, pool, source.path) for runner, source in zip(runners, sources, strict=True)],
            rounds=runs,
            seed=seed,
            progress=progress,
        )
        for index, timing in enumerate(timings):
            batches[index].append(batch_metrics(size, timing, timings[0] if index else None, seed))
    rows = [
        model_row(source, index, runner, batches[index], probed)
        for index, (source, runner, probed) in enumerate(zip(sources, runners, probes, strict=True))
    ]
    generated = measure_generation(sources, runners, next(iter(feeds.by_size.values())), runs=runs, seed=seed)
    for row, figures in zip(rows, generated, strict=True):
        row.metrics |= figures
    size_metrics(rows)
    details = {
        "data": feeds.source,
        "data_sha256": feeds.sha256,
        "inputs": feeds.shapes,
        "device": "cpu",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "threads": threads,
        "runtimes": runtimes(sources),
    }
    warnings = [warning for source in sources for warning in source.warnings] + feeds.warnings
    report = Report("bench", rows, [], [], warnings, details)
    judge(report, gates, earlier)
    return report
