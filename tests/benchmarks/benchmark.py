"""The figures quantcli stands for, measured on this machine and printed beside their limits.

Run: .venv/bin/python tests/benchmarks/benchmark.py [startup] [conversion] [proof] [accuracy]     (all by default)

startup     `--help` and `inspect` of a 64-shard checkpoint
conversion  int4 rtn of a synthetic 4 GB bf16 checkpoint (in 1, 16 and 64 shards): peak memory, and time beside
            safetensors' load_file + save_file over the same shards
proof       int8 and int4 of a synthetic 2 GB bf16 checkpoint, with --verify codes and --verify run in turn: processor
            time of all processes, and what the run adds
accuracy    SmolLM2-135M: perplexity and size of int8 and of int4 with rtn and mse
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import COMMAND, line, main, show

_LOAD_AND_SAVE = """
import sys, time
from pathlib import Path
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
start = time.monotonic()
for shard in sorted(source.glob("*.safetensors")):
    save_file(load_file(shard), target / shard.name)
print(time.monotonic() - start)
"""


def run(*arguments: object) -> str:
    """Standard output of quantcli, which must succeed."""
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def startup(folder: Path) -> None:
    """Median of nine starts, after one that fills the caches."""
    from support.synthetic import llama_checkpoint

    model = llama_checkpoint(folder / "sharded", 1_500_000_000, 64)
    for name, arguments in {"quantcli --help": ["--help"], "quantcli inspect, 64 shards": ["inspect", model]}.items():
        run(*arguments)
        median = statistics.median(seconds(lambda arguments=arguments: run(*arguments)) for _ in range(9))
        line(name, f"{median:.3f} s", "at most 0.3 s", median <= 0.3)
    shutil.rmtree(model)


def conversion(folder: Path) -> None:
    """Rounds of both programs in turn, so that both meet the same machine; the medians are compared."""
    from support.synthetic import llama_checkpoint

    for shards in (16, 1, 64):
        model = llama_checkpoint(folder / f"big-{shards}", 4_000_000_000, shards)
        ours, theirs, peaks = [], [], []
        for _ in range(5 if shards == 16 else 1):
            copy = [sys.executable, "-c", _LOAD_AND_SAVE, str(model), str(folder / "copy")]
            theirs.append(float(subprocess.run(copy, check=True, capture_output=True, text=True).stdout))
            shutil.rmtree(folder / "copy")
            arguments = (
                "convert",
                model,
                "-o",
                folder / "out",
                "--scheme",
                "int4",
                "--algorithm",
                "rtn",
                "--json",
                "-q",
            )
            report = json.loads(run(*arguments))
            shutil.rmtree(folder / "out")
            ours.append(report["seconds"])
            peaks.append(report["peak_rss_bytes"] / 1e6)
        line(
            f"int4 rtn of 4 GB, {shards} shards: peak memory",
            f"{max(peaks):.0f} MB",
            "at most 700 MB",
            max(peaks) <= 700,
        )
        ratio = statistics.median(ours) / statistics.median(theirs)
        times = f"{statistics.median(ours):.1f} / {statistics.median(theirs):.1f} s"
        line(f"int4 rtn of 4 GB, {shards} shards: time / load + save", times, f"at most 1; is {ratio:.2f}", ratio <= 1)
        shutil.rmtree(model)


def proof(folder: Path) -> None:
    """Processor time, since a machine's other work lengthens the time on the clock."""
    from support.synthetic import llama_checkpoint

    model = llama_checkpoint(folder / "two", 2_000_000_000, 1)
    for scheme in ("int8", "int4"):
        used: dict[str, list[float]] = {"codes": [], "run": []}
        for _ in range(3):
            for how, each in used.items():
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                run("convert", model, "-o", folder / "out", "--scheme", scheme, "--verify", how, "-q")
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                each.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
                shutil.rmtree(folder / "out")
        codes, ran = (statistics.median(each) for each in used.values())
        show(f"{scheme} of 2 GB: processor time with --verify codes", f"{codes:.1f} s")
        show(f"{scheme} of 2 GB: processor time with --verify run", f"{ran:.1f} s ({ran / codes - 1:+.0%})")
    shutil.rmtree(model)


def accuracy(folder: Path) -> None:
    """Perplexity on 40 sequences of 512 tokens of English prose."""
    import models
    import prose

    model = models.prepare("SmolLM2-135M", folder / "SmolLM2-135M")
    text = folder / "prose.txt"
    text.write_text("\n".join(prose.paragraphs()), encoding="utf-8")
    variants = {
        "int8": ["--scheme", "int8"],
        "int4 rtn": ["--scheme", "int4", "--group-size", "64", "--algorithm", "rtn"],
        "int4 mse": ["--scheme", "int4", "--group-size", "64", "--algorithm", "mse"],
    }
    for name, flags in variants.items():
        run("convert", model, "-o", folder / name, *flags, "-q")
    evaluated = run(
        "eval", model, *(folder / name for name in variants), "--data", text, "--samples", 40, "--json", "-q"
    )
    reference, *candidates = json.loads(evaluated)["models"]
    fp32 = reference["metrics"]["perplexity"]
    metrics = {name: row["metrics"] for name, row in zip(variants, candidates, strict=True)}
    line("SmolLM2-135M fp32 perplexity", f"{fp32:.3f}", "", True)
    excess = metrics["int8"]["perplexity"] / fp32 - 1
    line("SmolLM2-135M int8 perplexity above fp32", f"{excess:.2%}", "at most 0.5%", excess <= 0.005)
    rtn, mse = (metrics[f"int4 {name}"]["perplexity"] for name in ("rtn", "mse"))
    line("SmolLM2-135M int4 g64 perplexity, rtn -> mse", f"{rtn:.2f} -> {mse:.2f}", "clearly better", mse < 0.98 * rtn)
    ratio = metrics["int4 mse"]["size_ratio"]
    line("SmolLM2-135M int4 g64 size over fp32", f"{ratio:.3f}", "at most 0.22", ratio <= 0.22)


if __name__ == "__main__":
    main(
        __doc__,
        {
            "startup": (startup, "a synthetic Llama checkpoint of 1.5 GB in 64 shards"),
            "conversion": (conversion, "a synthetic Llama checkpoint of 4 GB in bfloat16"),
            "proof": (proof, "a synthetic Llama checkpoint of 2 GB in bfloat16"),
            "accuracy": (accuracy, "SmolLM2-135M on prose, the help texts that come with Python"),
        },
    )
