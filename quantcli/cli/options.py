"""The options of the command line, each with its group and help: commands name them, and say what to do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from quantcli.cli.choices import CHOICES
from quantcli.cli.help import BUDGET, MODEL, REPORTS, WORK, WRITE


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False, rich_help_panel=MODEL)


def _option(group: str) -> Callable[..., Any]:
    """What makes options of a group: their names, what their value is called, and their help."""

    def option(*names: str, metavar: str | None = None, text: str, choices: str | None = None, **more: Any) -> Any:
        complete = None if choices is None else _completion(choices)
        return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=group, autocompletion=complete, **more)

    return option


def _completion(parameter: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in CHOICES[parameter]() if name.startswith(incomplete)]

    return complete


_model, _write, _budget, _work, _reports = map(_option, (MODEL, WRITE, BUDGET, WORK, REPORTS))

# Model and data.
Model = Annotated[
    Path,
    _argument(
        "MODEL",
        "A Hugging Face folder, .safetensors, .index.json, .pt, .pth, .bin, .ckpt, .onnx, .gguf, .pt2, "
        "or package.module:function.",
    ),
]
RunnableModel = Annotated[
    str, _argument("MODEL", "The reference: a Hugging Face folder, .onnx, .pt2, or package.module:function.")
]
Candidates = Annotated[Optional[list[str]], _argument("[CANDIDATE]...", "Models to compare with it.")]
Data = Annotated[
    Optional[str],
    _model(
        "--data",
        metavar="DATA",
        text="Text (.txt, .jsonl, .parquet), arrays (.npz, .npy), a folder of images or sounds, a .jsonl that names "
        "such files, or package.module:function.",
    ),
]
Samples = Annotated[Optional[int], _model("--samples", metavar="N", min=1, text="Samples at the most.")]
SeqLen = Annotated[Optional[int], _model("--seq-len", metavar="L", min=2, text="Tokens per sequence.")]
Seed = Annotated[int, _model("--seed", metavar="N", min=0, text="What images are chosen by.")]
Tokenizer = Annotated[
    Optional[Path], _model("--tokenizer", metavar="FOLDER", text="Where the tokenizer is, if not with MODEL.")
]
Preprocess = Annotated[
    Optional[Path], _model("--preprocess", metavar="FILE", text="How images become inputs: a YAML or JSON file.")
]
Weights = Annotated[
    Optional[Path],
    _model("--weights", metavar="FILE", text="A state dict for the module of a package.module:function."),
]
CustomOps = Annotated[
    Optional[list[Path]],
    _model("--custom-ops", metavar="FILE", text="A library of custom operators for onnxruntime; may be repeated."),
]
Statistics = Annotated[
    Optional[Path],
    _model("--calibration", metavar="STATS", text="Ranges from quantcli calibrate, for int8-static."),
]

# What to write.
Output = Annotated[Path, _write("--output", "-o", metavar="OUT", text="What to write.", show_default=False)]
StatsOutput = Annotated[
    Path, _write("--output", "-o", metavar="STATS", text="The .safetensors file to write.", show_default=False)
]
Scheme = Annotated[
    Optional[str], _write("--scheme", "-s", metavar="S", choices="scheme", text="How numbers are stored: {choices}.")
]
Format = Annotated[
    Optional[str],
    _write(
        "--format",
        metavar="F",
        choices="format",
        text="The container: {choices}; by default what fits model and scheme.",
    ),
]
Algorithm = Annotated[
    Optional[str],
    _write(
        "--algorithm",
        metavar="A",
        choices="algorithm",
        text="How codes are chosen: {choices}. Most need --data. A recipe chains them.",
    ),
]
RecipeFile = Annotated[Optional[Path], _write("--recipe", metavar="FILE", text="A YAML file of rules per layer.")]
GroupSize = Annotated[Optional[int], _write("--group-size", metavar="N", min=1, text="Values that share a scale.")]
Skip = Annotated[
    Optional[list[str]], _write("--skip", metavar="GLOB", text="Layers to leave as they are; may be repeated.")
]
Rest = Annotated[
    Optional[str],
    _write("--rest", metavar="KIND", choices="rest", text="What becomes of tensors that are not quantized: {choices}."),
]
Target = Annotated[
    Optional[str],
    _write(
        "--target",
        metavar="RUNTIME",
        choices="target",
        text="What is to load it: {choices}; also with ==VERSION.",
    ),
]
Verify = Annotated[
    Optional[str],
    _work(
        "--verify",
        metavar="HOW",
        choices="verify",
        text="How transformers proves a checkpoint: {choices}; by default run where memory allows.",
    ),
]
# What is needed, in place of how to get it.
MaxSize = Annotated[
    Optional[str], _budget("--max-size", metavar="BYTES", text="All files of the artifact together, such as 80MB.")
]
MaxDrop = Annotated[
    Optional[float], _budget("--max-drop", metavar="X", text="What the metric may lose, in its unit, with confidence.")
]
Metric = Annotated[
    Optional[str], _budget("--metric", metavar="M", text="The metric of --max-drop; by default the data's own.")
]
EvalData = Annotated[
    Optional[str],
    _budget(
        "--eval-data", metavar="DATA", text="What decides; by default a part of --data that the search does not see."
    ),
]
MaxKl = Annotated[
    Optional[float], _budget("--max-kl", metavar="X", text="Nats that the outputs may diverge by, with confidence.")
]
MaxLatency = Annotated[
    Optional[str], _budget("--max-latency-p50", metavar="MS", text="The median of a run on this machine, as 5ms; ONNX.")
]
Allow = Annotated[
    Optional[str],
    _budget("--allow", metavar="S,S,...", text="Schemes to choose from; float is a layer that stays as it is."),
]
Sensitivity = Annotated[
    Optional[Path],
    _budget("--sensitivity", metavar="FILE", text="Keeps what is learned of the model: the next budget is quick."),
]
SearchTime = Annotated[
    Optional[str], _budget("--search-time", metavar="TIME", text="The most a search may take, such as 10m.")
]
Pareto = Annotated[
    Optional[Path],
    _budget("--pareto", metavar="FILE", text="Also write size against loss: FILE as JSON, beside it .md and .svg."),
]
DryRun = Annotated[bool, _write("--dry-run", text="Plan and report; write nothing.")]
AllowLarger = Annotated[bool, _write("--allow-larger", text="Keep an ONNX artifact no smaller than its model.")]
Force = Annotated[bool, _write("--force", text="Replace an existing output.")]

# How to work.
Schemes = Annotated[
    Optional[list[str]],
    _work("--scheme", "-s", metavar="S", choices="scheme", text="Plan for this scheme: {choices}; may be repeated."),
]
Method = Annotated[
    Optional[str],
    _work("--method", metavar="M", choices="method", text="How ranges are chosen: {choices}; by default the first."),
]
BatchSize = Annotated[int, _work("--batch-size", metavar="B", min=1, text="Samples per run.")]
BatchSizes = Annotated[
    Optional[list[int]],
    _work("--batch-size", metavar="B", min=1, text="Samples per run; may be repeated. By default 1."),
]
Runs = Annotated[
    Optional[int],
    _work("--runs", metavar="N", min=1, text="Rounds; by default about 3 s per model, at least 20."),
]
Task = Annotated[
    str, _work("--task", metavar="T", choices="task", text="What is measured: {choices}, or package.module:function.")
]
ByLayer = Annotated[bool, _work("--by-layer", text="Also compare every layer's output.")]
Device = Annotated[
    str,
    _work("--device", metavar="D", choices="device", text="Where models are calibrated and trained: {choices}."),
]
Threads = Annotated[Optional[int], _work("--threads", metavar="N", min=1, text="Worker threads.")]
MaxMemory = Annotated[
    Optional[str], _work("--max-memory", metavar="BYTES", text="Memory not to be exceeded, such as 700MB.")
]

# Reports.
ListLayers = Annotated[bool, _reports("--layers", text="Also list the tensors, alike ones in one row.")]
Require = Annotated[
    Optional[list[str]],
    _reports("--require", metavar="EXPR", text='A gate such as "size_ratio <= 0.5"; may be repeated.'),
]
Baseline = Annotated[
    Optional[Path],
    _reports("--baseline", metavar="REPORT", text="An earlier --json report that gates measure drops and ratios from."),
]
AsJson = Annotated[bool, _reports("--json", text="Print one JSON document instead of tables.")]
Markdown = Annotated[Optional[Path], _reports("--markdown", metavar="FILE", text="Also write the report as Markdown.")]
Html = Annotated[
    Optional[Path],
    _reports("--html", metavar="FILE", text="Also write the report as one HTML page, with plots."),
]
Junit = Annotated[Optional[Path], _reports("--junit", metavar="FILE", text="Also write the gates as JUnit XML.")]
Quiet = Annotated[bool, _reports("--quiet", "-q", text="No progress, hints or warnings on stderr.")]
Debug = Annotated[bool, _reports("--debug", text="Show the traceback of an error.")]
