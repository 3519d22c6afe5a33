"""Data-driven algorithms beside their peers, on the same model, data and token count; and what they cost.

Run: .venv/bin/python tests/benchmarks/benchmark_algorithms.py [smollm2] [int8] [minilm] [memory]     (all by default)

smollm2  SmolLM2-135M, int4 symmetric in groups of 64, 64 x 512 tokens of calibration: perplexity on text of the same
         kind that was held out, and on two other kinds; wall time and CPU time; llm-compressor's GPTQ and AutoRound in
         environments of their own (the first time some gigabytes are installed)
int8     the same model, int8-dynamic and int8-static with smoothquant
minilm   all-MiniLM-L6-v2 at four bits: cosine with the FP32 embeddings of held-out sentences
memory   a synthetic 4 GB checkpoint through gptq, on few tokens: peak memory

Perplexity and cosine are computed here, with transformers alone. Environments and results of peers are kept in
.benchmark-cache (or in the folder that QUANTCLI_BENCHMARK_CACHE names), so that a part can be repeated; delete it to
measure anew. Let nothing else run meanwhile: times are compared.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import peers  # noqa: E402
from benchmarks.benchmark import line  # noqa: E402

COMMAND = Path(sys.executable).with_name("quantcli")
CACHE = Path(os.environ.get("QUANTCLI_BENCHMARK_CACHE", ROOT / ".benchmark-cache"))
THREADS, GROUP_SIZE, SEQUENCES, TOKENS, ITERATIONS = 2, 64, 64, 512, 60
#: Share of the prose that is calibrated on: just enough for all sequences.
CALIBRATION_SHARE = 0.575

#: Chains of algorithms, as the steps of a recipe, and the best that fits into AutoRound's time.
CHAINS = {
    "gptq": "[gptq]",
    "gptq + tune": "[gptq, tune]",
    "autoround": f"[autoround: {{iterations: {ITERATIONS}}}]",
    "autoround + tune": f"[autoround: {{iterations: {ITERATIONS}}}, tune]",
}
BEST = "gptq + tune"


@dataclass
class Result:
    """What making a model took, and its perplexity by text."""

    cost: peers.Cost | None
    perplexity: dict[str, float]


def texts(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The calibration text, and texts to evaluate on: held-out prose, descriptions of data sets, Python code."""
    import heapq
    import statistics
    import textwrap

    import sklearn
    from support.real_models import prose_halves

    calibration, prose = prose_halves(folder, CALIBRATION_SHARE)
    descriptions = sorted((Path(sklearn.__file__).parent / "datasets" / "descr").glob("*.rst"))
    others = {
        "descriptions": "\n".join(path.read_text(encoding="utf-8") for path in descriptions),
        "code": "\n".join(Path(str(module.__file__)).read_text("utf-8") for module in (heapq, textwrap, statistics)),
    }
    for name, text in others.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return calibration, {"prose": prose, **{name: folder / f"{name}.txt" for name in others}}


def windows(model: Path, text: Path, most: int) -> Tensor:
    """Token ids ``[at most most, TOKENS]`` of a text, from its start."""
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"))["input_ids"])
    return ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS)[:most]


