"""`convert` to ONNX: prepare the graph, plan, calibrate, rewrite, write, reopen, run, and read back the kernels."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.calibration.collect import DEFAULT_SAMPLES, collect
from quantcli.calibration.hessians import collect_hessians
from quantcli.calibration.statistics import CalibrationStats
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.hugging_face import companions
from quantcli.checkpoint.quantized import is_quantized, open_quantized
from quantcli.conversion.onnx.advice import recommend
from quantcli.conversion.onnx.comparison import Comparison, OutputComparison
from quantcli.conversion.onnx.repack import GivenCodes
from quantcli.conversion.onnx.rows import layer_entries, layer_rows, left_rows
from quantcli.conversion.staging import Staging, open_staging
from quantcli.core.manifest import MANIFEST_KEY, Manifest
from quantcli.data.fingerprint import fingerprint
from quantcli.data.request import Calibration
from quantcli.errors import InputError, UsageError
from quantcli.models.kernels import prove
from quantcli.models.source import open_subject, subject_sha256
from quantcli.onnx.graph.model import OnnxModel, constants, onnx_file, open_onnx
from quantcli.onnx.graph.opset import upgrade
from quantcli.onnx.graph.prepare import prepare
from quantcli.onnx.graph.save import add_metadata, read_back, save_graph
from quantcli.onnx.plan.judge import needed_opset, without_inputs, without_outliers
from quantcli.onnx.plan.placement import place
from quantcli.onnx.plan.plan import GraphPlan, counted, require_work
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.onnx.plan.runtime_version import require_version
from quantcli.onnx.rewrite.four_bit_storage import store_in_four_bits
from quantcli.onnx.rewrite.transform import LayerOutcome, transform
from quantcli.planning.recipe import Recipe, dequantizes
from quantcli.planning.steps import training_step
from quantcli.reporting.report import ModelRow, Report
from quantcli.system.files import check_target, explain, require_space
from quantcli.system.hardware import peak_rss_bytes
from quantcli.system.parallel import torch_threads
from quantcli.system.progress import Progress
from quantcli.system.text import format_bytes
from quantcli.system.user_functions import is_function
from quantcli.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.data.samples import Samples

#: Samples that the artifact and its source both run at the end.
_COMPARED_SAMPLES = 8

#: An artifact this much slower than its model is worth a word.
_SLOW = 0.8

#: The file's name where the output is a folder.
_FILE_IN_FOLDER = "model.onnx"


def convert_onnx(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    calibration: Calibration,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model into an ONNX file, or into a folder with ``model.onnx``, and prove what it became.

    Raises:
        UsageError: the wishes do not go together.
        InputError: the model or the data is missing or unsuitable, nothing was quantized, the file did not
            become smaller, or the runtime cannot load it.
        VerificationError: what was written is not what was meant.
    """
    started = time.monotonic()
    if recipe.format not in (None, "onnx"):
        raise UsageError(f"An ONNX model cannot be written as {recipe.format}.", "Leave --format out.")
    runtime, version = recipe.runtime
    if runtime not in (None, "onnxruntime"):
        raise UsageError(f"{runtime} does not load ONNX.", "Use --target onnxruntime, or another format.")
    _check_places(str(model), output, force=force or dry_run)
    trains = training_step(recipe) is not None
    with open_staging(output) as staging:
        if not trains:
            staging.begin_anew()
        try:
            conversion = _Conversion(str(model), output, recipe, calibration, weights, version, device, progress)
            report = conversion.run(staging, dry_run=dry_run, force=force)
            if conversion.single_file and not (force or dry_run):
                _refuse_to_overwrite(staging.out, output)
        except OSError as error:
            raise explain(error, output) from error
        except UsageError:
            # Nothing here can be continued later, unless something was being trained.
            if not staging.checkpoint.exists():
                staging.discard()
            raise
        if not dry_run:
            staging.publish(single_file=conversion.single_file)
        elif not staging.checkpoint.exists():
            staging.discard()
    if not dry_run:
        report.details |= {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
    return report


def _check_places(model: str, output: Path, *, force: bool) -> None:
    """Raise InputError where there is no model, UsageError where the output may not be written."""
    source = Path(model)
    if not is_function(model):
        if not source.exists():
            raise InputError(f"{source} does not exist.")
        check_target(output, source if source.is_dir() else onnx_file(source), force=force)
    elif output.exists() and not force:
        raise UsageError(f"The output {output} exists.", "Use --force to replace it.")


def _refuse_to_overwrite(built: Path, output: Path) -> None:
    """Raise UsageError where a file of weights that goes beside a single file exists."""
    for file in built.iterdir():
        beside = output.parent / file.name
        if beside != output and beside.exists():
            raise UsageError(f"The output {beside} exists.", "Use --force to replace it.")


class _Conversion:
    """One run: the state its steps share."""

    def __init__(
        self,
        model: str,
        output: Path,
        recipe: Recipe,
        calibration: Calibration,
        weights: Path | None,
        version: str | None,
        device: str,
        progress: Progress | None,
    ) -> None:
        self.output, self.recipe, self.calibration = output, recipe, calibration
        self.version, self.device, self.progress = version, device, progress
        self.training: dict[str, Any] | None = None
        self.warnings: list[str] = []
        self.comparison: Comparison | None = None
        self.origin: dict[str, Any] | None = None
        self.subject = open_subject(model, weights)
        self.codes = self._given_codes()
        self.single_file = output.name if output.suffix == ".onnx" else None

    def _given_codes(self) -> GivenCodes | None:
        """The codes of a checkpoint that is quantized, unless they are to be values again."""
        checkpoint = self.subject.checkpoint
        if checkpoint is None or not is_quantized(checkpoint):
            return None
        coded = open_quantized(checkpoint)
        self.origin = DecodedCheckpoint(coded).origin() | {"sha256": checkpoint.sha256()}
        return None if dequantizes(self.recipe) else GivenCodes(checkpoint, coded, self.recipe)

    def run(self, staging: Staging, *, dry_run: bool, force: bool = False) -> Report:
        """Do everything inside the staging folder."""
        original = self._open(staging.root)
        graph, plan = self._planned(original)
        if dry_run:
            layers = [LayerOutcome(node, node.estimated_bytes, None) for node in plan.nodes]
            size = original.size_bytes - plan.saved_bytes
            return self._report(original, plan, layers, size, {"dry_run": True, "estimated": True}, {})
        everything = self._samples(original)
        samples = everything.spread(DEFAULT_SAMPLES) if everything is not None and self.trains else everything
        statistics = self._statistics(original, graph, plan, samples)
        if statistics is not None:
            plan = without_outliers(plan, statistics)
            require_work(plan, original.path)
        hessians = None
        if plan.needs_inputs and samples is not None:
            hessians = collect_hessians(graph, plan, samples, staging.root / "hessians", progress=self.progress)
            plan = without_inputs(plan, hessians)
        placement = place(graph, (node.node for node in plan.of_mode("static")))
        self.warnings += statistics.warnings({value.name or "" for value in placement.values}) if statistics else []
        before = sum(tensor.nbytes for tensor in constants(graph))
        unquantized = graph.clone() if self.trains else None
        with torch_threads():
            outcomes = transform(graph, plan, statistics, placement, hessians, self.codes)
        if unquantized is not None and everything is not None:
            outcomes = self._train(staging, original, unquantized, graph, everything, outcomes, force=force)
        store_in_four_bits(graph)
        plan = replace(plan, nodes=tuple(outcome.plan for outcome in outcomes))
        self.warnings += [*plan.warnings, *counted(outcome.warning for outcome in outcomes)]
        target = staging.out / (self.single_file or _FILE_IN_FOLDER)
        files = self._save(graph, target)
        verified = {**read_back(graph, target), "runtime": prove(target).to_json()}
        recommended = None
        if samples is not None:
            outputs = OutputComparison(original.path, samples, _COMPARED_SAMPLES, staging.root)
            verified["compared"] = self._compare(outputs, target)
            assert self.comparison is not None
            kept_db = self.comparison.sqnr_db
            recommended, said = recommend(self.recipe, original, statistics, hessians, outputs, kept_db, staging.root)
            self.warnings += said
        manifest = self._manifest(original, plan, outcomes, verified)
        seen = statistics.provenance.fingerprint if statistics else None
        if everything is not None and (self.trains or (hessians is not None and seen is None)):
            seen = fingerprint(sample.inputs for sample in everything)
        manifest.calibration_fingerprint = seen
        add_metadata(target, MANIFEST_KEY, json.dumps(manifest.to_json(), sort_keys=True))
        self._check_size(original, files, before)
        self._copy_companions(original, staging.out)
        size = sum(file.stat().st_size for file in files)
        details = {"verified": verified, "recommended": recommended}
        details |= {"training": self.training} if self.training else {}
        return self._report(original, plan, outcomes, size, details, self._metrics())

    def _save(self, graph: ir.Model, target: Path) -> list[Path]:
        require_space(self.output, sum(tensor.nbytes for tensor in constants(graph)))
        # What an earlier conversion, a cast, wrote of itself.
        graph.metadata_props.pop(MANIFEST_KEY, None)
        return save_graph(graph, target)

    def _open(self, folder: Path) -> OnnxModel:
        if self.subject.onnx is not None:
            return self.subject.onnx
        from quantcli.export.export import export_to_onnx

        given, data = self.subject, self.calibration.data
        exported = export_to_onnx(given.path, folder / "export", data=data, weights=given.weights)
        self.warnings += exported.warnings
        return open_onnx(exported.path)

    def _planned(self, original: OnnxModel) -> tuple[ir.Model, GraphPlan]:
        """The graph to work on, in the operator set it needs, and what becomes of it."""
        graph = prepare(original, fold=self.codes is None)
        plan = self.codes.plan(graph, original.path) if self.codes else resolve_graph(self.recipe, graph, original.path)
        opset = needed_opset(plan)
        if self.version:
            require_version(plan, graph, opset, self.version)
        if opset > original.opset:
            graph = upgrade(graph, opset)
            plan = resolve_graph(self.recipe, graph, original.path)
        if plan.of_mode("static") and not (self.calibration.stats or self.calibration.data):
            raise UsageError(
                f"{plan.scheme} needs the ranges of activations.",
                "Give --data DATA to take them now, or --calibration STATS from quantcli calibrate.",
            )
        if self.trains and not self.calibration.data:
            raise UsageError("qat learns from data.", "Name some with --data; nothing is fetched or made up.")
        if plan.needs_inputs and not self.calibration.data:
            why = "STATS hold the ranges of activations alone." if self.calibration.stats else None
            raise UsageError("gptq needs calibration data: give --data.", why)
        return graph, plan

    def _samples(self, original: OnnxModel) -> Samples | None:
        if self.calibration.data is None:
            return None
        from quantcli.data.samples import load_samples

        found = load_samples(
            self.calibration.data,
            original.inputs,
            folder=self.subject.folder,
            tokenizer=self.calibration.tokenizer,
            preprocess=self.calibration.preprocess,
            samples=self.calibration.samples or (None if self.trains else DEFAULT_SAMPLES),
            seq_len=self.calibration.seq_len,
            seed=self.calibration.seed,
        )
        self.warnings += found.warnings
        return found

    def _statistics(
        self, original: OnnxModel, graph: ir.Model, plan: GraphPlan, samples: Samples | None
    ) -> CalibrationStats | None:
        # Static layers need ranges; the biases of other convolutions profit from the means of what they read.
        static = plan.of_mode("static")
        read = [node.node.inputs[0] for node in plan.of_mode("weights") if node.node.op_type == "Conv"]
        if not static and not (read and (samples or self.calibration.stats)):
            return None
        sha256 = subject_sha256(self.subject)
        if self.calibration.stats is not None:
            statistics = CalibrationStats.load(self.calibration.stats)
            statistics.require_model(sha256)
            return statistics
        assert samples is not None
        observed = None if static else list(dict.fromkeys(value.name for value in read if value and value.name))
        return collect(
            graph, samples, observed, model_sha256=sha256, seed=self.calibration.seed, progress=self.progress
        )

    @property
    def trains(self) -> bool:
        """Whether the recipe trains what was quantized."""
        return training_step(self.recipe) is not None

    def _train(
        self,
        staging: Staging,
        original: OnnxModel,
        unquantized: ir.Model,
        graph: ir.Model,
        samples: Samples,
        outcomes: Sequence[LayerOutcome],
        *,
        force: bool,
    ) -> list[LayerOutcome]:
        """Train the quantized graph, going on where the same command was interrupted."""
        from quantcli.training.onnx import fingerprint as training_fingerprint
        from quantcli.training.onnx import train_layers

        step = training_step(self.recipe)
        assert step is not None
        staging.begin(training_fingerprint(self.recipe, original, samples, self.calibration, self.device), force=force)
        trained, history = train_layers(
            unquantized,
            graph,
            outcomes,
            samples,
            step.options,
            seed=self.calibration.seed,
            device=self.device,
            checkpoint=staging.checkpoint,
            progress=self.progress,
        )
        self.training = history.to_json()
        self.warnings += history.warnings
        return trained

    def _compare(self, outputs: OutputComparison, target: Path) -> dict[str, Any]:
        self.comparison = found = outputs.against(target)
        if found.speed is not None and found.speed < _SLOW:
            self.warnings.append(
                f"On these samples the artifact ran {found.speed:.2g} times as fast as the model; quantcli bench "
                "measures that properly."
            )
        # How long it took goes into the report alone: an artifact holds no times.
        return {"samples": found.samples, "sqnr_db": found.sqnr_db}

    def _metrics(self) -> dict[str, float | None]:
        found = self.comparison
        return {"output_sqnr_db": found.sqnr_db, "speed": found.speed} if found else {}

    def _check_size(self, original: OnnxModel, files: Sequence[Path], weights_before: int) -> None:
        size, before = sum(file.stat().st_size for file in files), original.size_bytes
        if size >= before:
            raise InputError(
                f"The artifact would have {format_bytes(size)}, and the model has {format_bytes(before)}: of that, "
                f"{format_bytes(weights_before)} are weights. Nothing was written.",
                "It is too small a model for this scheme.",
            )

    def _copy_companions(self, original: OnnxModel, out: Path) -> None:
        folder = Path(self.subject.path)
        if self.single_file or not folder.is_dir():
            return
        for relative in companions(folder):
            if relative.as_posix() != "quantcli.json":
                destination = out / relative
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / relative, destination)

    def _manifest(
        self, original: OnnxModel, plan: GraphPlan, outcomes: Sequence[LayerOutcome], verified: Mapping[str, Any]
    ) -> Manifest:
        return Manifest(
            quantcli=__version__,
            input_sha256=original.sha256(),
            format="onnx",
            scheme=plan.scheme,
            algorithm=plan.algorithm,
            recipe=self.recipe.model_dump(mode="json"),
            source=self.origin or None,
            layers=layer_entries(outcomes),
            verified=dict(verified),
        )

    def _report(
        self,
        original: OnnxModel,
        plan: GraphPlan,
        outcomes: Sequence[LayerOutcome],
        size: int,
        details: dict[str, Any],
        metrics: dict[str, float | None],
    ) -> Report:
        before = original.size_bytes
        rows = layer_rows(outcomes) + left_rows(original.ir, plan, original.path)
        measured = [row.sqnr_db for row in rows if row.sqnr_db is not None]
        metrics = {
            "size_ratio": size / before,
            "sqnr_db_min": min(measured, default=None),
            **metrics,
        }
        source = ModelRow(self.subject.path, "reference", "onnx", None, original.sha256(), before)
        artifact = ModelRow(
            str(self.output), "candidate", "onnx", plan.scheme, None, size, metrics, {"algorithm": plan.algorithm}
        )
        return Report("convert", [source, artifact], rows, [], list(dict.fromkeys(self.warnings)), details)
