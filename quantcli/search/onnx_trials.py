"""Artifacts that a search converts, to be measured as they would be published."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.benchmarking.timing import MIN_ROUNDS, Timing, time_interleaved
from quantcli.conversion.onnx.evidence import Material
from quantcli.conversion.onnx.pipeline import convert_onnx
from quantcli.core.ports import Arrays, Port
from quantcli.data.request import DataRequest
from quantcli.evaluation.inputs import Inputs
from quantcli.evaluation.tasks.base import Metrics
from quantcli.models.runner import OnnxRunner, Runner
from quantcli.models.source import ModelSource
from quantcli.onnx.graph.model import onnx_file
from quantcli.planning.recipe import Recipe
from quantcli.search.judge import Judged, judge

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Trial:
    """An artifact as it would be published; ``nbytes`` are of all of its files."""

    path: Path
    nbytes: int


@dataclass
class Trials:
    """Converts one model by many recipes, into a folder of its own each.

    Attributes:
        model: as the user named it.
        output: where the result will be; its name alone is used.
        request: the data that conversions calibrate on.
        material: the model opened.
        weights: the state dict of a function's module.
        folder: where artifacts go.
    """

    model: str
    output: Path
    request: DataRequest | None
    material: Material
    weights: Path | None
    folder: Path
    _made: dict[str, Trial] = field(default_factory=dict)

    def of(self, recipe: Recipe) -> Trial:
        """The artifact of a recipe. Raises InputError where it cannot be converted so."""
        key = key_of(recipe)
        if key not in self._made:
            place = self.folder / key
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            target = place / self.output.name
            convert_onnx(
                self.model, target, recipe, self.request, self.material.stats, weights=self.weights,
                material=self.material, allow_larger=True,
            )  # fmt: skip
            nbytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            self._made[key] = Trial(target, nbytes)
        return self._made[key]


def key_of(recipe: Recipe) -> str:
    """A recipe as a short text."""
    return hashlib.sha256(recipe.model_dump_json(exclude_unset=True).encode()).hexdigest()[:16]


def sha256_of(artifact: Path) -> str:
    """Tells an artifact from others by the bytes of its files, whatever its own name is.

    Args:
        artifact: its file or folder, in a folder that holds nothing else.
    """
    whole = hashlib.sha256()
    for file in sorted(path for path in artifact.parent.rglob("*") if path.is_file()):
        with file.open("rb", buffering=0) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = file.relative_to(artifact.parent).as_posix().removeprefix(artifact.name)
        whole.update(f"{name}\0{digest}\n".encode())
    return whole.hexdigest()


class Remembered:
    """A model whose outputs are computed once: each pass over the same samples returns what the first did."""

    def __init__(self, runner: OnnxRunner) -> None:
        self.inputs: tuple[Port, ...] = runner.inputs
        self._runner, self._outputs = runner, list[Arrays]()

    def again(self) -> Pass:
        """Another pass, from the first sample on."""
        return Pass(self)

    def at(self, number: int, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs of a sample, in order."""
        if number == len(self._outputs):
            self._outputs.append(self._runner.run(feeds))
        return self._outputs[number]


class Pass:
    """One pass over the samples of a `Remembered`."""

    def __init__(self, remembered: Remembered) -> None:
        self.inputs, self._remembered, self._next = remembered.inputs, remembered, 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs of the next sample."""
        self._next += 1
        return self._remembered.at(self._next - 1, feeds)


class Verdicts:
    """Judges artifacts beside the model, on samples that were held out.

    ``before``: what the model itself has on each of them, once that is known; see `judge`.
    """

    def __init__(self, source: ModelSource, model: Path, held_out: Inputs) -> None:
        self.source, self.model, self.held_out = source, model, held_out
        self.before: Sequence[Metrics] = ()
        self._known: Remembered | None = None

    @property
    def takes_outputs(self) -> bool:
        """Whether outputs are compared with the model's, so that it has to be run for each verdict."""
        return bool(self.held_out.task.CANDIDATE_METRICS)

    def of(self, path: Path, is_hopeless: Callable[[Judged], bool] = lambda _: False) -> Judged:
        """What an artifact loses, on all samples or until that is hopeless.

        Raises:
            InputError: it does not run.
        """
        runner = OnnxRunner(onnx_file(path))
        return self._learned(judge(self.source, self._reference(), runner, self.held_out, is_hopeless, self.before))

    def of_itself(self) -> Judged:
        """What the model would lose if it were a candidate: nothing, but with the bounds that the samples allow."""
        if self.before:
            return Judged([(each, each) for each in self.before])
        return self._learned(judge(self.source, self._reference(), self._reference(), self.held_out))

    def _learned(self, found: Judged) -> Judged:
        if not found.unseen and not self.takes_outputs:
            self.before, self._known = [before for before, _ in found.singles], None
        return found

    def _reference(self) -> Runner:
        if self.before:
            return _NotRun()
        self._known = self._known or Remembered(OnnxRunner(self.model))
        return self._known.again()


class _NotRun:
    """In place of a model that need not be run."""

    inputs: tuple[Port, ...] = ()

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Never called."""
        raise AssertionError("what the model has is known")


class Stopwatch:
    """Times artifacts in rounds that they take in turns with the model."""

    def __init__(self, model: Path, feeds: Mapping[str, np.ndarray]) -> None:
        self.model, self.feeds = model, feeds

    def of(self, artifact: Path) -> tuple[Timing, Timing]:
        """The model's times, and the artifact's."""
        runners = [OnnxRunner(path, shared=True) for path in (self.model, onnx_file(artifact))]
        reference, candidate = time_interleaved([partial(_timed, runner, self.feeds) for runner in runners])
        return reference, candidate

    def p50_ms(self, artifact: Path) -> float:
        """The time that half of an artifact's runs stay below, in ms."""
        return self.of(artifact)[1].percentile_ms(50)

    def glance_ms(self, artifact: Path) -> float:
        """About what `p50_ms` would tell, from a few rounds of the artifact alone."""
        runner = OnnxRunner(onnx_file(artifact), shared=True)
        (alone,) = time_interleaved([partial(_timed, runner, self.feeds)], rounds=MIN_ROUNDS)
        return alone.percentile_ms(50)


def _timed(runner: OnnxRunner, feeds: Mapping[str, np.ndarray], number: int) -> None:
    runner.run(feeds)
