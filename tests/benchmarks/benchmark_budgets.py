"""Budgets beside single schemes: what is kept of a model at the same size, and what a second budget takes.

Run: .venv/bin/python tests/benchmarks/benchmark_budgets.py [PART...]     (all by default)

smollm2       SmolLM2-135M, --max-size of uniform int4 in groups of 32: bytes, and perplexity on text that was held out;
              then another budget on the same model, whose search is timed
smollm2-gptq  the same with gptq on both
autoscheme    SmolLM2-135M, the layers that AutoRound's AutoScheme gives 8 bits for 5 bits on average, and the others
              4, beside a mix that is searched for within the bytes of that; codes of both by mse
efficientnet  EfficientNet-Lite0, --max-drop of one point of argmax agreement: bytes and latency beside the smallest
              single scheme that keeps it, too; then another budget. Images are crops of two photographs; those whose
              first class leads by less than a tenth of a nat are left out, since float16 turns them as well.
recognizer    PP-OCRv4's recognizer, --max-drop of one point of pictures that are read without a fault, likewise
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scoring
from harness import COMMAND, line, main, show
from reading import are_right, pictured
from support import real_models

import quantcli
from quantcli.errors import InputError
from quantcli.planning.recipe import Recipe
from quantcli.search.bounds import drop_of
from quantcli.search.budget import Budget

SEQUENCE, WINDOWS = 512, 24
#: Of the linear layers' weights, for AutoScheme.
AVERAGE_BITS = 5.0
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
    ours, theirs = _evaluated(model, (uniform, mix), held_out)
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


def autoscheme(folder: Path) -> None:
    """Which layers get more bits: the same format, the same rounding, the same bytes."""
    import models
    import peers
    from benchmark_algorithms import CACHE, THREADS
    from support.real_models import prose_halves

    model = models.prepare("SmolLM2-135M", folder / "SmolLM2-135M")
    calibration, held_out = prose_halves(folder, 0.575)
    bits, cost = peers.auto_scheme(model, calibration, folder, CACHE, AVERAGE_BITS, threads=THREADS)
    eight = [name for name, each in bits.items() if each == 8]
    recipe = {"scheme": "int4", "group_size": 64, "algorithm": "mse", "rules": [{"match": eight, "scheme": "int8"}]}
    theirs, ours = folder / "theirs", folder / "ours"
    quantcli.convert(model, theirs, recipe=Recipe.model_validate(recipe))
    seconds = _searched(model, ours, _bytes(theirs), calibration, "mse", folder / "sensitivity.json")
    show("seconds of the search, theirs and ours", f"{cost.wall_seconds:.0f}, {seconds:.0f}")
    first, second = _evaluated(model, (theirs, ours), held_out)
    line("bytes", f"{_bytes(theirs):,} -> {_bytes(ours):,}", "no more", _bytes(ours) <= _bytes(theirs))
    for name in ("perplexity", "kl_nats"):
        line(name, f"{first[name]:.3f} -> {second[name]:.3f}", "no more", second[name] <= first[name])


def _evaluated(model: Path, artifacts: tuple[Path, Path], text: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of two artifacts beside their model."""
    command = [COMMAND, "eval", model, *artifacts, "--data", text, "--seq-len", SEQUENCE, "--samples", WINDOWS]
    done = subprocess.run(list(map(str, [*command, "--json", "-q"])), check=True, capture_output=True, text=True)
    _, first, second = (row["metrics"] for row in json.loads(done.stdout)["models"])
    return first, second


#: One point, with confidence; single schemes that are tried beside the mix; samples to calibrate with.
POINT, SINGLE, CALIBRATION = 0.01, ("int4", "int8", "int8-dynamic", "int8-static", "fp16"), 64
#: Crops to choose from, and nats by which the first class must lead.
CROPS, LEAD = 1400, 0.1


def efficientnet(folder: Path) -> None:
    """A convolutional network whose depthwise layers take eight bits badly."""
    model = real_models.efficientnet_lite0(folder)
    calibration = real_models.crops(folder / "calibration.npz", CALIBRATION, 0)
    images = np.load(real_models.crops(folder / "crops.npz", CROPS, 1))["image"]
    expected = np.concatenate(scoring.outputs(model, ({"image": each[None]} for each in images)))
    first, second = np.sort(expected, axis=1)[:, -2:].T[::-1]
    held_out = folder / "held_out.npz"
    np.savez(held_out, image=images[first - second >= LEAD])

    def losses(values: list[np.ndarray]) -> list[float]:
        kept = expected[first - second >= LEAD]
        return [float(a.argmax() != b.argmax()) for a, b in zip(kept, values, strict=True)]

    _one_point("EfficientNet-Lite0", folder, model, calibration, held_out, None, losses)


