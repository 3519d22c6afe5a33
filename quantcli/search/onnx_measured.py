"""What was measured of recipes for one graph; what does not depend on the machine is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from inspect import getsourcefile
from pathlib import Path
from typing import Any

from quantcli.planning.recipe import Recipe
from quantcli.search.bounds import Drop
from quantcli.search.budget import Budget
from quantcli.search.choices import Mix
from quantcli.search.judge import Judged
from quantcli.search.limits import Limited, flat, limits_of, metric_name, restored
from quantcli.search.onnx_sensitivity import NOT_FINITE
from quantcli.search.onnx_subject import GraphSubject
from quantcli.search.onnx_trials import Verdicts, key_of, sha256_of
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.system.user_functions import is_function, load_function

#: A smaller mix is looked for while the limit is used up to no more than this share.
_USED_UP = 0.85
#: What is known not to keep limits so many times as wide is told apart from what could keep those of a later budget.
_LATER = 2.0
#: The entry that names levels of noise that were tried.
_LEVELS = "levels"
#: And the one that names where the least work was looked for.
_FAST = "fast"
#: And the one that names mixes that were judged, by the number of the choice of each layer.
_MIXES = "mixes"


class Measurements:
    """Measures what is asked for, once. ``runs`` are artifacts that had to be run on what was held out."""

    def __init__(self, subject: GraphSubject, store: SensitivityStore) -> None:
        self.subject, self.store = subject, store
        self.tried: dict[str, Recipe] = {}
        self.runs = 0
        self._latency: dict[str, float] = {}
        self._glanced: dict[str, float] = {}
        self._size = f"size of the {'file' if subject.output.suffix == '.onnx' else 'folder'}"
        self._judge_name = _name_of_judge(subject.metric)

    def size(self, recipe: Recipe) -> int:
        """Bytes of the artifact as it would be published. Raises InputError where it cannot be converted."""
        known = self._known(recipe)
        if self._size not in known:
            known[self._size] = self.subject.trials.of(recipe).nbytes
            self.store.save()
        self.tried.setdefault(key_of(recipe), recipe)
        return int(known[self._size] or 0)

    def drops(self, recipe: Recipe) -> dict[str, Drop]:
        """What every metric loses, on all samples that were held out; nothing where there are none."""
        if self.subject.verdicts is None:
            return {}
        if not self._seen(recipe) or self._at_best(recipe):
            self._judge(recipe)
        self.size(recipe)
        return self._seen(recipe)

    def keeps(self, budget: Budget, recipe: Recipe) -> bool:
        """Whether a recipe keeps the limits on outputs that a budget sets.

        One that would not keep limits twice as wide, even if it lost nothing on the samples to come, is not run on
        them: so that budgets to come find out about it.

        Raises:
            UsageError: the data gives no such metric.
        """
        if self.verdict(budget, recipe) is None:
            wider = budget.scaled(_LATER)
            self._judge(recipe, lambda judged: not _is_kept(wider, judged.drops(at_best=True)))
        self.size(recipe)
        return bool(self.verdict(budget, recipe))

    def verdict(self, budget: Budget, recipe: Recipe) -> bool | None:
        """What is known without a run of whether a recipe keeps the limits on outputs; None: nothing."""
        seen, at_best = self._seen(recipe), self._at_best(recipe)
        if not seen or (at_best and _is_kept(budget, at_best)):
            return None
        return not at_best and _is_kept(budget, seen)

    def losses(self, artifact: Path) -> dict[str, Drop]:
        """What an artifact loses of every metric, on all samples that were held out; one of the same bytes once.

        Raises:
            InputError: it does not run.
        """
        key = f"{self._judge_name} {sha256_of(artifact)}"
        if key not in self.store.found.verdicts:
            self._run(key, artifact)
        return restored(self.store.found.verdicts[key])

    def _judge(self, recipe: Recipe, is_hopeless: Callable[[Judged], bool] = lambda _: False) -> None:
        """Note what a recipe's artifact loses; it is run where none of its bytes was."""
        artifact = self.subject.trials.of(recipe).path
        key, at_best = f"{self._judge_name} {sha256_of(artifact)}", dict[str, float | None]()
        drops = self.store.found.verdicts.get(key)
        if drops is None:
            judged = self._run(key, artifact, is_hopeless)
            drops, at_best = flat(judged.drops()), flat(judged.drops(at_best=True)) if judged.unseen else {}
        self.store.found.measured[self._judged_key(recipe)] = drops
        self.store.found.measured[self._at_best_key(recipe)] = at_best
        self.store.save()

    def _run(self, key: str, artifact: Path, is_hopeless: Callable[[Judged], bool] = lambda _: False) -> Judged:
        """Run an artifact on samples that were held out, and keep what it loses if it was run on all."""
        verdicts = self._verdicts()
        self.runs += 1
        judged = verdicts.of(artifact, is_hopeless)
        if not judged.unseen:
            self.store.found.verdicts[key] = flat(judged.drops())
        self._keep_reference(verdicts)
        self.store.save()
        return judged

    def _verdicts(self) -> Verdicts:
        """The judge, with what is known of the model itself."""
        verdicts = self.subject.verdicts
        assert verdicts is not None
        known = self.store.found.references.get(self._judge_name, {})
        if known and not verdicts.before and not verdicts.takes_outputs:
            columns = [known[name] for name in known]
            verdicts.before = [dict(zip(known, row, strict=True)) for row in zip(*columns, strict=True)]
        return verdicts

    def _keep_reference(self, verdicts: Verdicts) -> None:
        if verdicts.before:
            names = dict.fromkeys(name for metrics in verdicts.before for name in metrics)
            columns = {name: [metrics.get(name) for metrics in verdicts.before] for name in names}
            self.store.found.references[self._judge_name] = columns

    def _seen(self, recipe: Recipe) -> dict[str, Drop]:
        """What every metric lost on the samples that were run, as far as any were."""
        return restored(self.store.found.measured.get(self._judged_key(recipe), {}))

    def _at_best(self, recipe: Recipe) -> dict[str, Drop]:
        """What every metric loses at best, of a recipe that was given up; nothing of others."""
        return restored(self.store.found.measured.get(self._at_best_key(recipe), {}))

    def _judged_key(self, recipe: Recipe) -> str:
        return f"{self._judge_name} {key_of(recipe)}"

    def _at_best_key(self, recipe: Recipe) -> str:
        return f"at best {self._judged_key(recipe)}"

    def noise(self, recipe: Recipe) -> float:
        """How far the outputs move on the samples of the search."""
        known = self._known(recipe)
        if "noise" not in known:
            known["noise"] = min(self.subject.runs.noise(recipe), NOT_FINITE)
            self.store.save()
        return known["noise"] or 0.0

    def latency(self, recipe: Recipe) -> float:
        """Median of a run in ms, in rounds beside the model. It holds for this machine and moment, and is not kept."""
        key = key_of(recipe)
        if key not in self._latency:
            self._latency[key] = self.subject.stopwatch.p50_ms(self.subject.trials.of(recipe).path)
        return self._latency[key]

    def glance(self, recipe: Recipe) -> float:
        """About the median of a run in ms, from a few rounds."""
        key = key_of(recipe)
        if key not in self._glanced:
            self._glanced[key] = self.subject.stopwatch.glance_ms(self.subject.trials.of(recipe).path)
        return self._glanced[key]

    def limits(self, budget: Budget, recipe: Recipe) -> list[Limited]:
        """The limits on outputs that a budget sets, with what a recipe loses of each.

        Raises:
            UsageError: the data gives no such metric.
        """
        return limits_of(budget, self.drops(recipe))

    def used(self, budget: Budget, recipe: Recipe) -> float:
        """How much a recipe uses of the limits on outputs, as far as it was judged: above 1 one is not kept."""
        limits = [each for each in limits_of(budget, self._seen(recipe)) if each[1] > 0]
        return max((drop.bound_with(self._held_out) / limit for _, limit, drop in limits), default=0.0)

    def is_used_up(self, budget: Budget, recipe: Recipe) -> bool:
        """Whether a recipe that was judged has a limit on outputs used up, but for a small rest."""
        return any(drop.share_of(limit) >= _USED_UP for _, limit, drop in self.limits(budget, recipe))

    def levels(self, limits: str) -> list[int]:
        """Levels of noise that were tried within limits on bytes and work, for any budget."""
        return sorted(map(int, self.store.found.measured.get(f"{_LEVELS} {limits}", {})))

    def note_level(self, limits: str, level: int) -> None:
        """Keep that a level was tried."""
        self.store.found.measured.setdefault(f"{_LEVELS} {limits}", {})[str(level)] = None
        self.store.save()

    def fast(self) -> list[tuple[float, float]]:
        """Bytes and noise within which the least work was looked for, for any budget."""
        return [tuple(json.loads(entry)) for entry in self.store.found.measured.get(_FAST, {})]

    def note_fast(self, nbytes: float, noise: float) -> None:
        """Keep that the least work within so many bytes and so much noise was looked for."""
        self.store.found.measured.setdefault(_FAST, {})[json.dumps([nbytes, noise])] = None
        self.store.save()

    def mixes(self) -> list[Mix]:
        """Mixes that were judged, for any budget."""
        return [tuple(json.loads(entry)) for entry in self.store.found.measured.get(_MIXES, {})]

    def note_mix(self, mix: Mix) -> None:
        """Keep that a mix was judged."""
        self.store.found.measured.setdefault(_MIXES, {})[json.dumps(mix)] = None
        self.store.save()

    def best_case(self, budget: Budget) -> list[Limited]:
        """Limits on the number of answers that change, and what is lost where none does, as the samples can show it.

        Raises:
            UsageError: the data gives no such metric.
        """
        if self.subject.verdicts is None or budget.max_drop is None:
            return []
        known = self.store.found.measured.setdefault(f"{self._judge_name} the model itself", {})
        if not known:
            verdicts = self._verdicts()
            judged = verdicts.of_itself()
            self._keep_reference(verdicts)
            drops = judged.drops()
            known |= flat({name: drop for name, drop in drops.items() if _counts_answers(judged, name)})
            known |= {f"{name} known": 1.0 for name in drops}
            self.store.save()
        counted = restored(known)
        names = {name.removesuffix(" known") for name in known if name.endswith(" known")}
        metric = metric_name(budget, dict.fromkeys(sorted(names)))
        return [("--max-drop", budget.max_drop, counted[metric])] if metric in counted else []

    def row(self, recipe: Recipe) -> dict[str, Any]:
        """What is known of a recipe, for the report."""
        known, key = self._known(recipe), key_of(recipe)
        row: dict[str, Any] = {"size_bytes": self.size(recipe), "searched": known.get("noise")}
        if drops := self._seen(recipe):
            if self._at_best(recipe):
                row["given_up_after"] = max(drop.samples for drop in drops.values())
            row["held_out"] = {name: drop.mean for name, drop in drops.items()}
            row["held_out_bound"] = {name: drop.bound for name, drop in drops.items()}
        if key in self._latency:
            row["latency_ms_p50"] = self._latency[key]
        return row

    @property
    def _held_out(self) -> int:
        return len(self.subject.verdicts.held_out) if self.subject.verdicts else 1

    def _known(self, recipe: Recipe) -> dict[str, float | None]:
        return self.store.found.measured.setdefault(key_of(recipe), {})


def _is_kept(budget: Budget, drops: Mapping[str, Drop]) -> bool:
    """Whether the limits on outputs that a budget sets are kept where so much is lost."""
    return all(drop.bound <= limit for _, limit, drop in limits_of(budget, drops))


def _name_of_judge(metric: str | None) -> str:
    """Tells verdicts by a function of the user's own from others, and from those that it gave before it was changed."""
    if metric is None or not is_function(metric):
        return "judged"
    source = Path(getsourcefile(load_function(metric)) or "")
    code = source.read_bytes() if source.is_file() else b""
    return f"judged by {metric} {hashlib.sha256(code).hexdigest()[:16]}"


def _counts_answers(judged: Judged, metric: str) -> bool:
    """Whether a metric says of each sample that it is right, or wrong."""
    values = {before.get(metric) for before, _ in judged.singles}
    return metric == "argmax_agreement" or values <= {0.0, 1.0}
