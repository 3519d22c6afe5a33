"""The options of the command line, each with its help: commands name them, and say what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

# What a command reads.
Model = Annotated[
    Path,
    typer.Argument(
        help="A Hugging Face folder, .safetensors, .index.json, .pt, .pth, .bin, .onnx, .pt2, or "
        "package.module:function.",
        show_default=False,
    ),
]
RunnableModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The reference: a Hugging Face folder, .onnx, .pt2, or package.module:function.",
        show_default=False,
    ),
]
Candidates = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="[CANDIDATE]...", help="Models to compare with it.", show_default=False),
]
Data = Annotated[
    Optional[str],
    typer.Option(
        "--data",
        metavar="DATA",
        help="Text (.txt, .jsonl, .parquet), arrays (.npz, .npy), an image folder, or package.module:function.",
    ),
]
Tokenizer = Annotated[
    Optional[Path], typer.Option("--tokenizer", metavar="FOLDER", help="Where the tokenizer is, if not with MODEL.")
]
Preprocess = Annotated[
    Optional[Path], typer.Option("--preprocess", metavar="FILE", help="How images become inputs: a YAML or JSON file.")
]
Weights = Annotated[
    Optional[Path],
    typer.Option("--weights", metavar="FILE", help="A state dict for the module of a package.module:function."),
]
Statistics = Annotated[
    Optional[Path],
    typer.Option("--calibration", metavar="STATS", help="Ranges from quantcli calibrate, for int8-static."),
]
Method = Annotated[
    str,
    typer.Option(
        "--method", metavar="M", help="How ranges are chosen: minmax, percentile, entropy or mse.", show_default=True
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="B", min=1, help="Samples per run.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="What images are chosen by.")]
Samples = Annotated[Optional[int], typer.Option("--samples", metavar="N", min=1, help="Samples at the most.")]
SeqLen = Annotated[Optional[int], typer.Option("--seq-len", metavar="L", min=2, help="Tokens per sequence.")]
BatchSizes = Annotated[
    Optional[list[int]],
    typer.Option("--batch-size", metavar="B", min=1, help="Samples per run; may be repeated. By default 1."),
]
Runs = Annotated[
    Optional[int],
    typer.Option("--runs", metavar="N", min=1, help="Rounds; by default about 3 s per model, at least 20."),
]
Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="T",
        help="auto, classification, language-modeling, embedding, fidelity, or package.module:function.",
    ),
]
ByLayer = Annotated[bool, typer.Option("--by-layer", help="Also compare every layer's output.")]

# How a model is converted.
Scheme = Annotated[
    Optional[str],
    typer.Option(
        "--scheme", "-s", metavar="S", help="fp16, bf16, int8, int4, nf4, nf4-double, int8-dynamic or int8-static."
    ),
]
Schemes = Annotated[
    Optional[list[str]], typer.Option("--scheme", "-s", metavar="S", help="Plan for this scheme; may be repeated.")
]
Format = Annotated[
    Optional[str],
    typer.Option(
        "--format",
        metavar="F",
        help="compressed-tensors, gptq, awq, bitsandbytes, safetensors or onnx; by default what fits model and scheme.",
    ),
]
Algorithm = Annotated[
    Optional[str],
    typer.Option(
        "--algorithm",
        metavar="A",
        help="auto, rtn or mse; with --data also gptq, awq, autoround, smoothquant, qat. A recipe chains them.",
    ),
]
RecipeFile = Annotated[Optional[Path], typer.Option("--recipe", metavar="FILE", help="A YAML file of rules per layer.")]
GroupSize = Annotated[
    Optional[int], typer.Option("--group-size", metavar="N", min=1, help="Values that share a scale.")
]
Skip = Annotated[
    Optional[list[str]],
    typer.Option("--skip", metavar="GLOB", help="Layers to leave as they are; may be repeated."),
]
Rest = Annotated[
    Optional[str], typer.Option("--rest", metavar="KIND", help="keep, fp16 or bf16: what becomes of the rest.")
]
Target = Annotated[
    Optional[str],
    typer.Option("--target", metavar="RUNTIME", help="transformers, vllm, sglang or onnxruntime; also with ==VERSION."),
]

# Limits.
Device = Annotated[
    str, typer.Option("--device", metavar="D", help="Where models are calibrated and trained: cpu or cuda.")
]
Threads = Annotated[Optional[int], typer.Option("--threads", metavar="N", min=1, help="Worker threads.")]
MaxMemory = Annotated[
    Optional[str], typer.Option("--max-memory", metavar="BYTES", help="Memory not to be exceeded, such as 700MB.")
]

# What a command writes.
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="What to write.", show_default=False)]
StatsOutput = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="STATS", help="The .safetensors file to write.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan and report; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
ListLayers = Annotated[bool, typer.Option("--layers", help="List every tensor.")]
Require = Annotated[
    Optional[list[str]],
    typer.Option("--require", metavar="EXPR", help='A gate such as "kl_nats <= 0.05"; may be repeated.'),
]
Markdown = Annotated[
    Optional[Path], typer.Option("--markdown", metavar="FILE", help="Also write the report as Markdown.")
]
Html = Annotated[
    Optional[Path],
    typer.Option("--html", metavar="FILE", help="Also write the report as one HTML page, with the curve of training."),
]
Junit = Annotated[Optional[Path], typer.Option("--junit", metavar="FILE", help="Also write the gates as JUnit XML.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, hints or warnings on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
