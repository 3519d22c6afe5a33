"""`eval`: a reference and its candidates on the same samples, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcli import models
from quantcli.checkpoints.folder import Checkpoint, open_checkpoint
from quantcli.data import load_texts, spread, token_windows
from quantcli.errors import InputError, UsageError
from quantcli.gates import apply_gates, parse_gates
from quantcli.layerwise import LayerComparison
from quantcli.metrics import Divergence, Fidelity, Mean, Perplexity, cosine
from quantcli.plugins import suggestion
from quantcli.report import ModelRow, Report
from quantcli.roles import original_dtype, quantization_of
from quantcli.scheme import NUMBER_OF_DTYPE

TASKS = ("auto", "language-modeling", "embedding", "fidelity")
_REFERENCE_METRICS = {"language-modeling": ("perplexity", "perplexity_se"), "embedding": (), "fidelity": ()}
_CANDIDATE_METRICS = {
    "language-modeling": ("kl_nats", "kl_nats_se", "top1_agreement", "top1_agreement_se"),
    "embedding": ("cosine", "cosine_se", "cosine_min"),
    "fidelity": ("sqnr_db", "cosine", "cosine_se", "kl_nats", "kl_nats_se", "argmax_agreement", "argmax_agreement_se"),
}
_DEFAULT_SAMPLES = {"language-modeling": 64, "embedding": 256, "fidelity": 64}
_DEFAULT_LENGTH = 512
#: Per-layer comparison keeps every layer's output of one sample, so samples are short.
LAYERWISE_SAMPLES, LAYERWISE_LENGTH = 8, 128

Progress = Callable[[int, int], None]


def evaluate(
    model: str | Path,
    candidates: Sequence[str | Path] = (),
    *,
    data: str | Path,
    task: str = "auto",
    samples: int | None = None,
    seq_len: int | None = None,
    tokenizer: str | Path | None = None,
    by_layer: bool = False,
    require: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Measure a reference model and compare candidates with it, on text.

    Args:
        model: the reference, a Hugging Face folder.
        candidates: folders to compare with it.
        data: a ``.txt``, ``.jsonl`` or ``.parquet`` file.
        task: ``language-modeling``, ``embedding``, ``fidelity``, or ``auto`` to tell from the model.
        samples: how many sequences at the most; they are spread evenly over the data.
        seq_len: tokens per sequence.
        tokenizer: a folder with the tokenizer, where the reference has none.
        by_layer: also compare every layer's output.
        require: gates such as ``"kl_nats <= 0.05"``.
        progress: called with samples done and samples in all.

    Returns:
        The report; its ``passed`` says whether every gate holds.

    Raises:
        UsageError: an unknown task or metric.
        InputError: a model or the data is missing or unsuitable, or a package is not installed.
    """
    reference = Path(model)
    others = [Path(candidate) for candidate in candidates]
    if task not in TASKS:
        raise UsageError(f"Unknown task {task!r}.", suggestion(task, TASKS))
    causal = models.is_causal(reference)
    if task == "auto":
        task = "language-modeling" if causal else "embedding"
    known = [*_REFERENCE_METRICS[task], *(_CANDIDATE_METRICS[task] if others else ()), "size_ratio", "size_bytes"]
    gates = parse_gates(require, known)
    checkpoints = [open_checkpoint(path) for path in (reference, *others)]
    causal = causal if task == "fidelity" else task == "language-modeling"
    length = seq_len or min(_DEFAULT_LENGTH, models.longest_sequence(reference))
    inputs = _samples(task, Path(data), Path(tokenizer or reference), samples, length)
    scores = [_Score(task, models.pooling_of(reference)) for _ in checkpoints]
    comparisons = [LayerComparison() for _ in others] if by_layer else []
    tracker = _Counter(progress, len(inputs))
    for group in _groups(checkpoints):
        _run([reference, *others], group, causal, inputs, scores, comparisons, tracker)
    rows = [
        _model_row(checkpoint, index, score)
        for index, (checkpoint, score) in enumerate(zip(checkpoints, scores, strict=True))
    ]
    for row in rows:
        row.metrics["size_ratio"] = (row.size_bytes or 0) / (rows[0].size_bytes or 1)
        row.metrics["size_bytes"] = row.size_bytes
    layers = [
        row
        for checkpoint, comparison in zip(checkpoints[1:], comparisons, strict=False)
        for row in comparison.rows(checkpoints[0], checkpoint)
    ]
    details = {"task": task, "samples": len(inputs), "data": str(data)}
    warnings = [warning for checkpoint in checkpoints for warning in checkpoint.warnings]
    return Report("eval", rows, layers, apply_gates(gates, rows), warnings, details)


class _Counter:
    """Progress over all passes."""

    def __init__(self, progress: Progress | None, samples: int) -> None:
        self.progress, self.total, self.done = progress, samples, 0

    def step(self, passes: int) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total * passes)


@dataclass
class _Sample:
    inputs: dict[str, Tensor]


def _samples(task: str, data: Path, tokenizer: Path, count: int | None, length: int) -> list[_Sample]:
    if count is not None and count < 1:
        raise UsageError(f"--samples {count}: at least one is needed.")
    if length < 2:
        raise UsageError(f"--seq-len {length}: at least two tokens are needed.")
    wanted = count or _DEFAULT_SAMPLES[task]
    texts = load_texts(data, lines=task == "embedding")
    tool = models.load_tokenizer(tokenizer)
    if task != "embedding":
        windows = token_windows(tool, texts, length, wanted, data)
        return [_Sample({"input_ids": window.unsqueeze(0)}) for window in windows]
    chosen = [texts[index] for index in spread(len(texts), wanted)]
    encoded = (tool(text, return_tensors="pt", truncation=True, max_length=length) for text in chosen)
    return [_Sample(dict(sample)) for sample in encoded]


