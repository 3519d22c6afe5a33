"""quantcli and its peers on the same model and data, each in an environment of its own, in one run.

Run: .venv/bin/python tests/benchmarks/benchmark_peers.py [startup] [checkpoint] [graph] [decoder]     (all by default)

startup     a program that does nothing but start: `--help`, or the import of a library
checkpoint  SmolLM2-135M without data: INT4 in groups of 64 by llm-compressor and AutoRound (no iterations), NF4 by
            bitsandbytes
graph       all-MiniLM-L6-v2 in ONNX: int8-dynamic and int8-static beside onnxruntime's quantizers
decoder     SmolLM2-135M in INT4 for onnxruntime-genai, beside its own builder

Seconds by the clock and of all cores together, and peak memory, are those of a whole program, from its start to its
end, with two threads. Perplexity is by `quantcli eval`, which reads all these artifacts, on prose that nobody was
calibrated on; cosines are by onnxruntime and numpy. All figures are printed as Markdown, and kept as JSON in
.benchmark-cache (or in the folder that QUANTCLI_BENCHMARK_CACHE names), where the environments are, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peers
import scoring
from benchmark_algorithms import CACHE, THREADS
from harness import COMMAND, commit, machine, main
from support import real_models

GROUP_SIZE, SAMPLES, TOKENS = 64, 24, 512
#: A column of the table, by what it is called in JSON.
COLUMNS = {
    "wall_seconds": ("time", "{:.1f} s"),
    "cpu_seconds": ("CPU time", "{:.1f} s"),
    "peak_bytes": ("peak memory", "{:.2e} B"),
    "size_bytes": ("artifact", "{:.2e} B"),
    "perplexity": ("perplexity", "{:.2f}"),
    "cosine": ("cosine", "{:.4f}"),
    "latency_ms": ("latency", "{:.2f} ms"),
}

_LLM_COMPRESSOR = """
import sys
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

source, output, group_size = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int(group_size))
groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
model.save_pretrained(output, save_compressed=True)
AutoTokenizer.from_pretrained(source).save_pretrained(output)
"""

_AUTO_ROUND = """
import sys
from auto_round import AutoRound

source, output, group_size = sys.argv[1:]
rounder = AutoRound(source, bits=4, group_size=int(group_size), sym=True, iters=0, disable_opt_rtn=True)
rounder.quantize_and_save(output, format="auto_gptq")
"""

_BITSANDBYTES = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

source, output = sys.argv[1:]
asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=asked, device_map="cpu", dtype="auto")
model.save_pretrained(output)
AutoTokenizer.from_pretrained(source).save_pretrained(output)
"""

_THEIRS = """
import sys
sys.path[:0] = [{here!r}, {tests!r}]
from pathlib import Path
import theirs
from support import real_models

model, output, checkpoint, text = map(Path, sys.argv[1:])
if {kind!r} == "dynamic":
    theirs.dynamic(model, output)
else:
    samples = real_models.sentences(text, model, checkpoint, {count})
    theirs.static(theirs.prepared(model, output.parent, symbolic=False), output, samples)
"""


def program(folder: Path, name: str, command: Sequence[object], artifact: Path | None) -> dict[str, Any]:
    """What a program takes, and what it leaves."""
    cost = peers.measured(command, folder / f"{name.replace(' ', '-')}.log", threads=THREADS)
    files = [artifact] if artifact and artifact.is_file() else [*artifact.rglob("*")] if artifact else []
    size = sum(file.stat().st_size for file in files if file.is_file())
    return {"name": name, **vars(cost)} | ({"size_bytes": size} if artifact else {})


def converted(model: Path, output: Path, *flags: object) -> list[object]:
    """The command line of a conversion by quantcli, every check included."""
    return [COMMAND, "convert", model, "-o", output, "--threads", THREADS, "-q", *flags]


def scored(model: Path, rows: list[dict[str, Any]], folders: Sequence[Path], text: Path) -> list[dict[str, Any]]:
    """The rows with the perplexity of each artifact, behind a row for the original."""
    command = [COMMAND, "eval", model, *folders, "--data", text, "--samples", SAMPLES, "--seq-len", TOKENS, "--json"]
    report = json.loads(subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout)
    original, *others = report["models"]
    for row, found in zip(rows, others, strict=True):
        row["perplexity"] = found["metrics"]["perplexity"]
    before = {"name": "the model", "size_bytes": original["size_bytes"]}
    return [before | {"perplexity": original["metrics"]["perplexity"]}, *rows]


def startup(folder: Path) -> list[dict[str, Any]]:
    """Each once to fill the caches, then measured."""
    commands = {
        "quantcli --help": [COMMAND, "--help"],
        "onnxruntime.quantization": [sys.executable, "-c", "import onnxruntime.quantization"],
        "bitsandbytes": [sys.executable, "-c", "import bitsandbytes"],
        "llm-compressor": [peers.environment("llm-compressor", CACHE), "-c", "import llmcompressor"],
        "auto-round": [peers.environment("auto-round", CACHE), "-c", "import auto_round"],
    }
    rows = []
    for name, command in commands.items():
        program(folder, name, command, None)
        rows.append(program(folder, name, command, None))
    return rows


