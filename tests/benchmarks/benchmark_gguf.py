"""The same codes in compressed-tensors (torch) and in GGUF (llama.cpp): bytes, and perplexity by either runtime.

Run: python tests/benchmarks/benchmark_gguf.py [--positions N] [--algorithms rtn gptq] [FOLDER]

SmolLM2-135M becomes int4 in groups of 32 once, in compressed-tensors; its codes go to GGUF as they are. Another file is
made directly, with the table of tokens in 8 bits. Both runtimes are asked for the same tokens of the same held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
from math import exp
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import models  # type: ignore[import-not-found]
import torch
from support.real_models import prose_halves

import quantcli
from quantcli.conversion.checkpoint.llama_cpp import LlamaCpp
from quantcli.models.hugging_face import load_model, load_tokenizer
from quantcli.system.parallel import usable_cores

#: Tokens of a window, and the first that is scored.
WINDOW, FIRST = 80, 16


def windows(folder: Path, text: Path, positions: int) -> list[list[int]]:
    """Stretches of held-out text, spread over it, with so many scored tokens in all."""
    ids = load_tokenizer(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    count = max(1, positions // (WINDOW - FIRST))
    step = (len(ids) - WINDOW) // count
    return [ids[place * step : place * step + WINDOW] for place in range(count)]


def by_torch(folder: Path, texts: list[list[int]]) -> float:
    """Perplexity by transformers."""
    model = load_model(folder, causal=True)
    losses = []
    with torch.inference_mode():
        for ids in texts:
            logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            losses += [-logits[place - 1, ids[place]].item() for place in range(FIRST, WINDOW)]
    return exp(sum(losses) / len(losses))


def by_llama_cpp(file: Path, texts: list[list[int]], vocabulary: int) -> float:
    """Perplexity by llama.cpp: of its likeliest tokens where the next is one of them, else of all."""
    losses = []
    with LlamaCpp(file, usable_cores()) as runtime:
        for ids in texts:
            for place in range(FIRST, WINDOW):
                found = runtime.next_tokens(ids[:place], 500)
                if ids[place] not in found:
                    found = runtime.next_tokens(ids[:place], vocabulary)
                losses.append(-found[ids[place]])
    return exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("/tmp/benchmark_gguf"))
    parser.add_argument("--positions", type=int, default=320)
    parser.add_argument("--algorithms", nargs="+", default=["rtn", "gptq"])
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    source = models.prepare("SmolLM2-135M", asked.folder / "SmolLM2-135M")
    calibration, held_out = prose_halves(asked.folder)
    texts = windows(source, held_out, asked.positions)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    print(f"{len(texts) * (WINDOW - FIRST)} tokens; fp32 by torch: {by_torch(source, texts):.3f}", flush=True)
    for algorithm in asked.algorithms:
        data = {} if algorithm == "rtn" else {"data": calibration, "samples": 32, "seq_len": 128}
        packed, repacked, direct = (asked.folder / f"{algorithm}{end}" for end in ("", ".repacked.gguf", ".gguf"))
        wishes = {"scheme": "int4", "group_size": 32, "algorithm": algorithm, "verify": "codes", "force": True, **data}
        quantcli.convert(source, packed, rest="fp16", **wishes)
        quantcli.convert(packed, repacked, format="gguf", verify="codes", force=True)
        quantcli.convert(source, direct, format="gguf", **wishes)
        torch_, llama = by_torch(packed, texts), by_llama_cpp(repacked, texts, vocabulary)
        sizes = [sum(file.stat().st_size for file in packed.glob("*.safetensors"))]
        sizes += [path.stat().st_size for path in (repacked, direct)]
        print(
            f"{algorithm}: compressed-tensors {sizes[0] / 1e6:.1f} MB, by torch {torch_:.3f}; the same codes in GGUF "
            f"{sizes[1] / 1e6:.1f} MB, by llama.cpp {llama:.3f} ({llama / torch_ - 1:+.2%}); GGUF with an 8-bit table "
            f"of tokens {sizes[2] / 1e6:.1f} MB, by llama.cpp {by_llama_cpp(direct, texts, vocabulary):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
