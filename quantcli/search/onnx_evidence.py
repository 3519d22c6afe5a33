"""Samples that a search of a graph measures on, and others that its result is judged on."""

from __future__ import annotations

from dataclasses import replace

from quantcli.data.request import DataRequest
from quantcli.evaluation.inputs import Inputs, load_inputs, named_task
from quantcli.evaluation.tasks import task_of
from quantcli.models.source import ModelSource
from quantcli.search.judge import HELD_OUT, SEARCHED, Evidence
from quantcli.system.user_functions import is_function

#: As many samples as there are: a graph runs fast, and a small loss takes many samples to be sure of.
_ALL = 1 << 40


def gather_evidence(
    source: ModelSource, data: DataRequest | None, eval_data: str | None, metric: str | None
) -> Evidence | None:
    """Samples from ``--data`` and ``--eval-data``; of one alone a part is held out. None where there is neither.

    Args:
        source: the graph.
        data: what is calibrated on.
        eval_data: what the result is judged on.
        metric: ``package.module:function`` that judges outputs, or a metric's name, or None.

    Raises:
        InputError: the data is missing, does not suit the model, or is too little to hold some out.
    """
    if data is None and eval_data is None:
        return None
    if data is None or eval_data is None:
        every = _inputs(source, data or DataRequest(str(eval_data)), metric, HELD_OUT + SEARCHED)
        searched = every.samples.spread(min(SEARCHED, max(1, len(every) // 2)))
        return Evidence(Inputs(every.task, searched), Inputs(every.task, every.samples.without(searched)))
    held_out = _inputs(source, replace(data, data=eval_data, samples=None), metric, None)
    # The search compares outputs, which takes no labels.
    task = named_task("auto", source, data.data) or task_of("fidelity")
    return Evidence(load_inputs([source], replace(data, samples=SEARCHED), task), held_out)


def _inputs(source: ModelSource, request: DataRequest, metric: str | None, most: int | None) -> Inputs:
    """Samples and their task; ``most`` of them where each takes long, as a window of text does."""
    if metric is not None and is_function(metric):
        return load_inputs([source], request.at_most(_ALL), task_of(metric))
    task = named_task("auto", source, request.data)
    if task is None:
        return load_inputs([source], request.at_most(_ALL), None)
    return load_inputs([source], request.at_most(most) if most is not None else request, task)
