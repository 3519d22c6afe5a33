"""The same codes in compressed-tensors (torch) and in GGUF (llama.cpp): bytes, and perplexity by either runtime.

Run: .venv/bin/python tests/benchmarks/benchmark_gguf.py [rtn] [gptq]     (both by default)

SmolLM2-135M becomes int4 in groups of 32 once, in compressed-tensors; its codes go to GGUF as they are. Another file is
made directly, with the table of tokens in 8 bits. Both runtimes are asked for the same tokens of the same held-out
text, which is no part of what gptq sees.
"""

from __future__ import annotations

import json
from functools import partial
from math import exp
from pathlib import Path

import torch
from harness import line, main, show
from models import prepare
from support.real_models import prose_halves

from quantcli import convert
from quantcli.conversion.checkpoint.llama_cpp import LlamaCpp
from quantcli.models.hugging_face import load_model, load_tokenizer
from quantcli.system.parallel import usable_cores

#: Tokens of a window, the first that is scored, and tokens that are scored in all.
WINDOW, FIRST, POSITIONS = 80, 16, 320
#: By how much the perplexities of two runtimes on the same codes may differ.
SAME = 0.005


def windows(folder: Path, text: Path) -> list[list[int]]:
    """Stretches of held-out text, spread over it, with so many scored tokens in all."""
    ids = load_tokenizer(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    count = POSITIONS // (WINDOW - FIRST)
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


def compare(algorithm: str, folder: Path) -> None:
    """Bytes and perplexities of one algorithm's codes."""
    source = prepare("SmolLM2-135M", folder / "SmolLM2-135M")
    calibration, held_out = prose_halves(folder)
    texts = windows(source, held_out)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    data = {} if algorithm == "rtn" else {"data": calibration, "samples": 32, "seq_len": 128}
    packed, repacked, direct = (folder / name for name in ("packed", "repacked.gguf", "direct.gguf"))
    wishes = {"scheme": "int4", "group_size": 32, "algorithm": algorithm, "verify": "codes", **data}
    convert(source, packed, rest="fp16", **wishes)
    convert(packed, repacked, format="gguf", verify="codes")
    convert(source, direct, format="gguf", **wishes)
    show("fp32, by torch: perplexity", f"{by_torch(source, texts):.3f}")
    by_loader, by_runtime = by_torch(packed, texts), by_llama_cpp(repacked, texts, vocabulary)
    size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    show("compressed-tensors, by torch: perplexity", f"{by_loader:.3f}")
    show("  bytes", f"{size / 1e6:.1f} MB")
    difference = by_runtime / by_loader - 1
    show("the same codes in GGUF, by llama.cpp: perplexity", f"{by_runtime:.3f}")
    line("  beside torch", f"{difference:+.2%}", f"within {SAME:.1%}", abs(difference) <= SAME)
    show("  bytes", f"{repacked.stat().st_size / 1e6:.1f} MB")
    show("GGUF with 8 bits for tokens, by llama.cpp: perplexity", f"{by_llama_cpp(direct, texts, vocabulary):.3f}")
    show("  bytes", f"{direct.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parts = {name: (partial(compare, name), "SmolLM2-135M, held-out English prose") for name in ("rtn", "gptq")}
    main(__doc__, parts)
