"""`bench`: latency, throughput, load time and memory of a reference and its candidates, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantcli.bench_data import load_feeds
from quantcli.errors import UsageError
from quantcli.gates import apply_gates, parse_gates
from quantcli.graph.model import onnx_file
from quantcli.machine import cpu_features, cpu_name
from quantcli.parallel import usable_cores
from quantcli.probe import probe
from quantcli.progress import Progress
from quantcli.proof import prove
from quantcli.report import ModelRow, Report
from quantcli.runners import Arrays, Runner, fit, open_runner
from quantcli.subject import Subject, open_subject, size_metrics
from quantcli.timing import Timing, speedup, time_interleaved

METRICS = (
    "latency_ms_p50", "latency_ms_p90", "latency_ms_p99", "throughput_per_s", "load_ms", "peak_rss_bytes",
    "size_bytes", "size_ratio",
)  # fmt: skip
CANDIDATE_METRICS = ("speedup", "speedup_low", "speedup_high")


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
    progress: Progress | None = None,
) -> Report:
    """Time a reference model and candidates side by side on the CPU.

    All models are loaded at once and take turns in rounds, in an order shuffled by ``seed``, so that what else
    the machine does falls on all of them. The speed-up is the median over rounds of the ratio of times, with
    an interval of 95%; its verdict is "no difference" where the interval holds 1. Load time and peak memory are
    measured in a process of its own for every model. Every model's ``metrics`` are those of the first batch
    size; ``batches`` in its row has them all.

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
        progress: called with rounds done and rounds in all, for one batch size after the other.

    Returns:
        The report; its ``passed`` says whether every gate holds.

    Raises:
        UsageError: an unknown metric, or numbers that cannot be meant.
        InputError: a model or the data is missing or unsuitable, or a package is not installed.
    """
    gates = parse_gates(require, [*METRICS, *(CANDIDATE_METRICS if candidates else ())])
    for name, value in (("--runs", runs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: at least one is needed.")
    threads = threads or usable_cores()
    state = None if weights is None else Path(weights)
    subjects = [open_subject(path, state) for path in (model, *candidates)]
    feeds = load_feeds(
        subjects,
        None if data is None else str(data),
        [batch_size] if isinstance(batch_size, int) else batch_size,
        seq_len=seq_len,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        preprocess=None if preprocess is None else Path(preprocess),
        seed=seed,
    )
    probes = [_probe(subject, next(iter(feeds.by_size.values()))[0], threads) for subject in subjects]
    runners = [_open(subject, threads) for subject in subjects]
    batches: list[list[dict[str, Any]]] = [[] for _ in subjects]
    for size, pool in feeds.by_size.items():
        timings = time_interleaved(
            [_call(runner, pool, subject.path) for runner, subject in zip(runners, subjects, strict=True)],
            rounds=runs,
            seed=seed,
            progress=progress,
        )
        for index, timing in enumerate(timings):
            batches[index].append(_measured(size, timing, timings[0] if index else None, seed))
    rows = [
        _row(subject, index, runner, batches[index], probed)
        for index, (subject, runner, probed) in enumerate(zip(subjects, runners, probes, strict=True))
    ]
    size_metrics(rows)
    details = {
        "data": feeds.source,
        "inputs": feeds.shapes,
        "device": "cpu",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "threads": threads,
        "runtimes": _runtimes(subjects),
    }
    warnings = [warning for subject in subjects for warning in subject.warnings] + feeds.warnings
    return Report("bench", rows, [], apply_gates(gates, rows), warnings, details)


def _open(subject: Subject, threads: int) -> Runner:
    runner = open_runner(subject.path, threads=threads, weights=subject.weights, shared=True)
    subject.see(runner)
    return runner


def _probe(subject: Subject, feeds: Arrays, threads: int) -> dict[str, float]:
    return vars(probe(subject.path, subject.kind, feeds, threads=threads, weights=subject.weights))


def _call(runner: Runner, pool: Sequence[Arrays], name: str) -> Callable[[int], object]:
    """A function of the round's number that runs the model; inputs are cast to its dtypes beforehand."""
    fitting = [fit(feeds, runner.inputs, name) for feeds in pool]
    return lambda number: runner.run(fitting[number % len(fitting)])


def _measured(size: int, timing: Timing, reference: Timing | None, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "batch_size": size,
        "rounds": len(timing.ns),
        "calls": timing.ns.size,
        "latency_ms_p50": timing.percentile_ms(50),
        "latency_ms_p90": timing.percentile_ms(90),
        "latency_ms_p99": timing.percentile_ms(99),
        "throughput_per_s": timing.per_second(size),
    }
    if reference is not None:
        gain = speedup(reference, timing, seed)
        found |= {"speedup": gain.ratio, "speedup_low": gain.low, "speedup_high": gain.high, "verdict": gain.verdict}
    return found


def _row(
    subject: Subject, index: int, runner: Runner, batches: list[dict[str, Any]], probed: dict[str, float]
) -> ModelRow:
    metrics = {name: batches[0][name] for name in (*METRICS, *CANDIDATE_METRICS) if name in batches[0]}
    row = subject.row(index, metrics | {"load_ms": probed["load_ms"], "peak_rss_bytes": probed["peak_rss_bytes"]})
    row.details = {
        "batches": batches,
        "baseline_rss_bytes": probed["baseline_rss_bytes"],
        "kernels": _kernels(subject, runner),
    }
    return row


def _kernels(subject: Subject, runner: Runner) -> dict[str, Any]:
    """What computes: operators of the runtime's own optimized graph, or dtypes of a torch module's weights."""
    if subject.onnx:
        return prove(onnx_file(subject.onnx.path)).to_json()
    import torch

    dtypes = {str(value.dtype).removeprefix("torch.") for value in runner.module.parameters()}  # type: ignore[attr-defined]
    return {"runtime": f"torch {torch.__version__}", "dtypes": sorted(dtypes)}


def _runtimes(subjects: Sequence[Subject]) -> list[str]:
    from importlib.metadata import version

    needed = {"onnx": ("onnxruntime",), "checkpoint": ("torch", "transformers")}
    names = [name for subject in subjects for name in needed.get(subject.kind, ("torch",))]
    return [f"{name} {version(name)}" for name in dict.fromkeys(names)]
