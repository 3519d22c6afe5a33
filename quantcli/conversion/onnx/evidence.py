"""What a conversion learns of activations before it chooses codes, and what that changes in its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.calibration.collect import DEFAULT_SAMPLES, collect
from quantcli.calibration.hessians import collect_hessians
from quantcli.calibration.statistics import CalibrationStats
from quantcli.conversion.onnx.source import Source, planned_graph
from quantcli.conversion.onnx.trial_inputs import Feeds, NoFeeds, made_up
from quantcli.core.ports import without_cache
from quantcli.data.fingerprint import fingerprint
from quantcli.data.request import DataRequest
from quantcli.models.decoder import empty_cache, sized_cache
from quantcli.models.pieces import Runnable
from quantcli.models.source import source_sha256
from quantcli.onnx.graph.opset import default_opset
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.judge import without_inputs, without_outliers
from quantcli.onnx.plan.placement import place
from quantcli.onnx.plan.plan import GraphPlan, require_work
from quantcli.planning.recipe import Recipe
from quantcli.system import ranks
from quantcli.system.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.data.samples import Samples


@dataclass(frozen=True)
class Gathered:
    """Evidence, the plan that stands in its light, and what the data is told apart by."""

    plan: GraphPlan
    evidence: Evidence
    fingerprint: Mapping[str, Any] | None
    warnings: tuple[str, ...]


@dataclass
class Material:
    """What several conversions of one model on the same data share: it is opened, and observed, once.

    Attributes:
        source: the model.
        stats: statistics of an earlier `calibrate`, or None.
    """

    source: Source
    stats: Path | None = None
    _samples: dict[int | None, Samples] = field(default_factory=dict, repr=False)
    _collected: dict[tuple[object, ...], CalibrationStats] = field(default_factory=dict, repr=False)

    def samples(self, data: DataRequest | None, *, trains: bool = False) -> Samples | None:
        """The samples that the user gave, if any; a training takes all of them.

        Raises:
            InputError: they are missing, damaged or do not suit the model.
        """
        if data is None:
            return None
        request = data.at_most(None if trains else DEFAULT_SAMPLES)
        if request.samples not in self._samples:
            self._samples[request.samples] = self._loaded(request)
        return self._samples[request.samples]

    def _loaded(self, request: DataRequest) -> Samples:
        """Samples, beside an empty cache where the model is a decoder with one."""
        from quantcli.data.beside_cache import BesideCache
        from quantcli.data.samples import choose_samples, open_source

        model = self.source.model
        found = open_source(request, without_cache(model.inputs), folder=self.source.subject.folder)
        cache = empty_cache(sized_cache(model.inputs, model.path), 1)
        return choose_samples(request, BesideCache(found, cache) if cache else found)

    def made_up(self, reference: Runnable, graph: ir.Model) -> Feeds | NoFeeds:
        """Inputs where there is no data: like those that the statistics are of, where there are some.

        Raises:
            InputError: the statistics are damaged.
        """
        return made_up(reference, graph, draws=CalibrationStats.load(self.stats).draws() if self.stats else None)

    def loader(self, data: DataRequest | None, *, trains: bool = False) -> Callable[[], Samples | None]:
        """What loads the samples when they are first needed."""
        return partial(self.samples, data, trains=trains)

    def planned(self, recipe: Recipe, data: DataRequest | None, *, trains: bool = False) -> tuple[ir.Model, GraphPlan]:
        """The graph that a recipe works on, and what becomes of it. Raises as `planned_graph`."""
        loader = self.loader(data, trains=trains)
        return planned_graph(self.source.model, recipe, loader, self.source.codes)

    def statistics(
        self, graph: ir.Model, plan: GraphPlan, samples: Samples | None, seed: int, progress: Progress | None
    ) -> CalibrationStats | None:
        """What a plan needs to know of activations; None where that is nothing.

        Raises:
            InputError: statistics are another model's, or the graph cannot be run.
        """
        # Static layers need ranges; the biases of other convolutions profit from the means of what they read.
        static = plan.of_mode("static")
        read = [node.data for node in plan.of_mode("weights") if node.node.op_type == "Conv"]
        if not static and not (read and (samples or self.stats)):
            return None
        sha256 = source_sha256(self.source.subject)
        if self.stats is not None:
            statistics = CalibrationStats.load(self.stats)
            statistics.require_model(sha256)
            return statistics
        assert samples is not None
        observed = None if static else tuple(dict.fromkeys(name for name in read if name))
        # The runtime fuses around what it returns, so that other wishes may give other last bits.
        key = default_opset(graph), observed, len(samples), seed
        if key not in self._collected:
            self._collected[key] = collect(graph, samples, observed, model_sha256=sha256, seed=seed, progress=progress)
        return self._collected[key]


def gather(
    material: Material,
    graph: ir.Model,
    plan: GraphPlan,
    samples: Samples | None,
    seed: int,
    folder: Path,
    progress: Progress | None,
) -> Gathered:
    """Take the statistics and Hessians that a plan needs; layers that they speak against are planned otherwise.

    ``graph`` is the one that the plan was made for, and is left as it is. Statistics are taken from ``samples`` unless
    the material holds those of an earlier `calibrate`; Hessians are kept in ``folder``.

    Raises:
        InputError: statistics are another model's, the graph cannot be run, or nothing is left to be quantized.
    """
    source, statistics = material.source, material.statistics(graph, plan, samples, seed, progress)
    if statistics is not None:
        plan = without_outliers(plan, statistics)
        require_work(plan, source.model.shown)
    hessians = None
    if plan.needs_inputs and samples is not None:
        hessians = collect_hessians(graph, plan, samples, folder, progress=progress)
        plan = without_inputs(plan, hessians)
    warnings: list[str] = []
    if statistics is not None:
        placed = place(graph, (node.node for node in plan.of_mode("static"))).values
        warnings = statistics.warnings({value.name or "" for value in placed})
    seen = statistics.provenance.fingerprint if statistics else None
    if hessians is not None and samples is not None and seen is None:
        seen = ranks.first(lambda: fingerprint(sample.inputs for sample in samples))
    return Gathered(plan, Evidence(statistics, hessians, source.codes), seen, tuple(warnings))
