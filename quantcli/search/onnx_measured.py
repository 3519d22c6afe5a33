"""What was measured of recipes for one graph; what does not depend on the machine is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantcli.planning.recipe import Recipe
from quantcli.search.bounds import Drop
from quantcli.search.budget import Budget
from quantcli.search.judge import Judged
from quantcli.search.limits import Limited, flat, limits_of, metric_name, restored
from quantcli.search.onnx_sensitivity import NOT_FINITE
from quantcli.search.onnx_subject import GraphSubject
from quantcli.search.onnx_trials import key_of
from quantcli.search.sensitivity_file import SensitivityStore


class Measurements:
    """Measures what is asked for, once."""

    def __init__(self, subject: GraphSubject, store: SensitivityStore) -> None:
        self.subject, self.store = subject, store
        self.tried: dict[str, Recipe] = {}
        self._latency: dict[str, float] = {}
        self._size = f"size of the {'file' if subject.output.suffix == '.onnx' else 'folder'}"

    def size(self, recipe: Recipe) -> int:
        """Bytes of the artifact as it would be published. Raises InputError where it cannot be converted."""
        known = self._known(recipe)
        if self._size not in known:
            known[self._size] = self.subject.trials.of(recipe).nbytes
            self.store.save()
        self.tried.setdefault(key_of(recipe), recipe)
        return int(known[self._size] or 0)

    def drops(self, recipe: Recipe) -> dict[str, Drop]:
        """What every metric loses, on samples that were held out; nothing where there are none."""
        if self.subject.verdicts is None:
            return {}
        known = self._known(recipe)
        if not any(name.endswith(" mean") for name in known):
            judged = self.subject.verdicts.of(self.subject.trials.of(recipe).path)
            known.update(flat(judged.drops()))
            self.store.save()
        self.size(recipe)
        return restored(known)

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

    def limits(self, budget: Budget, recipe: Recipe) -> list[Limited]:
        """The limits on outputs that a budget sets, with what a recipe loses of each.

        Raises:
            UsageError: the data gives no such metric.
        """
        return limits_of(budget, self.drops(recipe))

    def expected_noise(self, budget: Budget, judged: Iterable[Recipe]) -> float | None:
        """The noise that would just keep the limits if losses grew with it as in recipes that were judged.

        Of these the one that loses least tells; None: none does.
        """
        expected = []
        for recipe in judged:
            used = max((drop.bound / limit for _, limit, drop in self.limits(budget, recipe) if limit > 0), default=0.0)
            if used > 0 and (noise := self.noise(recipe)) > 0:
                expected.append((used, noise / used))
        return min(expected)[1] if expected else None

    def best_case(self, budget: Budget) -> list[Limited]:
        """Limits on the number of answers that change, and what is lost where none does, as the samples can show it.

        Raises:
            UsageError: the data gives no such metric.
        """
        if self.subject.verdicts is None or budget.max_drop is None:
            return []
        known = self.store.found.measured.setdefault("the model itself", {})
        if not known:
            judged = self.subject.verdicts.of_itself()
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
        if drops := restored(known):
            row["held_out"] = {name: drop.mean for name, drop in drops.items()}
            row["held_out_bound"] = {name: drop.bound for name, drop in drops.items()}
        if key in self._latency:
            row["latency_ms_p50"] = self._latency[key]
        return row

    def _known(self, recipe: Recipe) -> dict[str, float | None]:
        return self.store.found.measured.setdefault(key_of(recipe), {})


def _counts_answers(judged: Judged, metric: str) -> bool:
    """Whether a metric says of each sample that it is right, or wrong."""
    values = {before.get(metric) for before, _ in judged.singles}
    return metric == "argmax_agreement" or values <= {0.0, 1.0}
