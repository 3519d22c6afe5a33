"""`convert` to ONNX: prepare the graph, plan, calibrate, rewrite, write, reopen, run, and read back the kernels."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoints.folder import companions
from quantcli.errors import InputError, UsageError, VerificationError
from quantcli.functions import is_function
from quantcli.graph.model import MANIFEST_KEY, OnnxModel, constants, is_onnx, onnx_file, open_onnx
from quantcli.graph.placement import place
from quantcli.graph.plan import GraphPlan, require_work, resolve_graph
from quantcli.graph.prepare import QDQ_OPSET, prepare, upgrade
from quantcli.graph.save import checksums, save_graph
from quantcli.graph.targets import require_version
from quantcli.graph.transform import LayerOutcome, needed_opset, transform, without_outliers
from quantcli.memory import peak_rss_bytes
from quantcli.onnx_rows import layer_rows, left_rows
from quantcli.progress import Progress
from quantcli.recipe import Recipe
from quantcli.report import ModelRow, Report
from quantcli.staging import Staging, check_target, explain, open_staging, require_space
from quantcli.statistics import CalibrationStats
from quantcli.units import format_bytes
from quantcli.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.proof import Comparison
    from quantcli.samples import Samples

#: Samples that the artifact and its source both run at the end.
_COMPARED_SAMPLES = 8

#: Calibration samples where the user names no number: more changes ranges little.
DEFAULT_SAMPLES = 128

#: Outputs that keep this much are good enough for most uses; below, another scheme is tried.
GOOD_OUTPUT_SQNR_DB = 20.0

#: An artifact this much slower than its model is worth a word.
_SLOW = 0.8

#: By how much another scheme must be better to be recommended.
_BETTER_BY_DB = 3.0

#: The file's name where the output is a folder.
_FILE_IN_FOLDER = "model.onnx"


@dataclass(frozen=True)
class Calibration:
    """Where ranges come from: statistics of an earlier `calibrate`, or data to take them from now."""

    stats: Path | None = None
    data: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    tokenizer: Path | None = None
    preprocess: Path | None = None


def convert_onnx(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    calibration: Calibration,
    *,
    weights: Path | None = None,
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
    source = Path(model)
    if not is_function(str(model)):
        if not source.exists():
            raise InputError(f"{source} does not exist.")
        check_target(output, source if source.is_dir() else onnx_file(source), force=force or dry_run)
    elif output.exists() and not (force or dry_run):
        raise UsageError(f"The output {output} exists.", "Use --force to replace it.")
    with open_staging(output) as staging:
        staging.begin(_fingerprint(model, recipe), force=True)
        try:
            conversion = _Conversion(str(model), output, recipe, calibration, weights, version, progress)
            report = conversion.run(staging, dry_run=dry_run)
            if conversion.single_file and not (force or dry_run):
                _refuse_to_overwrite(staging.out, output)
        except OSError as error:
            raise explain(error, output) from error
        except UsageError:
            # Nothing here can be continued later.
            staging.discard()
            raise
        if dry_run:
            staging.discard()
        else:
            staging.publish(single_file=conversion.single_file)
    if not dry_run:
        report.details |= {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
    return report


def _refuse_to_overwrite(built: Path, output: Path) -> None:
    """Raise UsageError where a file of weights that goes beside a single file exists."""
    for file in built.iterdir():
        beside = output.parent / file.name
        if beside != output and beside.exists():
            raise UsageError(f"The output {beside} exists.", "Use --force to replace it.")


def _fingerprint(model: str | Path, recipe: Recipe) -> str:
    identity = {"quantcli": __version__, "model": str(model), "recipe": recipe.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


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
        progress: Progress | None,
    ) -> None:
        self.given, self.output, self.recipe, self.calibration = model, output, recipe, calibration
        self.weights, self.version, self.progress = weights, version, progress
        self.warnings: list[str] = []
        self.comparison: Comparison | None = None
        self.single_file = output.name if output.suffix == ".onnx" else None

    def run(self, staging: Staging, *, dry_run: bool) -> Report:
        """Do everything inside the staging folder."""
        original = self._open(staging.root)
        graph = prepare(original)
        plan = resolve_graph(self.recipe, graph, original.path)
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
        if dry_run:
            layers = [LayerOutcome(node, node.estimated_bytes, None) for node in plan.nodes]
            size = original.size_bytes - plan.saved_bytes
            return self._report(original, plan, layers, size, {"dry_run": True, "estimated": True}, {})
        samples = self._samples(original)
        statistics = self._statistics(original, graph, plan, samples)
        if statistics is not None:
            plan = without_outliers(plan, statistics)
            require_work(plan, original.path)
            used = place(graph, (node.node for node in plan.of_mode("static"))).values
            self.warnings += statistics.warnings({value.name or "" for value in used})
        self.warnings += plan.warnings
        before = sum(tensor.nbytes for tensor in constants(graph))
        outcomes = transform(graph, plan, statistics)
        require_space(self.output, sum(tensor.nbytes for tensor in constants(graph)))
        target = staging.out / (self.single_file or _FILE_IN_FOLDER)
        verified = self._write(graph, target)
        verified |= self._prove(target, original, samples)
        recommended = self._recommend(original, statistics, samples, staging.root)
        manifest = self._manifest(original, plan, outcomes, verified)
        graph.metadata_props[MANIFEST_KEY] = json.dumps(manifest, sort_keys=True)
        files = save_graph(graph, target)
        self._check_size(original, files, before)
        self._copy_companions(original, staging.out)
        size = sum(file.stat().st_size for file in files)
        details = {"verified": verified, "recommended": recommended}
        return self._report(original, plan, outcomes, size, details, self._metrics())

    def _open(self, folder: Path) -> OnnxModel:
        if is_onnx(Path(self.given)):
            return open_onnx(Path(self.given))
        from quantcli.export import export_to_onnx

        exported = export_to_onnx(
            self.given, folder / "export", data=self.calibration.data, weights=self.weights
        )  # fmt: skip
        self.warnings += exported.warnings
        return open_onnx(exported.path)

    def _samples(self, original: OnnxModel) -> Samples | None:
        if self.calibration.data is None:
            return None
        from quantcli.samples import load_samples

        found = load_samples(
            self.calibration.data,
            original.inputs,
            folder=self._folder(),
            tokenizer=self.calibration.tokenizer,
            preprocess=self.calibration.preprocess,
            samples=self.calibration.samples or DEFAULT_SAMPLES,
            seq_len=self.calibration.seq_len,
            seed=self.calibration.seed,
        )
        self.warnings += found.warnings
        return found

    def _folder(self) -> Path | None:
        """Where configuration and tokenizer are: beside the model."""
        if is_function(self.given):
            return None
        path = Path(self.given)
        return path if path.is_dir() else path.parent

    def _statistics(
        self, original: OnnxModel, graph: ir.Model, plan: GraphPlan, samples: Samples | None
    ) -> CalibrationStats | None:
        # Static layers need ranges; the biases of other convolutions profit from the means of what they read.
        static = plan.of_mode("static")
        read = [node.node.inputs[0] for node in plan.of_mode("weights") if node.node.op_type == "Conv"]
        if not static and not (read and (samples or self.calibration.stats)):
            return None
        from quantcli.calibrate import model_sha256
        from quantcli.collect import collect

        sha256 = model_sha256(self.given)
        if self.calibration.stats is not None:
            statistics = CalibrationStats.load(self.calibration.stats)
            statistics.require_model(sha256)
            return statistics
        assert samples is not None
        observed = None if static else list(dict.fromkeys(value.name for value in read if value and value.name))
        return collect(
            graph, samples, observed, model_sha256=sha256, seed=self.calibration.seed, progress=self.progress
        )

    def _write(self, graph: ir.Model, target: Path) -> dict[str, Any]:
        """Write, reopen, and compare every tensor. Raises VerificationError."""
        save_graph(graph, target)
        reopened = open_onnx(target)
        meant, found = checksums(graph), checksums(reopened.ir)
        if meant != found:
            wrong = sorted(name for name in meant.keys() | found.keys() if meant.get(name) != found.get(name))
            raise VerificationError(
                f"{wrong[0]} was read back otherwise than it was written.",
                "The disk may be failing; if it happens again elsewhere, please report it.",
            )
        return {"tensors": len(found), "codes": "equal"}

    def _prove(self, target: Path, original: OnnxModel, samples: Samples | None) -> dict[str, Any]:
        from quantcli.proof import compare_outputs, prove

        verified: dict[str, Any] = {"runtime": prove(target).to_json()}
        if samples is not None:
            self.comparison = found = compare_outputs(original.path, target, samples, _COMPARED_SAMPLES)
            # How long it took goes into the report alone: an artifact holds no times.
            verified["compared"] = {"samples": found.samples, "sqnr_db": found.sqnr_db}
            if found.speed is not None and found.speed < _SLOW:
                self.warnings.append(
                    f"On these samples the artifact ran {found.speed:.2g} times as fast as the model; quantcli bench "
                    "measures that properly."
                )
        return verified

    def _recommend(
        self,
        original: OnnxModel,
        statistics: CalibrationStats | None,
        samples: Samples | None,
        folder: Path,
    ) -> str | None:
        """The scheme to take: where fixed ranges lose much, dynamic ones are tried on the same samples.

        None where there is no data to tell from.
        """
        asked = self.recipe.scheme
        if self.comparison is None or samples is None or not isinstance(asked, str):
            return None
        kept = self.comparison.sqnr_db
        if asked != "int8-static" or kept is None or kept >= GOOD_OUTPUT_SQNR_DB:
            return asked
        from quantcli.proof import compare_outputs

        recipe = self.recipe.with_flags(scheme="int8-dynamic")
        graph = upgrade(prepare(original), QDQ_OPSET)
        transform(graph, resolve_graph(recipe, graph, original.path), statistics)
        other = folder / "alternative" / _FILE_IN_FOLDER
        other.parent.mkdir()
        save_graph(graph, other)
        better = compare_outputs(original.path, other, samples, _COMPARED_SAMPLES).sqnr_db
        if better is not None and better < kept + _BETTER_BY_DB:
            self.warnings.append(f"{asked} leaves the outputs at {kept:.1f} dB; int8-dynamic would at {better:.1f} dB.")
            return asked
        figure = "equal" if better is None else f"at {better:.1f} dB"
        self.warnings.append(
            f"{asked} leaves the outputs at {kept:.1f} dB; int8-dynamic leaves them {figure} and is recommended."
        )
        return "int8-dynamic"

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
        folder = Path(self.given)
        if self.single_file or not folder.is_dir():
            return
        for relative in companions(folder):
            if relative.as_posix() != "quantcli.json":
                destination = out / relative
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / relative, destination)

    def _manifest(
        self, original: OnnxModel, plan: GraphPlan, outcomes: Sequence[LayerOutcome], verified: Mapping[str, Any]
    ) -> dict[str, Any]:
        layers = {}
        for outcome in outcomes:
            node = outcome.plan
            entry: dict[str, Any] = {"node": node.node.name, "mode": node.mode}
            if node.scheme is not None:
                sqnr_db = outcome.sqnr_db
                entry |= {"scheme": node.label, "algorithm": node.algorithm, "note": node.note}
                entry["sqnr_db"] = None if sqnr_db is None else round(sqnr_db, 4)
            else:
                entry["reason"] = node.reason
            # A weight that several nodes read is one entry for each; all but the first go by their own names.
            name = node.name if node.name not in layers else node.node.name or node.name
            layers[name] = {key: value for key, value in entry.items() if value is not None}
        return {
            "quantcli": __version__,
            "input_sha256": original.sha256(),
            "format": "onnx",
            "scheme": plan.scheme,
            "algorithm": plan.algorithm,
            "recipe": self.recipe.model_dump(mode="json"),
            "layers": layers,
            "verified": dict(verified),
        }

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
        source = ModelRow(self.given, "reference", "onnx", None, original.sha256(), before)
        artifact = ModelRow(
            str(self.output), "candidate", "onnx", plan.scheme, None, size, metrics, {"algorithm": plan.algorithm}
        )
        return Report("convert", [source, artifact], rows, [], list(dict.fromkeys(self.warnings)), details)