def _groups(checkpoints: Sequence[Checkpoint]) -> Iterator[list[int]]:
    """Candidates that are run together with the reference: all, where memory allows, else one by one."""
    import psutil

    others = list(range(1, len(checkpoints)))
    # transformers unpacks quantized weights to float32 on a CPU, so each candidate weighs what the reference does.
    each = sum(info.numel for info in checkpoints[0].infos()) * 4
    if len(others) <= 1 or each * len(checkpoints) < psutil.virtual_memory().available // 2:
        yield others
    else:
        yield from ([index] for index in others)


def _run(
    paths: Sequence[Path],
    group: Sequence[int],
    causal: bool,
    inputs: Sequence[_Sample],
    scores: Sequence[_Score],
    comparisons: Sequence[LayerComparison],
    tracker: _Counter,
) -> None:
    passes = 1 if len(group) == len(paths) - 1 else len(paths) - 1
    first_pass = not scores[0].started
    loaded = {index: models.load_model(paths[index], causal=causal) for index in (0, *group)}
    with torch.inference_mode():
        for sample in inputs:
            ours = _outputs(loaded[0], sample)
            if first_pass:
                scores[0].add(sample, ours, None)
            for index in group:
                scores[index].add(sample, _outputs(loaded[index], sample), ours)
            tracker.step(passes)
        for comparison, index in ((comparisons[index - 1], index) for index in group if comparisons):
            for sample in inputs[:LAYERWISE_SAMPLES]:
                short = {name: value[:, :LAYERWISE_LENGTH] for name, value in sample.inputs.items()}
                comparison.add(loaded[0], loaded[index], short)


def _outputs(model: nn.Module, sample: _Sample) -> dict[str, Tensor]:
    """Every floating-point output of a model, by name, float32."""
    found = models.run(model, sample.inputs)
    outputs = {name: value for name, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}
    if not outputs:
        raise InputError(f"{type(model).__name__} returns no tensor to compare.")
    return {name: value.float() for name, value in outputs.items()}


class _Score:
    """The metrics of one model in the making."""

    def __init__(self, task: str, pooling: str) -> None:
        self.task, self.pooling = task, pooling
        self.started = False
        self._perplexity, self._divergence, self._fidelity = Perplexity(), Divergence(), Fidelity()
        self._cosine = Mean()
        self._compared = self._has_logits = False

    def add(self, sample: _Sample, outputs: dict[str, Tensor], reference: dict[str, Tensor] | None) -> None:
        """One sample's outputs, and the reference's where this is a candidate."""
        self.started = True
        if self.task == "language-modeling":
            logits = outputs["logits"][0]
            self._perplexity.add(logits, sample.inputs["input_ids"][0])
            if reference is not None:
                self._divergence.add(reference["logits"][0][:-1], logits[:-1])
        elif reference is not None and self.task == "embedding":
            ours, theirs = (_embedding(each, sample, self.pooling) for each in (reference, outputs))
            self._cosine.add(cosine(ours, theirs))
        elif reference is not None:
            for name, value in outputs.items():
                self._fidelity.add(reference[name], value)
            if "logits" in outputs:
                self._has_logits = True
                classes = outputs["logits"].shape[-1]
                self._divergence.add(reference["logits"].reshape(-1, classes), outputs["logits"].reshape(-1, classes))
        self._compared |= reference is not None

    def metrics(self) -> dict[str, float | None]:
        """All metrics of the task that apply."""
        if self.task == "language-modeling":
            own = self._perplexity.metrics()
            return own | self._divergence.metrics("top1_agreement") if self._compared else own
        if not self._compared:
            return {}
        if self.task == "embedding":
            error = self._cosine.standard_error
            return {"cosine": self._cosine.mean, "cosine_se": error, "cosine_min": min(self._cosine.values)}
        metrics = self._fidelity.metrics()
        return metrics | self._divergence.metrics("argmax_agreement") if self._has_logits else metrics


def _embedding(outputs: dict[str, Tensor], sample: _Sample, pooling: str) -> Tensor:
    """One text's embedding from its token vectors, pooled as the model's authors say."""
    if "last_hidden_state" not in outputs:
        raise InputError("The model returns no last_hidden_state to pool.", "Use --task fidelity.")
    hidden = outputs["last_hidden_state"][0]
    mask = sample.inputs.get("attention_mask", torch.ones(1, len(hidden)))[0].bool()
    kept = hidden[mask]
    pooled = {"mean": lambda: kept.mean(0), "cls": lambda: kept[0], "last": lambda: kept[-1]}[pooling]()
    return pooled.double()


def _model_row(checkpoint: Checkpoint, index: int, score: _Score) -> ModelRow:
    infos = checkpoint.infos()
    manifest: dict[str, Any] = checkpoint.manifest or {}
    form = manifest.get("format") or quantization_of(infos, checkpoint.config) or "safetensors"
    scheme = manifest.get("scheme") or NUMBER_OF_DTYPE.get(original_dtype(infos), original_dtype(infos))
    role = "candidate" if index else "reference"
    return ModelRow(
        str(checkpoint.path), role, form, scheme, checkpoint.sha256(), checkpoint.size_bytes, score.metrics()
    )