def recognizer(folder: Path) -> None:
    """A convolutional network with a transformer in it, judged by what it reads."""
    model, texts = real_models.ocr_model("recognizer"), pictured()
    calibration = real_models.text_lines(folder / "calibration.npz", real_models.phrases(CALIBRATION, 1), 0)
    held_out = real_models.text_lines(folder / "held_out.npz", texts, 1)
    np.savez(held_out, x=np.load(held_out)["x"], labels=np.arange(len(texts)))
    before = are_right(scoring.outputs(model, real_models.feeds(held_out)), range(len(texts)))

    def losses(values: list[np.ndarray]) -> list[float]:
        return [float(a) - float(b) for a, b in zip(before, are_right(values, range(len(texts))), strict=True)]

    _one_point("recognizer", folder, model, calibration, held_out, "reading:right", losses)


def _one_point(
    name: str,
    folder: Path,
    model: Path,
    calibration: Path,
    held_out: Path,
    metric: str | None,
    losses: Callable[[list[np.ndarray]], list[float]],
) -> None:
    """The mix that a limit of one point gives, beside the smallest single scheme that keeps it."""
    kept, samples = folder / "sensitivity.json", list(real_models.feeds(held_out))

    def searched(output: Path, limit: float) -> float:
        budget = Budget(max_drop=limit, metric=metric, eval_data=str(held_out), sensitivity=kept)
        report = quantcli.convert(model, output, data=calibration, budget=budget)
        show(f"{name}: layers of the mix for {limit:g}", str(report.details["budget"].get("chosen", {}).get("layers")))
        return float(report.details["budget"].get("search_seconds", 0))

    def bound(path: Path) -> float:
        return drop_of(losses(scoring.outputs(path, samples))).bound

    mix = folder / "mix.onnx"
    first = searched(mix, POINT)
    found = bound(mix) if mix.exists() else float("inf")
    line(f"{name}: loss of the mix, bound", f"{found:.4f}", f"at most {POINT}", found <= POINT)
    single = model
    for scheme in SINGLE:
        path, data = folder / f"{scheme}.onnx", calibration if scheme.startswith("int") else None
        try:
            quantcli.convert(model, path, scheme=scheme, data=data)
        except InputError as error:
            show(f"{name} {scheme}", error.message[:60])
            continue
        lost = bound(path)
        show(f"{name} {scheme}: bytes, bound of the loss", f"{path.stat().st_size:,}, {lost:.4f}")
        if lost <= POINT and path.stat().st_size < single.stat().st_size:
            single = path
    if not mix.exists():
        return
    sizes = mix.stat().st_size, single.stat().st_size
    smaller = sizes[0] < sizes[1]
    line(f"{name}: bytes, mix / {single.stem}", f"{sizes[0]:,} / {sizes[1]:,}", "smaller", smaller)
    speed = scoring.latency(mix, single, samples[:16], threads=1)
    span = f"faster; {speed.ratio:.2f}x ({speed.low:.2f}-{speed.high:.2f})"
    line(f"{name}: latency, mix / {single.stem}", str(speed), span, speed.low > 1)
    again = searched(folder / "again.onnx", 1.5 * POINT)
    share = again / first
    line(f"{name}: first search, second", f"{first:.0f} s, {again:.1f} s", f"{SECOND}; is {share:.2f}", share <= SECOND)


if __name__ == "__main__":
    prose = "SmolLM2-135M on prose, the help texts that come with Python"
    parts = {
        "smollm2": (smollm2, prose),
        "smollm2-gptq": (smollm2_gptq, prose),
        "autoscheme": (autoscheme, prose),
        "efficientnet": (efficientnet, "EfficientNet-Lite0 on crops of scikit-learn's two photographs"),
        "recognizer": (recognizer, "PP-OCRv4's recognizer on rendered pictures of text"),
    }
    main(__doc__ or "", parts)
