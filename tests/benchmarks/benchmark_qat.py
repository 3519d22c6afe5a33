"""Quantization-aware training: what it recovers of what quantization costs, and how long that takes.

Run: .venv/bin/python tests/benchmarks/benchmark_qat.py [fashion] [smollm2]     (both by default)

fashion  a depthwise-separable network on Fashion-MNIST (Debian package dataset-fashion-mnist; else scikit-learn's
         digits), 4-bit weights and 8-bit activations with fixed ranges: accuracy on the test set of the original, after
         quantization alone, and after training; the same of the fake-quantized model in torch
smollm2  SmolLM2-135M, int4 in groups of 64, 64 x 512 tokens: perplexity after gptq + qat beside gptq + tune

Let nothing else run meanwhile: times are compared.
"""

from __future__ import annotations

import time
from pathlib import Path

import benchmark_algorithms as algorithms
import fashion as example
import numpy as np
import torch
from harness import ROOT, line, main, show

from quantcli import convert, evaluate
from quantcli.planning.recipe import load_recipe
from quantcli.training.onnx_trainee import GraphTrainee

CONFIGS = ROOT / "configs"
#: Accuracy that quantization must cost for its recovery to say anything.
LEAST_COST = 0.005
#: Chains that are compared on the language model, by the name of their recipe.
LANGUAGE = {"gptq + tune": "llm-int4-tuned.yaml", "gptq + qat": "llm-int4-qat.yaml"}


def fashion(folder: Path) -> None:
    """Accuracies on the test set, and the seconds of training and conversion together."""
    example.write(folder)
    weights, train, test = (folder / name for name in example.FILES)
    recipe = load_recipe(CONFIGS / "cnn-w4a8-qat.yaml")
    given = {"weights": weights, "data": train, "force": True}
    convert("fashion:network", folder / "ptq.onnx", recipe=recipe.model_copy(update={"steps": []}), **given)
    trained: list[GraphTrainee] = []
    written = GraphTrainee.write_back

    def kept(self: GraphTrainee) -> dict[str, tuple[float, float]]:
        trained.append(self)
        return written(self)

    GraphTrainee.write_back = kept  # type: ignore[method-assign]
    started = time.monotonic()
    report = convert("fashion:network", folder / "qat.onnx", recipe=recipe, **given)
    seconds = time.monotonic() - started
    found = evaluate("fashion:network", [folder / "ptq.onnx", folder / "qat.onnx"], data=test, weights=weights)
    original, ptq, qat = (float(row.metrics["top1"] or 0) for row in found.models)
    print(f"{'Top-1 on the test set':32} original {original:.2%}, PTQ {ptq:.2%}, QAT {qat:.2%}")
    if original - ptq < LEAST_COST:
        show("W4A8: recovered of what PTQ cost", f"nothing to recover: PTQ cost {original - ptq:.2%}")
    else:
        recovered = (qat - ptq) / (original - ptq)
        line("W4A8: recovered of what PTQ cost", f"{recovered:.0%}", "at least 80%", recovered >= 0.8)
    line("W4A8: conversion with training", f"{seconds:.0f} s", "at most 600 s", seconds <= 600)
    fake = _accuracy(trained[0], test)
    difference = abs(fake - qat)
    line("Top-1 of the fake-quantized model", f"{fake:.2%}", f"ONNX {qat:.2%} +- 0.1%", difference <= 0.001)
    print(f"    {report.details['training']['steps']} steps, best at {report.details['training']['best_step']}")


def _accuracy(model: GraphTrainee, test: Path) -> float:
    with np.load(test) as arrays:
        images, labels = torch.from_numpy(arrays["input"]), torch.from_numpy(arrays["labels"])
    right = 0
    with torch.no_grad():
        for rows in torch.arange(len(images)).split(250):
            (scores,) = model.student({"input": images[rows]}).values()
            right += int((scores.argmax(-1) == labels[rows]).sum())
    return right / len(images)


def smollm2(folder: Path) -> None:
    """Perplexity on held-out prose, and on two other kinds of text."""
    model = algorithms.subject(folder)
    calibration, others = algorithms.texts(folder)
    windows = {name: algorithms.windows(model, text, 40 if name == "prose" else 16) for name, text in others.items()}
    given = ["--data", calibration, "--samples", algorithms.SEQUENCES, "--seq-len", algorithms.TOKENS]
    found = {}
    for name, recipe in LANGUAGE.items():
        cost = algorithms.convert(model, folder / "out", "--recipe", CONFIGS / recipe, *given)
        found[name] = {text: algorithms.perplexity(folder / "out", ids) for text, ids in windows.items()}
        print(
            f"{name:16} {', '.join(f'{text} {value:.3f}' for text, value in found[name].items())}   {cost}", flush=True
        )
    for text, best in found["gptq + tune"].items():
        own = found["gptq + qat"][text]
        line(f"gptq + qat: perplexity, {text}", f"{own:.3f}", f"below {best:.3f}, gptq + tune", own < best)


if __name__ == "__main__":
    main(
        __doc__,
        {
            "fashion": (fashion, f"a depthwise-separable network on {example.data_name()}"),
            "smollm2": (smollm2, "SmolLM2-135M on prose, on descriptions of data sets and on Python code"),
        },
    )
