"""Two models on samples that no search has seen: what the second loses, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log

from quantcli.core.ports import Arrays
from quantcli.data.request import DataRequest
from quantcli.errors import InputError, UsageError
from quantcli.evaluation.inputs import Inputs, load_inputs, named_task
from quantcli.evaluation.run import single_sample
from quantcli.evaluation.tasks.base import Metrics, Scorer
from quantcli.models.runner import Runner
from quantcli.models.source import ModelSource
from quantcli.search.bounds import Drop, drop_of

#: Samples that a search looks at, and that are held out of data that is not for evaluation alone. Of these, so many
#: tell which of two mixes of text's models is better; a limit is judged on all.
SEARCHED, HELD_OUT, COMPARED = 8, 12, 6
KL = "kl_nats"
#: After so many samples each it is looked whether a candidate is worth running on the others.
_LOOKED_AFTER = 32
#: Metrics that are better the lower they are; all others are better the higher they are.
_LOWER_IS_BETTER = ("perplexity", KL, "wer")
#: What a metric that compares a candidate with the reference is of the reference itself.
_OF_ITSELF = {KL: 0.0, "cosine": 1.0, "top1_agreement": 1.0, "argmax_agreement": 1.0}
#: Metrics that ``--max-drop`` means where none is named, the first that there is.
_JUDGED_BY = ("top1", "perplexity", "wer", "argmax_agreement", "cosine")


@dataclass(frozen=True)
class Judged:
    """A candidate's metrics beside the reference's, on each of the samples that were run.

    ``perplexity``: the reference's over all of them, where it has one. ``unseen``: samples that were not run, since the
    candidate was given up.
    """

    singles: Sequence[tuple[Metrics, Metrics]]
    perplexity: float | None = None
    unseen: int = 0

    def drops(self, *, at_best: bool = False) -> dict[str, Drop]:
        """What each metric lost; more is worse, whichever way the metric counts.

        ``at_best``: what it would have lost if nothing were lost on the samples that were not run.
        """
        found, rest = {}, [0.0] * (self.unseen if at_best else 0)
        for name in dict.fromkeys(name for _, after in self.singles for name in after):
            if name == "perplexity":
                found[name] = self._perplexity_drop(rest)
                continue
            losses = [_loss(name, before, after) for before, after in self.singles]
            known = [loss for loss in losses if loss is not None]
            if known and not name.endswith("_se"):
                found[name] = drop_of(known + rest)
        return found

    def _perplexity_drop(self, rest: list[float]) -> Drop:
        """The bound is of the logarithm, which is a mean over samples as perplexity is not."""
        pairs = [(before["perplexity"], after["perplexity"]) for before, after in self.singles]
        logs = drop_of([log(after) - log(before) for before, after in pairs if before and after] + rest)
        base = self.perplexity or 0.0
        mean, bound = (base * (exp(min(value, 700.0)) - 1) for value in (logs.mean, logs.bound))
        return Drop(mean, bound, logs.samples, base * logs.deviation)


def metric_of(drops: Mapping[str, Drop | None], metric: str | None) -> str:
    """What ``--max-drop`` is about: the metric named, or the one that the data is for. Raises UsageError."""
    name = metric or next((each for each in _JUDGED_BY if each in drops), None)
    if name is None or name not in drops:
        raise UsageError(f"--metric {metric}: the data gives {', '.join(sorted(drops)) or 'none'}.")
    return name


def require_kl(drops: Mapping[str, Drop]) -> None:
    """Raise UsageError where outputs are no distributions, which ``--max-kl`` compares."""
    if KL not in drops:
        raise UsageError(
            "--max-kl is for outputs that are scores of classes, which this model's are not.",
            "Use --max-drop X --metric cosine.",
        )


def _loss(metric: str, before: Metrics, after: Metrics) -> float | None:
    reference, candidate = before.get(metric, _OF_ITSELF.get(metric)), after.get(metric)
    if reference is None or candidate is None:
        return None
    return candidate - reference if metric in _LOWER_IS_BETTER else reference - candidate


def judge(
    source: ModelSource,
    reference: Runner,
    candidate: Runner,
    inputs: Inputs,
    is_hopeless: Callable[[Judged], bool] = lambda _: False,
    before: Sequence[Metrics] = (),
) -> Judged:
    """Run both models on all samples, or on the first ones until a candidate is seen to be hopeless.

    Args:
        source: the reference, as tasks know it.
        reference: what runs it.
        candidate: what runs the other one.
        inputs: samples, and their task.
        is_hopeless: whether to give up, by what was seen so far.
        before: what the reference is known to have on each sample, where the task compares no outputs with its own; it
            is not run then.

    Raises:
        InputError: one does not run.
    """
    scorer = inputs.task.scorer
    whole = scorer(source, source) if "perplexity" in (inputs.task.METRICS or ()) else None
    singles: list[tuple[Metrics, Metrics]] = []
    looked = 0

    def so_far() -> Judged:
        return Judged(singles, whole.metrics()["perplexity"] if whole else None, len(inputs) - len(singles))

    for feeds, labels in inputs.batches():
        if len(singles) - looked >= _LOOKED_AFTER:
            looked = len(singles)
            if is_hopeless(so_far()):
                return so_far()
        expected = None if before else reference.run(feeds)
        got = candidate.run(feeds)
        for position, label in enumerate(labels):
            sample, theirs = (single_sample(each, position, len(labels)) for each in (feeds, got))
            ours = None if expected is None else single_sample(expected, position, len(labels))
            if whole and ours is not None:
                whole.add(sample, label, ours, None)
            after = _metrics(scorer(source, source), sample, label, theirs, ours)
            known = before[len(singles)] if ours is None else _metrics(scorer(source, source), sample, label, ours)
            singles.append((known, after))
    if not singles:
        raise InputError(f"{inputs.samples.source} has no samples.")
    return so_far()


def _metrics(
    scorer: Scorer, sample: Arrays, label: object, outputs: Arrays, reference: Arrays | None = None
) -> Metrics:
    """What one sample gives."""
    scorer.add(sample, label, outputs, reference)
    return scorer.metrics()


def alone(source: ModelSource, model: Runner, inputs: Inputs) -> Metrics:
    """The metrics that a model has by itself. Raises InputError where it does not run."""
    scorer = inputs.task.scorer(source, source)
    for feeds, labels in inputs.batches():
        outputs = model.run(feeds)
        for position, label in enumerate(labels):
            sample, own = (single_sample(each, position, len(labels)) for each in (feeds, outputs))
            scorer.add(sample, label, own, None)
    return scorer.metrics()


@dataclass(frozen=True)
class Evidence:
    """Samples for the search, and others for the verdict on what it found."""

    searched: Inputs
    held_out: Inputs


def gather(source: ModelSource, data: DataRequest | None, eval_data: str | None) -> Evidence | None:
    """Samples from ``--data`` and ``--eval-data``; of one alone a part is held out. None where there is neither.

    Raises:
        InputError: the data is missing, does not suit the model, or is too little to hold some out.
    """
    if data is None and eval_data is None:
        return None
    if data is None or eval_data is None:
        request = data or DataRequest(str(eval_data))
        every = _inputs(source, request, HELD_OUT + SEARCHED)
        searched = every.samples.spread(min(SEARCHED, max(1, len(every) // 2)))
        return Evidence(Inputs(every.task, searched), Inputs(every.task, every.samples.without(searched)))
    searched_inputs = _inputs(source, replace(data, samples=None), SEARCHED)
    searched = searched_inputs.samples.spread(SEARCHED)
    held_out = _inputs(source, replace(data, data=eval_data, samples=None), None)
    return Evidence(Inputs(searched_inputs.task, searched), held_out)


def _inputs(source: ModelSource, request: DataRequest, most: int | None) -> Inputs:
    """Samples and their task; ``most`` of them where each takes long, as a window of text does."""
    task = named_task("auto", source, request.data)
    if task is not None and task.DEFAULT_SAMPLES is not None and most is not None:
        request = request.at_most(most)
    return load_inputs([source], request, task)