def perplexity(model: Path, ids: Tensor) -> float:
    """Of a folder that transformers loads, in float32, over windows of token ids."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total = 0.0
    with torch.inference_mode():
        for rows in torch.split(ids, 4):
            logits = network(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / ids[:, 1:].numel())


def convert(model: Path, output: Path, *flags: object) -> peers.Cost:
    """What a conversion takes. The artifact is verified in that time, too."""
    command = [COMMAND, "convert", model, "-o", output, "--threads", THREADS, "--force", "-q", *flags]
    return peers.measured(command, output.with_suffix(".log"), threads=THREADS)


def subject(folder: Path) -> Path:
    """SmolLM2-135M as a folder."""
    import models

    return models.prepare("SmolLM2-135M", folder / "SmolLM2-135M")


def calibration_ids(model: Path, text: Path, folder: Path) -> Path:
    """The very windows that quantcli takes of a text, for peers."""
    from quantcli.data.request import DataRequest
    from quantcli.data.samples import load_samples
    from quantcli.models.inputs import hugging_face_ports

    ports = hugging_face_ports(model, vision=False)
    samples = load_samples(DataRequest(str(text), SEQUENCES, TOKENS), ports, folder=model)
    rows = [torch.from_numpy(sample.inputs["input_ids"]) for sample in samples]
    assert len(rows) == SEQUENCES
    path = folder / "windows.safetensors"
    save_file({"input_ids": torch.cat(rows)}, path)
    return path


def _made(model: Path, calibration: Path, folder: Path) -> Iterator[tuple[str, Path, peers.Cost | None]]:
    """Name, folder and cost of every quantized model, made when it is asked for."""
    given = ["--data", calibration, "--samples", SEQUENCES, "--seq-len", TOKENS]
    ids = calibration_ids(model, calibration, folder)
    rtn = ["--scheme", "int4", "--group-size", GROUP_SIZE, "--algorithm", "rtn"]
    yield "fp32", model, None
    yield "rtn", folder / "rtn", convert(model, folder / "rtn", *rtn)
    options = {"group_size": GROUP_SIZE}
    yield "llm-compressor", *peers.quantized("llm-compressor", model, ids, CACHE, options, threads=THREADS)
    for name, steps in CHAINS.items():
        file, output = folder / f"{name}.yaml", folder / name
        file.write_text(f"scheme: int4\ngroup_size: {GROUP_SIZE}\nsteps: {steps}\n", encoding="utf-8")
        yield name, output, convert(model, output, "--recipe", file, *given)
    options |= {"iterations": ITERATIONS, "batch_size": 4}
    yield "AutoRound", *peers.quantized("auto-round", model, ids, CACHE, options, threads=THREADS)


def smollm2(folder: Path) -> None:
    """Every chain and every peer, one after the other; then the limits."""
    model = subject(folder)
    calibration, others = texts(folder)
    evaluated = {name: windows(model, text, 40 if name == "prose" else 16) for name, text in others.items()}
    found: dict[str, Result] = {}
    print(f"{'SmolLM2-135M, W4 g64':22}" + "".join(f"{name:>18}" for name in evaluated))
    for name, path, cost in _made(model, calibration, folder):
        values = {text: perplexity(path, rows) for text, rows in evaluated.items()}
        found[name] = Result(cost, values)
        cells = (f"{value:.3f} ({value / found['fp32'].perplexity[text]:.3f})" for text, value in values.items())
        print(f"{name:22}" + "".join(f"{cell:>18}" for cell in cells) + f"   {cost or ''}", flush=True)
    _limits(found)


def _limits(found: dict[str, Result]) -> None:
    base, theirs, rounder = found["fp32"].perplexity, found["llm-compressor"], found["AutoRound"]
    ratio = found["gptq"].perplexity["prose"] / base["prose"]
    line("gptq: perplexity over fp32", f"{ratio:.3f}", "at most 33.51 / 27.11", ratio <= 33.51 / 27.11)
    pairs = [("gptq", "llm-compressor", theirs, 0.5)]
    pairs += [(name, "AutoRound", rounder, 1.0) for name in ("autoround", BEST)]
    for name, whose, peer, limit in pairs:
        for kind in ("wall", "cpu"):
            own = getattr(found[name].cost, f"{kind}_seconds") / getattr(peer.cost, f"{kind}_seconds")
            line(f"{name}: {kind} time over {whose}'s", f"{own:.2f}", f"at most {limit}", own <= limit)
    for name in ("autoround", BEST):
        for text in base:
            own, other = found[name].perplexity[text], rounder.perplexity[text]
            line(f"{name}: perplexity, {text}", f"{own:.3f}", f"AutoRound {other:.3f}", own <= other)


def int8(folder: Path) -> None:
    """Perplexity with activations of eight bits, by transformers with compressed-tensors."""
    model = subject(folder)
    calibration, others = texts(folder)
    ids = windows(model, others["prose"], 40)
    fp32 = perplexity(model, ids)
    for scheme, limit in (("int8-dynamic", 0.01), ("int8-static", None)):
        flags = ["--scheme", scheme, "--data", calibration, "--samples", SEQUENCES, "--seq-len", TOKENS]
        cost = convert(model, folder / scheme, *flags, "--algorithm", "smoothquant")
        excess = perplexity(folder / scheme, ids) / fp32 - 1
        wanted = f"at most {limit:.0%}" if limit else "(no limit)"
        line(f"SmolLM2-135M {scheme}, smoothquant: above fp32", f"{excess:.2%}", wanted, not limit or excess <= limit)
        print(f"    {cost}")


def _embeddings(model: Path, sentences: list[str]) -> Iterator[Tensor]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        for sentence in sentences:
            inputs = tokenizer(sentence, truncation=True, max_length=128, return_tensors="pt")
            yield network(**inputs).last_hidden_state[0].mean(0)


def minilm(folder: Path) -> None:
    """Mean cosine of embeddings, mean-pooled as the model's authors do."""
    import models
    from support.real_models import prose_halves

    model = models.prepare("all-MiniLM-L6-v2", folder / "all-MiniLM-L6-v2")
    calibration, held_out = prose_halves(folder)
    sentences = held_out.read_text(encoding="utf-8").splitlines()[:256]
    wanted = list(_embeddings(model, sentences))
    given = ["--data", calibration, "--samples", 256, "--seq-len", 128]
    recipes = {
        "mse, groups of 64": ("scheme: int4\ngroup_size: 64\nalgorithm: mse\n", []),
        "gptq, groups of 64": ("scheme: int4\ngroup_size: 64\nalgorithm: gptq\n", given),
        "gptq, groups of 32": ("scheme: int4\ngroup_size: 32\nalgorithm: gptq\n", given),
        "gptq + tune, groups of 32": ("scheme: int4\ngroup_size: 32\nsteps: [gptq, tune]\n", given),
    }
    for name, (recipe, flags) in recipes.items():
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        cost = convert(model, folder / "out", "--recipe", folder / "recipe.yaml", *flags)
        found = _embeddings(folder / "out", sentences)
        cosines = [torch.cosine_similarity(a, b, 0).item() for a, b in zip(wanted, found, strict=True)]
        mean = sum(cosines) / len(cosines)
        goal = "at least 0.99" if "32" in name else "(no limit)"
        line(f"all-MiniLM-L6-v2 int4, {name}: cosine", f"{mean:.4f}", goal, "32" not in name or mean >= 0.99)
        print(f"    {cost}")


def memory(folder: Path) -> None:
    """Peak memory as the process itself reports it; the check in transformers is another process."""
    import numpy as np
    from support.synthetic import VOCABULARY, llama_checkpoint

    model = llama_checkpoint(folder / "big", 4_000_000_000, 8)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (4, 128))
    np.savez(folder / "ids.npz", input_ids=ids)
    flags = ["--scheme", "int4", "--algorithm", "gptq", "--data", folder / "ids.npz", "--target", "vllm"]
    cost = convert(model, folder / "out", *flags, "--json")
    peak = json.loads((folder / "out.log").read_text(encoding="utf-8"))["peak_rss_bytes"] / 1e9
    line("gptq of a 4 GB checkpoint, 4 x 128 tokens: peak", f"{peak:.2f} GB", "at most 2 GB", peak <= 2)
    print(f"    {cost}")


if __name__ == "__main__":
    parts = {"smollm2": smollm2, "int8": int8, "minilm": minilm, "memory": memory}
    if set(sys.argv[1:]) - parts.keys():
        sys.exit(__doc__)
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as scratch:
            parts[name](Path(scratch))
