"""`convert` to ONNX: prepare the graph, plan, calibrate, rewrite, write, reopen, run, and read back the kernels."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.calibration.collect import DEFAULT_SAMPLES
from quantcli.calibration.histograms import activation_histograms
from quantcli.calibration.statistics import CalibrationStats
from quantcli.checkpoint.config_file import config_of
from quantcli.conversion.onnx.advice import Advice, advise
from quantcli.conversion.onnx.comparison import COMPARED_SAMPLES, Comparison, OutputComparison, reference_of
from quantcli.conversion.onnx.evidence import Gathered, Material, gather
from quantcli.conversion.onnx.explained import Honest
from quantcli.conversion.onnx.folder import copy_companions, layout_of
from quantcli.conversion.onnx.guard import Attempt, Guard, Protection
from quantcli.conversion.onnx.histograms import weight_histograms
from quantcli.conversion.onnx.journal import CodesJournal, begin
from quantcli.conversion.onnx.memory import require_bounded_model, require_bounded_plan
from quantcli.conversion.onnx.result import Result, require_smaller
from quantcli.conversion.onnx.source import Source, open_source
from quantcli.conversion.onnx.trial_inputs import NoFeeds, of_samples
from quantcli.conversion.onnx.with_cache import prove_cache, with_head_scheme, write_decoder_config
from quantcli.conversion.staging import Staging, open_staging, refuse_to_overwrite
from quantcli.core.manifest import MANIFEST_KEY
from quantcli.data.fingerprint import fingerprint
from quantcli.data.request import DataRequest
from quantcli.errors import InputError, UsageError
from quantcli.models.kernels import prove
from quantcli.onnx.graph.casts import bytes_of_constants
from quantcli.onnx.graph.model import OnnxModel, constants, is_onnx, onnx_file
from quantcli.onnx.graph.save import add_metadata, read_back, save_graph
from quantcli.onnx.plan.plan import GraphPlan, LayerOutcome, require_work
from quantcli.onnx.rewrite.four_bit_storage import store_in_four_bits
from quantcli.onnx.rewrite.short_names import own_names, shorten_names
from quantcli.onnx.rewrite.transform import transform
from quantcli.onnx.weights.finite import require_finite
from quantcli.planning.recipe import Recipe
from quantcli.planning.steps import training_step
from quantcli.planning.targets import require_onnx
from quantcli.planning.targets.base import OnnxLayout
from quantcli.reporting.report import Report
from quantcli.system import ranks
from quantcli.system.files import check_target, explain, require_space
from quantcli.system.hardware import peak_rss_bytes
from quantcli.system.parallel import torch_threads
from quantcli.system.progress import Progress
from quantcli.system.user_functions import is_function

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.data.samples import Samples
    from quantcli.training.loop import History


@dataclass(frozen=True)
class _Job:
    """What the user asks for."""

    model: str
    output: Path
    recipe: Recipe
    data: DataRequest | None
    statistics: Path | None
    weights: Path | None
    device: str
    dry_run: bool
    force: bool
    allow_larger: bool
    histograms: int
    progress: Progress | None
    material: Material | None = None
    guard: Guard | None = None
    cache: bool = False

    @property
    def trains(self) -> bool:
        """Whether the recipe trains what was quantized."""
        return training_step(self.recipe) is not None

    @property
    def continues(self) -> bool:
        """Whether a run goes on where an interrupted one stopped: codes come of the weights of a file alone."""
        if self.trains or self.data or self.statistics or is_function(self.model):
            return False
        return is_onnx(Path(self.model))

    @property
    def single_file(self) -> str | None:
        """The name of the output where it is a file, None where it is a folder."""
        return self.output.name if self.output.suffix == ".onnx" else None

    @property
    def config(self) -> dict[str, Any] | None:
        """The config.json of the model, if that is a folder with one."""
        return None if is_function(self.model) else config_of(Path(self.model))


def convert_onnx(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    data: DataRequest | None,
    statistics: Path | None,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    allow_larger: bool = False,
    histograms: int = 0,
    progress: Progress | None = None,
    material: Material | None = None,
    guard: Guard | None = None,
    cache: bool = False,
) -> Report:
    """Quantize a model into an ONNX file, or into a folder with ``model.onnx``, and prove what it became.

    ``material`` is the model as it was opened for other conversions on the same data; ``guard`` looks after artifacts
    with fixed ranges. ``cache``: a causal language model of a folder keeps its key-value cache.

    Raises:
        UsageError: the wishes do not go together.
        InputError: the model or the data is missing or unsuitable, nothing was quantized, the file did not
            become smaller, or the runtime cannot load it.
        VerificationError: what was written is not what was meant.
    """
    started = time.monotonic()
    job = _Job(
        str(model), output, recipe, data, statistics, weights, device, dry_run, force, allow_larger, histograms,
        progress, material, guard, cache,
    )  # fmt: skip
    _check_request(job)
    with open_staging(output) as staging:
        if not (job.trains or job.continues):
            staging.begin_anew()
        try:
            report = _convert(job, staging)
            if job.single_file and not (force or dry_run):
                refuse_to_overwrite(staging.out, output)
        except OSError as error:
            raise explain(error, output) from error
        except UsageError:
            if staging.is_no_loss:
                staging.discard()
            raise
        if not dry_run:
            staging.publish(single_file=job.single_file)
        elif not staging.is_interrupted:
            staging.discard()
    if not dry_run:
        report.details |= {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
    return report


def _convert(job: _Job, staging: Staging) -> Report:
    """The stages of a conversion, inside the staging folder."""
    material = job.material or Material(
        open_source(job.model, job.weights, job.recipe, job.data, staging.root / "export", cache=job.cache),
        job.statistics,
    )
    if material.source.cached and material.source.codes is None:
        job = replace(job, recipe=with_head_scheme(job.recipe, material.source.model.ir))
    graph, plan = material.planned(job.recipe, job.data, trains=job.trains)
    _require_data(job, plan)
    require_bounded_plan(plan, data=bool(job.data or job.statistics), trains=job.trains)
    if job.dry_run:
        return _estimate(job, material.source, plan)
    journal = begin(staging, material.source.model, job.recipe, force=job.force) if job.continues else None
    built = _build(job, staging, material, graph, plan, journal)
    protection = job.guard.protect(built.attempt) if job.guard and built.attempt else None
    if protection is not None:
        built.remove()
        job = replace(job, recipe=protection.recipe)
        built = _build(job, staging, material, *material.planned(job.recipe, job.data))
    if job.guard and built.attempt and not job.force:
        job.guard.require_speed(built.attempt)
    return _finish(job, staging, material, built, protection)


@dataclass(frozen=True)
class _Built:
    """An artifact that was written, proven and compared, and what it was made by.

    ``attempt`` is set where its outputs were compared on data, and it was not trained.
    """

    files: Sequence[Path]
    samples: Samples | None
    gathered: Gathered
    outcomes: Sequence[LayerOutcome]
    history: History | None
    verified: dict[str, Any]
    outputs: OutputComparison
    compared: Comparison
    doubts: Sequence[str]
    honest: Honest
    attempt: Attempt | None
    weights_before: int

    def remove(self) -> None:
        """Delete the files."""
        for file in self.files:
            file.unlink()


def _build(
    job: _Job,
    staging: Staging,
    material: Material,
    graph: ir.Model,
    plan: GraphPlan,
    journal: CodesJournal | None = None,
) -> _Built:
    """Carry out a plan: calibrate, rewrite, write, reopen, run."""
    require_finite(plan)
    source, samples = material.source, material.samples(job.data, trains=job.trains)
    calibrating = samples.spread(DEFAULT_SAMPLES) if samples is not None and job.trains else samples
    folder, seed = staging.root / "hessians", job.data.seed if job.data else 0
    gathered = gather(material, graph, plan, calibrating, seed, folder, job.progress)
    ranks.finish()
    weights_before = bytes_of_constants(graph)
    unquantized = graph.clone() if job.trains else None
    honest = Honest(graph, gathered.plan, gathered.evidence)
    with torch_threads():
        scratch = None if job.trains else staging.root / "codes"
        outcomes = transform(graph, gathered.plan, replace(gathered.evidence, journal=journal), scratch)
    # Halves may have been none that hold a weight's values.
    require_work(gathered.plan.carried_out(outcomes), Path(source.subject.path))
    history = None
    if unquantized is not None and samples is not None:
        outcomes, history = _train(job, staging, source.model, unquantized, graph, samples, outcomes)
        gathered = replace(gathered, fingerprint=fingerprint(sample.inputs for sample in samples))
    store_in_four_bits(graph)
    shorten_names(graph, own_names(honest.graph))

    layout = layout_of(job.output, gathered.plan)
    target = staging.out / layout.file
    files = _save(graph, target, layout, job.output)
    verified = {**read_back(graph, target), "runtime": prove(target, str(job.output)).to_json()}
    outputs = _outputs(material, honest, calibrating, staging.root)
    compared = outputs.against(target, str(job.output))
    doubts = [] if job.trains else honest.require(outcomes, outputs, compared, target)
    if source.cached:
        verified["decoder"] = prove_cache(target, honest, source, staging.root)
    attempt = None
    if calibrating is not None:
        verified["compared"] = compared.to_json()
        if not job.trains:
            evidence = gathered.evidence
            attempt = Attempt(job.recipe, source.model.path, honest.graph, evidence, outputs, compared, target)
    return _Built(
        files, samples, gathered, outcomes, history, verified, outputs, compared, doubts, honest, attempt,
        weights_before,
    )  # fmt: skip


def _finish(job: _Job, staging: Staging, material: Material, built: _Built, protection: Protection | None) -> Report:
    """Write the manifest, and report what an artifact became. Raises InputError where it is no smaller."""
    source, gathered, compared, advice = material.source, built.gathered, built.compared, Advice()
    done, on_data = gathered.plan.carried_out(built.outcomes), "compared" in built.verified
    if on_data:
        data, kept = material.loader(job.data, trains=job.trains), compared.sqnr_db
        advice = advise(job.recipe, source.model, data, gathered.evidence, built.outputs, kept, staging.root)
    result = Result(source, job.output, done, built.outcomes, built.verified, compared if on_data else None)
    source.model.require_unchanged()
    if built.samples is not None:
        built.samples.require_unchanged()
    manifest = result.manifest(gathered.fingerprint)
    add_metadata(built.files[0], MANIFEST_KEY, json.dumps(manifest.to_json(), sort_keys=True))
    size = sum(file.stat().st_size for file in built.files)
    if not job.allow_larger:
        require_smaller(size, source.model.size_bytes, built.weights_before)
    folder = Path(source.subject.path)
    lacking: list[str] = []
    if not job.single_file and folder.is_dir():
        lacking = copy_companions(folder, staging.out, layout_of(job.output, done), outside=len(built.files) > 1)
    if source.cached:
        lacking += write_decoder_config(folder, staging.out, layout_of(job.output, done))

    stages = (source, built.samples, gathered, built.history, done, protection, compared, advice)
    told = (warning for stage in stages if stage is not None for warning in stage.warnings)
    warnings = [*built.doubts, *lacking, *told]
    outputs_told = {"compared": True, "made_up": compared.made_up} | compared.to_json()
    details: dict[str, Any] = {"verified": built.verified, "recommended": advice.scheme, "outputs": outputs_told}
    details |= {} if protection is None else {"protected": dict(protection.details)}
    if built.history is not None:
        details["training"] = built.history.to_json()
    details |= _histograms(job, built.honest, built.outcomes, gathered)
    return result.report(size, warnings, details, manifest, built.files[0])


def _histograms(job: _Job, honest: Honest, outcomes: Sequence[LayerOutcome], gathered: Gathered) -> dict[str, Any]:
    """What a page shows of the worst weights and activations, where one is asked for."""
    if not job.histograms:
        return {}
    found, statistics = weight_histograms(honest.graph, outcomes, job.histograms), gathered.evidence.statistics
    if isinstance(statistics, CalibrationStats):
        found += activation_histograms(statistics, job.histograms)
    return {"histograms": found}


def _outputs(material: Material, honest: Honest, samples: Samples | None, folder: Path) -> OutputComparison:
    """What outputs are compared on: the data, or made-up inputs.

    Raises:
        InputError: there is no data, and the model runs on nothing that is made up.
    """
    source, loose = material.source, honest.shapes_depend_on_values
    model, name = source.model.path, source.subject.path
    if samples is not None:
        some, told = of_samples(samples, COMPARED_SAMPLES), lambda: samples.warnings
        return OutputComparison(model, some, folder, name=name, loose=loose, notes=told)
    reference = reference_of(model, name)
    feeds = material.made_up(reference, honest.graph)
    if isinstance(feeds, NoFeeds):
        raise feeds.refusal()
    outputs = OutputComparison(model, feeds, folder, name=name, made_up=True, loose=loose)
    outputs.observe(reference)
    return outputs


def _check_request(job: _Job) -> None:
    """Refuse what cannot be done before anything is opened.

    Raises:
        InputError: there is no model.
        UsageError: the output may not be written, or the format or target is none of ONNX.
    """
    if job.recipe.format not in (None, "onnx"):
        raise UsageError(f"An ONNX model cannot be written as {job.recipe.format}.", "Leave --format out.")
    require_onnx(job.recipe, job.config, job.output)
    source = None if is_function(job.model) else Path(job.model)
    if source is not None and not source.exists():
        raise InputError(f"{source} does not exist.")
    read = source if source is None or source.is_dir() else onnx_file(source)
    check_target(job.output, read, force=job.force or job.dry_run)
    require_bounded_model(job.model)


def _require_data(job: _Job, plan: GraphPlan) -> None:
    """Raise UsageError where a plan, or a training, needs data that is not given."""
    if plan.of_mode("static") and not (job.statistics or job.data):
        raise UsageError(
            f"{plan.scheme} needs the ranges of activations.",
            "Give --data DATA to take them now, or --calibration STATS from quantcli calibrate.",
        )
    if job.trains and not job.data:
        raise UsageError("qat learns from data.", "Name some with --data; nothing is fetched or made up.")
    if plan.needs_inputs and not job.data:
        why = "STATS hold the ranges of activations alone." if job.statistics else None
        raise UsageError("gptq needs calibration data: give --data.", why)


def _estimate(job: _Job, source: Source, plan: GraphPlan) -> Report:
    """What a plan would become."""
    outcomes = [LayerOutcome(node, node.estimated_bytes) for node in plan.nodes]
    result = Result(source, job.output, plan, outcomes)
    details = {"dry_run": True, "estimated": True}
    return result.report(source.model.size_bytes - plan.saved_bytes, source.warnings, details)


def _train(
    job: _Job,
    staging: Staging,
    model: OnnxModel,
    unquantized: ir.Model,
    quantized: ir.Model,
    samples: Samples,
    outcomes: Sequence[LayerOutcome],
) -> tuple[list[LayerOutcome], History]:
    """Train the quantized graph, going on where the same command was interrupted."""
    from quantcli.training.onnx import fingerprint as training_fingerprint
    from quantcli.training.onnx import train_layers
    from quantcli.training.run import Run

    step = training_step(job.recipe)
    assert step is not None and job.data is not None
    seed = job.data.seed
    identity = training_fingerprint(job.recipe, model, samples, job.statistics, seed, job.device)
    staging.begin(identity, force=job.force)
    run = Run.followed_by(job.progress, seed, job.device, staging.checkpoint)
    return train_layers(unquantized, quantized, outcomes, samples, step.options, run)


def _save(graph: ir.Model, target: Path, layout: OnnxLayout, output: Path) -> list[Path]:
    """Write the graph where the disk of the output has room for it."""
    require_space(output, sum(tensor.nbytes for tensor in constants(graph)))
    graph.metadata_props.pop(MANIFEST_KEY, None)  # of an earlier conversion, a cast
    target.parent.mkdir(exist_ok=True)
    return save_graph(graph, target, layout.data)
