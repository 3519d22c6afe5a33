"""A checkpoint that budgets are searched for: what is opened once, however often a search has to be repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from quantcli.blocks.model import SequentialModel, hugging_face, plain_module
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.conversion.checkpoint.transformers_check import RuntimeCheck
from quantcli.data.request import DataRequest
from quantcli.models.runner import open_runner
from quantcli.models.source import ModelSource, open_model
from quantcli.planning.plan import Loader
from quantcli.planning.recipe import Recipe
from quantcli.planning.resolve import resolve
from quantcli.search.budget import Budget
from quantcli.search.checkpoint import CheckpointSearch
from quantcli.search.choices import Found
from quantcli.search.judge import judge
from quantcli.search.limits import limits_of
from quantcli.search.trials import CheckpointTrials


@dataclass
class CheckpointSubject:
    """What is converted.

    ``function`` is ``package.module:function`` where that makes the checkpoint's module; ``calibrated``: codes will be
    fitted to the data of the request.
    """

    checkpoint: Checkpoint
    function: str | None
    recipe: Recipe
    request: DataRequest | None
    output: Path
    calibrated: bool = False
    _trials: CheckpointTrials | None = None
    _budget: Budget = field(default_factory=Budget)

    def search(self, budget: Budget) -> Found:
        """Find a recipe that keeps a budget. Raises as `CheckpointSearch.run`."""
        self._budget = budget
        is_repeated = self._trials is not None
        return CheckpointSearch(self.trials(budget), budget, is_repeated).run()

    def trials(self, budget: Budget) -> CheckpointTrials:
        """What mixes are tried out with, however many budgets there are."""
        if self._trials is None:
            self._trials = CheckpointTrials(
                self.source, self.checkpoint, self.recipe, budget, self.request, self._loader(budget), self.output,
                self._open_module, self.calibrated, seed=self.request.seed if self.request else 0,
            )  # fmt: skip
        return self._trials

    @cached_property
    def source(self) -> ModelSource:
        """As evaluation knows it."""
        if self.function:
            return open_model(self.function, Path(self.checkpoint.path))
        return open_model(self.checkpoint.path)

    def _loader(self, budget: Budget) -> Loader:
        """What the library that loads the artifact makes of the checkpoint."""
        scheme = next((name for name in budget.allow if name.startswith("int")), budget.allow[0])
        plan = resolve(
            self.recipe.with_flags(scheme=scheme), self.checkpoint.infos(), self.checkpoint.config, data=None
        )
        with RuntimeCheck(plan, self.checkpoint, "codes") as check:
            return check.survey()

    def _open_module(self) -> SequentialModel:
        if self.function:
            return plain_module(self.function, self.checkpoint)
        return hugging_face(self.checkpoint)

    def losses(self, artifact: Path) -> Mapping[str, tuple[float, float]]:
        """What an artifact loses on samples that were held out: mean and bound, by the option that limits it."""
        assert self._trials is not None
        if not self._budget.judges_outputs or self._trials.evidence is None:
            return {}
        inputs = self._trials.evidence.held_out
        options = dict(inputs.task.LOADING)
        reference = self.source.runner(**options)
        candidate = open_runner(self.function or artifact, weights=artifact if self.function else None, **options)
        drops = judge(self.source, reference, candidate, inputs).drops()
        return {option: (drop.mean, drop.bound) for option, _, drop in limits_of(self._budget, drops)}
