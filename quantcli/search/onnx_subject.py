"""What a search of a graph works with, each part made when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.calibration.capture import capture_activations
from quantcli.conversion.onnx.comparison import COMPARED_SAMPLES, OutputComparison
from quantcli.conversion.onnx.evidence import Material
from quantcli.conversion.onnx.source import open_source
from quantcli.conversion.onnx.trial_inputs import NoFeeds, of_samples
from quantcli.data.request import DataRequest
from quantcli.data.sources import is_text
from quantcli.errors import BudgetError, InputError, UsageError
from quantcli.models.session import Session
from quantcli.models.source import ModelSource
from quantcli.onnx.graph.opset import default_opset
from quantcli.onnx.plan.evidence import Evidence as GraphEvidence
from quantcli.planning.recipe import Recipe
from quantcli.search.budget import FLOAT
from quantcli.search.choices import ways_to_store
from quantcli.search.judge import Evidence
from quantcli.search.onnx_evidence import gather_evidence
from quantcli.search.onnx_runs import GraphRuns
from quantcli.search.onnx_trials import Stopwatch, Trials, Verdicts
from quantcli.search.onnx_ways import Ways, open_ways, uniform_recipe
from quantcli.system.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.onnx.plan.plan import GraphPlan


@dataclass
class GraphSubject:
    """A model that becomes ONNX, its data, and what can be measured of it.

    Attributes:
        model: as the user named it.
        output: where the artifact will be.
        recipe: the user's, whose own rules hold before those that are found.
        request: what is calibrated on, if anything.
        statistics: those of an earlier `calibrate`, or None.
        weights: the state dict of a function's module.
        allow: schemes to choose from.
        eval_data: what the result is judged on, if it is not a part of the data.
        metric: what judges it.
        folder: for everything that is written on the way.
        progress: called with samples done and in all while calibrating.
    """

    model: str
    output: Path
    recipe: Recipe
    request: DataRequest | None
    statistics: Path | None
    weights: Path | None
    allow: Sequence[str]
    eval_data: str | None
    metric: str | None
    folder: Path
    progress: Progress | None = None

    @cached_property
    def material(self) -> Material:
        """The model, opened. Raises UsageError where it is quantized already."""
        source = open_source(self.model, self.weights, Recipe(), self.request, self.folder / "export")
        if source.codes is not None:
            raise UsageError(f"{self.model} is quantized already: there is nothing to choose.", "Give the original.")
        return Material(source, self.statistics)

    @cached_property
    def source(self) -> ModelSource:
        """The graph under the user's name for the model, with whose tokenizer and preprocessing data is read."""
        return ModelSource(self.material.source.subject.path, "onnx", onnx=self.material.source.model)

    @cached_property
    def evidence(self) -> Evidence | None:
        """Samples to search by, and to judge by."""
        request = self.request
        subject = self.material.source.subject
        if request and request.tokenizer is None and is_text(request.data) and subject.kind == "checkpoint":
            request = replace(request, tokenizer=subject.folder)
        return gather_evidence(self.source, request, self.eval_data, self.metric)

    @cached_property
    def runs(self) -> GraphRuns:
        """Quick runs of the graph."""
        folder = self.folder / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        graph, plan = self._planned()
        outputs = self._outputs(graph, folder)
        statistics = None
        if plan is not None:
            samples, seed = self.material.samples(self.request), self.request.seed if self.request else 0
            statistics = self.material.statistics(graph, plan, samples, seed, self.progress)
        return GraphRuns(graph, self.material.source.model.path, GraphEvidence(statistics), outputs, folder)

    def _planned(self) -> tuple[ir.Model, GraphPlan | None]:
        """The graph in the operator set that all schemes can be written in, and its plan of static quantization."""
        found: list[tuple[ir.Model, GraphPlan]] = []
        base = Recipe(target=self.recipe.target)
        for label, rule in ways_to_store(self.recipe, self.allow).items():
            if label == FLOAT:
                continue
            try:
                found.append(self.material.planned(uniform_recipe(base, rule), self.request))
            except InputError:
                # The scheme applies to nothing here, or the runtime's version does not have it.
                continue
        if not found:
            raise BudgetError(f"{', '.join(self.allow)}: none applies to {self.model}.", "Name others with --allow.")
        static = next(((graph, plan) for graph, plan in found if plan.of_mode("static")), None)
        if static is not None and self.request is None and self.statistics is None:
            raise UsageError("--allow int8-static needs the ranges of activations.", "Give --data, or --calibration.")
        newest = max((graph for graph, _ in found), key=default_opset)
        if static is None or default_opset(static[0]) == default_opset(newest):
            return static or (newest, None)
        return newest, static[1]

    def _outputs(self, graph: ir.Model, folder: Path) -> OutputComparison:
        model = self.material.source.model.path
        if self.evidence is not None:
            feeds = of_samples(self.evidence.searched.samples, COMPARED_SAMPLES)
            return OutputComparison(model, feeds, folder, loose=True)
        reference = Session(model)
        found = self.material.made_up(reference, graph)
        if isinstance(found, NoFeeds):
            raise InputError(f"Nothing can be told of the outputs: {found.reason}", "Give --data.")
        outputs = OutputComparison(model, found, folder, made_up=True, loose=True)
        outputs.observe(reference)
        return outputs

    @cached_property
    def ways(self) -> Ways:
        """What each layer can become."""
        feeds, _ = next(iter(self.runs.outputs.feeds()))
        names = [node.outputs[0].name for node in self.runs.graph.graph if node.outputs[0].name]
        sizes = capture_activations(self.runs.graph, self.runs.folder).sizes([name for name in names if name], feeds)
        return open_ways(self.runs, self.recipe, self.allow, sizes)

    @cached_property
    def trials(self) -> Trials:
        """Conversions as the result will be converted."""
        folder = self.folder / "trials"
        return Trials(self.model, self.output, self.request, self.material, self.weights, folder)

    @cached_property
    def verdicts(self) -> Verdicts | None:
        """Judges of artifacts, where there is data."""
        if self.evidence is None:
            return None
        return Verdicts(self.source, self.material.source.model.path, self.evidence.held_out)

    @cached_property
    def stopwatch(self) -> Stopwatch:
        """Times artifacts beside the model."""
        feeds, _ = next(iter(self.runs.outputs.feeds()))
        return Stopwatch(self.material.source.model.path, feeds)
