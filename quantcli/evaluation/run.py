"""Running reference and candidates over samples, and scoring them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import isfinite
from typing import Any

import torch

from quantcli.core.ports import Arrays, cache_ports, is_table_of_maps
from quantcli.evaluation.contamination import LeakCheck
from quantcli.evaluation.inputs import Inputs
from quantcli.evaluation.layers_onnx import compare_graphs
from quantcli.evaluation.layers_torch import LayerComparison
from quantcli.evaluation.tasks.base import Scorer
from quantcli.models.inputs import TOKEN_INPUTS
from quantcli.models.runner import Runner, TorchRunner
from quantcli.models.source import ModelSource
from quantcli.reporting.report import LayerRow, ModelRow
from quantcli.system import ranks
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.progress import Progress

#: Samples of the per-layer comparison, and their tokens at the most.
LAYERWISE_SAMPLES, LAYERWISE_LENGTH = 8, 128


def model_row(source: ModelSource, index: int, score: Scorer) -> ModelRow:
    """A model's row of the report."""
    # What outputs that are not finite make of a metric is no number.
    found = {name: value if value is None or isfinite(value) else None for name, value in score.metrics().items()}
    row = source.row(index, found)
    row.details = score.details()
    return row


def run_models(
    sources: Sequence[ModelSource],
    inputs: Inputs,
    scores: Sequence[Scorer],
    leaks: LeakCheck,
    by_layer: bool,
    progress: Progress | None,
) -> list[LayerRow]:
    """Feed all samples to all models, and return the rows of ``--by-layer``; a rank feeds its share of them.

    Rank 0 returns once the scores are those of all samples; the others end.
    """
    groups = list(_groups(sources))
    layers: dict[int, list[LayerRow]] = {}
    done, total = 0, len(ranks.part(len(inputs), inputs.samples.fixed_batch or 1)) * len(groups)
    for number, group in enumerate(groups):
        loaded = {index: sources[index].runner(**inputs.task.LOADING) for index in (0, *group)}
        if number == 0:
            inputs.settle_batch_size([loaded[index] for index in loaded if _may_need_several(sources[index])])
        for feeds, labels in inputs.own_batches():
            outputs = {index: runner.run(feeds) for index, runner in loaded.items()}
            for position, label in enumerate(labels):
                single = {index: single_sample(found, position, len(labels)) for index, found in outputs.items()}
                sample = single_sample(feeds, position, len(labels))
                if number == 0:
                    leaks.add(sample)
                for index in loaded if number == 0 else group:
                    scores[index].add(sample, label, single[index], single[0] if index else None)
            done += len(labels)
            if progress:
                progress(done, total)
        for index in group if by_layer and ranks.is_first() else ():
            if layers_compare(sources[0], sources[index]):
                layers[index] = _compare_layers(sources[0], sources[index], loaded[0], loaded[index], inputs)
    _merge(scores, leaks)
    ranks.finish()
    return [row for index in sorted(layers) for row in layers[index]]


def _merge(scores: Sequence[Scorer], leaks: LeakCheck) -> None:
    """Add what the other ranks have seen, in the order of their samples."""
    for source, (theirs, seen) in enumerate(ranks.gather((scores, leaks))):
        if source != ranks.rank():
            leaks.merge(seen)
            for own, their in zip(scores, theirs, strict=True):
                own.merge(their)


def _may_need_several(source: ModelSource) -> bool:
    """Whether a model may run on a certain number of samples only, although its inputs do not say so.

    A decoder is given a cache that is made for the samples, and reads long texts: no more of them than needed.
    """
    return source.onnx is not None and not cache_ports(source.onnx.inputs)


def single_sample(arrays: Arrays, position: int, count: int) -> Arrays:
    """One sample of a batch, where an array, or a list of maps, has as many entries as the batch."""
    if count == 1:
        return arrays
    return {
        name: value[position : position + 1] if _entries(value) == count else value for name, value in arrays.items()
    }


def _entries(value: Any) -> int | None:
    """How many samples a value may be of; None where it does not tell, as a sequence does not."""
    if is_table_of_maps(value):
        return len(value)
    shape = getattr(value, "shape", ())
    return shape[0] if shape else None


def _groups(sources: Sequence[ModelSource]) -> Iterator[list[int]]:
    """Candidates that are run together with the reference: all, where memory allows, else one by one."""
    others = list(range(1, len(sources)))
    most = max(source.float_bytes for source in sources)
    if len(others) <= 1 or most * len(sources) < free_memory_bytes() // 2:
        yield others
    else:
        yield from ([index] for index in others)


def layers_compare(reference: ModelSource, candidate: ModelSource) -> bool:
    """Whether two models can be compared layer by layer."""
    both = {reference.kind, candidate.kind}
    return both in ({"checkpoint"}, {"onnx"})


def _compare_layers(
    reference: ModelSource, candidate: ModelSource, ours: Runner, theirs: Runner, inputs: Inputs
) -> list[LayerRow]:
    few = [feeds for feeds, _ in islice(inputs.batches(), LAYERWISE_SAMPLES)]
    if reference.onnx and candidate.onnx:
        return compare_graphs(reference.onnx, candidate.onnx, few, candidate.path)
    assert isinstance(ours, TorchRunner) and isinstance(theirs, TorchRunner)
    assert reference.checkpoint and candidate.checkpoint
    comparison = LayerComparison()
    for feeds in few:
        fitting = ours.fitting(feeds)
        # Every layer's output of a sample is kept, so token sequences are cut short; not those with places for images.
        textual = TOKEN_INPUTS.issuperset(fitting)
        short = {name: value[:, :LAYERWISE_LENGTH] if textual else value for name, value in fitting.items()}
        with torch.inference_mode():
            comparison.add(ours.module, theirs.module, {key: torch.from_numpy(value) for key, value in short.items()})
    return comparison.rows(reference.checkpoint, candidate.checkpoint)
