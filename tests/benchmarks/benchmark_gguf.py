"""The same codes in compressed-tensors (torch), ONNX (onnxruntime) and GGUF (llama.cpp): bytes and perplexities.

Run: .venv/bin/python tests/benchmarks/benchmark_gguf.py [rtn] [gptq]     (both by default)

SmolLM2-135M becomes int4 in groups of 32 once, in compressed-tensors; its codes go to an ONNX decoder and to GGUF as
they are. Another GGUF file is made directly, with the table of tokens in 8 bits. All runtimes are asked for the same
tokens of the same held-out text, which is no part of what gptq sees.

They do not compute alike. torch decodes the codes and multiplies in float32. onnxruntime rounds the inputs of products
to int8 in groups as long as those of the weights (accuracy_level 4, which a decoder is written with), so that the same
graph is run without that as well. llama.cpp rounds them to int8 in groups of 32 (Q8_0), and keeps its cache in FP16.
"""

from __future__ import annotations

import json
from functools import partial
from math import exp
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from harness import line, main, show
from models import prepare
from support.decoders import without_rounding
from support.real_models import prose_halves

from quantcli import convert
from quantcli.conversion.checkpoint.llama_cpp import LlamaCpp
from quantcli.models.hugging_face import load_model, load_tokenizer
from quantcli.system.parallel import usable_cores

#: Windows of text, tokens of each, and the first of these that is scored.
WINDOWS, LENGTH, FIRST = 10, 512, 16
#: By how much the perplexities of two runtimes on the same codes may differ.
SAME = 0.005


def windows(folder: Path, text: Path) -> list[list[int]]:
    """Stretches of held-out text, spread over it."""
    ids = load_tokenizer(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    step = (len(ids) - LENGTH) // WINDOWS
    return [ids[place * step : place * step + LENGTH] for place in range(WINDOWS)]


def perplexity(log_probabilities: list[float]) -> float:
    """Of the tokens that have these, in nats."""
    return exp(-sum(log_probabilities) / len(log_probabilities))


def scored(logits: torch.Tensor, ids: list[int]) -> list[float]:
    """Log-probabilities of a window's scored tokens, by logits ``[tokens, vocabulary]``."""
    found = logits[FIRST - 1 : -1].float().log_softmax(-1)
    return found.gather(-1, torch.tensor(ids[FIRST:])[:, None])[:, 0].tolist()


def by_torch(folder: Path, texts: list[list[int]]) -> float:
    """Perplexity by transformers."""
    model = load_model(folder, causal=True)
    with torch.inference_mode():
        return perplexity([each for ids in texts for each in scored(model(torch.tensor([ids])).logits[0], ids)])


def by_onnxruntime(folder: Path, texts: list[list[int]]) -> float:
    """Perplexity by onnxruntime, of a decoder whose cache is empty before each window."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = {each.name: each.shape for each in session.get_inputs() if each.name.startswith("past_key_values")}
    empty = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
    found = []
    for ids in texts:
        tokens = np.array([ids], np.int64)
        (logits,) = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **empty})
        found += scored(torch.from_numpy(logits[0]), ids)
    return perplexity(found)


def by_llama_cpp(file: Path, texts: list[list[int]], vocabulary: int) -> float:
    """Perplexity by llama.cpp: of its likeliest tokens where the next is one of them, else of all."""
    logs = []
    with LlamaCpp(file, usable_cores(), context=2 * LENGTH) as runtime:
        for ids in texts:
            for place in range(FIRST, LENGTH):
                found = runtime.next_tokens(ids[:place], 500)
                if ids[place] not in found:
                    found = runtime.next_tokens(ids[:place], vocabulary)
                logs.append(found[ids[place]])
    return perplexity(logs)


def size(folder: Path, pattern: str) -> str:
    """Megabytes of a folder's files."""
    return f"{sum(file.stat().st_size for file in folder.glob(pattern)) / 1e6:.1f} MB"


def compare(algorithm: str, folder: Path) -> None:
    """Bytes and perplexities of one algorithm's codes."""
    source = prepare("SmolLM2-135M", folder / "SmolLM2-135M")
    calibration, held_out = prose_halves(folder)
    texts = windows(source, held_out)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    data = {} if algorithm == "rtn" else {"data": calibration, "samples": 32, "seq_len": 128}
    packed, decoder, exact = (folder / name for name in ("packed", "decoder", "exact"))
    repacked, direct = folder / "repacked.gguf", folder / "direct.gguf"
    wishes = {"scheme": "int4", "group_size": 32, "algorithm": algorithm, "verify": "codes", **data}
    convert(source, packed, rest="fp16", **wishes)
    convert(packed, decoder, format="onnx")
    convert(packed, repacked, format="gguf", verify="codes")
    convert(source, direct, format="gguf", **wishes)
    show("fp32, by torch: perplexity", f"{by_torch(source, texts):.3f}")
    loaded = by_torch(packed, texts)
    show("compressed-tensors, by torch: perplexity", f"{loaded:.3f}")
    show("  bytes", size(packed, "*.safetensors"))
    perplexities = [loaded]

    def beside(runtime: str, found: float) -> None:
        show(f"the same codes in {runtime}: perplexity", f"{found:.3f}")
        difference = found / loaded - 1
        line("  beside torch", f"{difference:+.2%}", f"within {SAME:.1%}", abs(difference) <= SAME)
        perplexities.append(found)

    beside("ONNX, by onnxruntime", by_onnxruntime(decoder, texts))
    show("  bytes", size(decoder, "model.onnx*"))
    beside("ONNX, inputs not rounded", by_onnxruntime(without_rounding(decoder, exact), texts))
    beside("GGUF, by llama.cpp", by_llama_cpp(repacked, texts, vocabulary))
    show("  bytes", size(folder, repacked.name))
    spread = max(perplexities) / min(perplexities) - 1
    line("the largest beside the smallest of these", f"{spread:+.2%}", f"within {SAME:.1%}", spread <= SAME)
    show("GGUF with 8 bits for tokens, by llama.cpp: perplexity", f"{by_llama_cpp(direct, texts, vocabulary):.3f}")
    show("  bytes", size(folder, direct.name))


if __name__ == "__main__":
    parts = {name: (partial(compare, name), "SmolLM2-135M, held-out English prose") for name in ("rtn", "gptq")}
    main(__doc__, parts)
