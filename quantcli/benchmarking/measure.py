"""Measuring models that take turns, and the row of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quantcli.benchmarking import probe
from quantcli.benchmarking.timing import Timing, speedup
from quantcli.core.ports import Arrays
from quantcli.models.inputs import fit
from quantcli.models.kernels import prove
from quantcli.models.runner import Runner
from quantcli.models.source import ModelSource
from quantcli.onnx.graph.model import onnx_file
from quantcli.reporting.metric_labels import GENERATION_METRICS, GENERATION_SPEEDUPS
from quantcli.reporting.report import ModelRow

METRICS = (
    "latency_ms_p50", "latency_ms_p90", "latency_ms_p99", "throughput_per_s", "load_ms", "peak_rss_bytes",
    "size_bytes", "size_ratio", *GENERATION_METRICS,
)  # fmt: skip
#: Enough of them to draw a distribution by.
PERCENTILES = range(0, 101, 5)
CANDIDATE_METRICS = ("speedup", "speedup_low", "speedup_high", *GENERATION_SPEEDUPS)


def load_and_peak(source: ModelSource, feeds: Arrays, threads: int, *, generates: bool) -> dict[str, float]:
    """Load time and peak memory of a model in a process of its own, where it also generates if it is to."""
    found = probe.probe(
        source.path, source.kind, feeds, threads=threads, weights=source.weights, generates=generates
    )  # fmt: skip
    return vars(found)


def timed_call(runner: Runner, pool: Sequence[Arrays], name: str) -> Callable[[int], object]:
    """A function of the round's number that runs the model; inputs are cast to its dtypes beforehand."""
    fitting = [fit(feeds, runner.inputs, name) for feeds in pool]
    return lambda number: runner.run(fitting[number % len(fitting)])


def batch_metrics(size: int, timing: Timing, reference: Timing | None, seed: int) -> dict[str, Any]:
    """Latency and throughput at one batch size, and the speed-up over a reference."""
    found: dict[str, Any] = {
        "batch_size": size,
        "rounds": len(timing.ns),
        "calls": timing.ns.size,
        "latency_ms_p50": timing.percentile_ms(50),
        "latency_ms_p90": timing.percentile_ms(90),
        "latency_ms_p99": timing.percentile_ms(99),
        "throughput_per_s": timing.per_second(size),
        "latency_ms_percentiles": {str(percent): timing.percentile_ms(percent) for percent in PERCENTILES},
    }
    if reference is not None:
        gain = speedup(reference, timing, seed)
        found |= {"speedup": gain.ratio, "speedup_low": gain.low, "speedup_high": gain.high, "verdict": gain.verdict}
    return found


def model_row(
    source: ModelSource, index: int, runner: Runner, batches: list[dict[str, Any]], probed: dict[str, float]
) -> ModelRow:
    """A model's row of the report: the figures of the first batch size, and all of them in its details."""
    metrics = {name: batches[0][name] for name in (*METRICS, *CANDIDATE_METRICS) if name in batches[0]}
    row = source.row(index, metrics | {"load_ms": probed["load_ms"], "peak_rss_bytes": probed["peak_rss_bytes"]})
    row.details = {
        "batches": batches,
        "baseline_rss_bytes": probed["baseline_rss_bytes"],
        "kernels": _kernels(source, runner),
    }
    return row


def _kernels(source: ModelSource, runner: Runner) -> dict[str, Any]:
    """What computes: operators of the runtime's own optimized graph, or dtypes of a torch module's weights."""
    if source.onnx:
        return prove(onnx_file(source.onnx.path)).to_json()
    import torch

    dtypes = {str(value.dtype).removeprefix("torch.") for value in runner.module.parameters()}  # type: ignore[attr-defined]
    return {"runtime": f"torch {torch.__version__}", "dtypes": sorted(dtypes)}


def runtimes(sources: Sequence[ModelSource]) -> list[str]:
    """Versions of the libraries that ran the models."""
    from importlib.metadata import version

    needed = {"onnx": ("onnxruntime",), "checkpoint": ("torch", "transformers")}
    names = [name for source in sources for name in needed.get(source.kind, ("torch",))]
    return [f"{name} {version(name)}" for name in dict.fromkeys(names)]