def checkpoint(folder: Path) -> list[dict[str, Any]]:
    """Weights alone, rounded to nearest; quantcli's own default for four bits is listed, too."""
    import models

    model = models.prepare("SmolLM2-135M", folder / "SmolLM2-135M")
    _, text = real_models.prose_halves(folder)
    four = ["--scheme", "int4", "--group-size", GROUP_SIZE]
    llm_compressor, auto_round = (peers.environment(name, CACHE) for name in ("llm-compressor", "auto-round"))
    commands: dict[str, Callable[[Path], list[object]]] = {
        "quantcli, int4, rtn": lambda out: converted(model, out, *four, "--algorithm", "rtn"),
        "quantcli, int4, mse": lambda out: converted(model, out, *four),
        "llm-compressor, W4A16": lambda out: [llm_compressor, "-c", _LLM_COMPRESSOR, model, out, GROUP_SIZE],
        "AutoRound, rtn": lambda out: [auto_round, "-c", _AUTO_ROUND, model, out, GROUP_SIZE],
        "quantcli, nf4": lambda out: converted(model, out, "--scheme", "nf4"),
        "bitsandbytes, nf4": lambda out: [sys.executable, "-c", _BITSANDBYTES, model, out],
    }
    places = [folder / name.replace(", ", "-").replace(" ", "-") for name in commands]
    rows = [
        program(folder, name, command(place), place)
        for (name, command), place in zip(commands.items(), places, strict=True)
    ]
    return scored(model, rows, [_weights_in(place) for place in places], text)


def _weights_in(place: Path) -> Path:
    """The folder with the weights: AutoRound names one inside the folder that it is given."""
    return next(iter(sorted(place.rglob("config.json")))).parent


def graph(folder: Path) -> list[dict[str, Any]]:
    """Inputs of eight bits; ranges of the static ones from the same sentences."""
    model, source = real_models.minilm(folder)
    calibration, test = real_models.prose_halves(folder)
    samples = real_models.sentences(test, model, source, SAMPLES)
    data = ["--data", calibration, "--tokenizer", source, "--samples", 64, "--seq-len", real_models.LENGTH]
    here = Path(__file__).parent
    rows = [{"name": "the model", "size_bytes": model.stat().st_size}]
    paths = []
    for kind, more in (("dynamic", []), ("static", data)):
        mine, other = folder / f"quantcli-{kind}.onnx", folder / f"onnxruntime-{kind}.onnx"
        code = _THEIRS.format(here=str(here), tests=str(here.parent), kind=kind, count=64)
        ours = converted(model, mine, "--scheme", f"int8-{kind}", *more)
        rows.append(program(folder, f"quantcli, int8-{kind}", ours, mine))
        theirs = [sys.executable, "-c", code, model, other, source, calibration]
        rows.append(program(folder, f"onnxruntime, quantize_{kind}", theirs, other))
        paths += [mine, other]
    expected = scoring.outputs(model, samples)
    for row, path in zip(rows[1:], paths, strict=True):
        row["cosine"] = scoring.cosine(expected, scoring.outputs(path, samples))
    command = [COMMAND, "bench", model, *paths, "--threads", 1, "--json", "--seq-len", real_models.LENGTH]
    report = json.loads(subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout)
    for row, found in zip(rows, report["models"], strict=True):
        row["latency_ms"] = found["metrics"]["latency_ms_p50"]
    return rows


def decoder(folder: Path) -> list[dict[str, Any]]:
    """Blocks of 32, rounded to nearest, the head in four bits, as the builder makes it."""
    import models

    model = models.prepare("SmolLM2-135M", folder / "SmolLM2-135M")
    _, text = real_models.prose_halves(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "scheme: int4\ngroup_size: 32\ntarget: onnxruntime-genai\nrules: [{match: model.embed_tokens, scheme: int4}]\n",
        encoding="utf-8",
    )
    mine, other = folder / "quantcli-decoder", folder / "builder"
    build = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        model,
        "-o",
        other,
        "-p",
        "int4",
        "-e",
        "cpu",
    ]
    rows = [
        program(folder, "quantcli", converted(model, mine, "--recipe", recipe), mine),
        program(folder, "onnxruntime-genai's builder", build, other),
    ]
    return scored(model, rows, [mine, other], text)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown, with the columns that any of them has."""
    used = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [["", *(COLUMNS[name][0] for name in used)], ["---"] * (1 + len(used))]
    for row in rows:
        lines.append([row["name"], *(COLUMNS[name][1].format(row[name]) if name in row else "" for name in used)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def kept(part: Callable[[Path], list[dict[str, Any]]]) -> Callable[[Path], None]:
    """A part that prints its table, and keeps its figures beside those of the others."""

    def run(folder: Path) -> None:
        rows = part(folder)
        print(table(rows), flush=True)
        file = CACHE / "peers.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        found[part.__name__] = {
            "commit": commit(), "machine": machine(), "requirements": peers.REQUIREMENTS, "rows": rows,
        }  # fmt: skip
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")

    return run


if __name__ == "__main__":
    main(
        __doc__,
        {
            "startup": (kept(startup), "programs that start and end"),
            "checkpoint": (kept(checkpoint), "SmolLM2-135M in four bits, without data"),
            "graph": (kept(graph), "all-MiniLM-L6-v2 in eight bits"),
            "decoder": (kept(decoder), "SmolLM2-135M in four bits for onnxruntime-genai"),
        },
    )
