"""Budgets beside single schemes: what is kept of a model at the same size, and what a second budget takes.

Run: .venv/bin/python tests/benchmarks/benchmark_budgets.py [smollm2] [smollm2-gptq]     (all by default)

smollm2       SmolLM2-135M, --max-size of uniform int4 in groups of 32: bytes, and perplexity on text that was held out;
              then another budget on the same model, whose search is timed
smollm2-gptq  the same with gptq on both
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from harness import COMMAND, line, main, show

SEQUENCE, WINDOWS = 512, 24
#: What the mix may have of uniform's perplexity, and the second search of the first one's time.
PERPLEXITY, SECOND = 0.985, 0.1


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _searched(model: Path, output: Path, size: int, text: Path, algorithm: str, kept: Path) -> float:
    """Convert within a size; the seconds of the search."""
    command = [COMMAND, "convert", model, "-o", output, "--max-size", size, "--data", text, "--seq-len", SEQUENCE]
    command += ["--algorithm", algorithm, "--sensitivity", kept, "--json", "-q", "--force"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["budget"]["search_seconds"])


def _smollm2(folder: Path, algorithm: str) -> None:
    import models
    from support.real_models import prose_halves

    model = models.prepare("SmolLM2-135M", folder / "SmolLM2-135M")
    calibration, held_out = prose_halves(folder, 0.575)
    uniform, mix, kept = folder / "uniform", folder / "mix", folder / "sensitivity.json"
    data = ["--data", calibration, "--seq-len", SEQUENCE] if algorithm == "gptq" else []
    flags = ["--scheme", "int4", "--group-size", 32, "--algorithm", algorithm, *data, "-q"]
    subprocess.run(list(map(str, [COMMAND, "convert", model, "-o", uniform, *flags])), check=True, capture_output=True)
    first = _searched(model, mix, _bytes(uniform), calibration, algorithm, kept)
    command = [COMMAND, "eval", model, uniform, mix, "--data", held_out, "--seq-len", SEQUENCE, "--samples", WINDOWS]
    done = subprocess.run(list(map(str, [*command, "--json", "-q"])), check=True, capture_output=True, text=True)
    _, ours, theirs = (row["metrics"] for row in json.loads(done.stdout)["models"])
    sizes = _bytes(uniform), _bytes(mix)
    line(f"{algorithm}: bytes, uniform -> mix", f"{sizes[0]:,} -> {sizes[1]:,}", "no more", sizes[1] <= sizes[0])
    ratio = theirs["perplexity"] / ours["perplexity"]
    figures = f"{ours['perplexity']:.2f} -> {theirs['perplexity']:.2f}"
    line(f"{algorithm}: perplexity, uniform -> mix", figures, f"{PERPLEXITY}; is {ratio:.3f}", ratio <= PERPLEXITY)
    show(f"{algorithm}: KL, uniform -> mix", f"{ours['kl_nats']:.3f} -> {theirs['kl_nats']:.3f}")
    if algorithm != "gptq":
        started = time.monotonic()
        second = _searched(model, folder / "second", round(1.05 * sizes[0]), calibration, algorithm, kept)
        show(f"{algorithm}: seconds of the second conversion", f"{time.monotonic() - started:.0f}")
        share = second / first
        line(
            "search: first, second budget",
            f"{first:.0f} s, {second:.0f} s",
            f"{SECOND}; is {share:.2f}",
            share <= SECOND,
        )


def smollm2(folder: Path) -> None:
    """Codes chosen without data."""
    _smollm2(folder, "mse")


def smollm2_gptq(folder: Path) -> None:
    """Codes chosen with data, for both."""
    _smollm2(folder, "gptq")


if __name__ == "__main__":
    prose = "SmolLM2-135M on prose, the help texts that come with Python"
    main(__doc__ or "", {"smollm2": (smollm2, prose), "smollm2-gptq": (smollm2_gptq, prose)})
