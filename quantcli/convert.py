"""`convert`: plan, stream every tensor through its algorithm into its format, verify, publish."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.artifact import Destination, Layout, plan_layout
from quantcli.checkpoints.folder import Checkpoint, companions, open_checkpoint
from quantcli.errors import UsageError
from quantcli.functions import is_function
from quantcli.graph.model import is_onnx
from quantcli.memory import peak_rss_bytes
from quantcli.parallel import Background, at_most, in_parallel, usable_cores
from quantcli.plan import LayerPlan, Plan, resolve
from quantcli.progress import Progress, Tracker
from quantcli.recipe import Recipe, load_recipe
from quantcli.report import LayerRow, ModelRow, Report
from quantcli.staging import Staging, check_target, explain, open_staging, require_space
from quantcli.units import format_bytes
from quantcli.version import __version__

if TYPE_CHECKING:
    from quantcli.streaming import LayerJob, LayerResult

#: What torch itself and the interpreter take before the first tensor.
BASE_MEMORY_BYTES = 300 << 20


def convert(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str | None = None,
    format: str | None = None,
    algorithm: str | None = None,
    recipe: Recipe | str | Path | None = None,
    group_size: int | None = None,
    skip: Sequence[str] = (),
    rest: str | None = None,
    target: str | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    calibration: str | Path | None = None,
    data: str | Path | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    preprocess: str | Path | None = None,
    weights: str | Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model and verify the result.

    Args:
        model: a folder, a safetensors file or index, a torch state dict, an ONNX file, a ``.pt2`` program, or
            ``package.module:function``.
        output: the folder to write, for a single-file input also a ``.safetensors`` file, for ONNX also a
            ``.onnx`` file.
        scheme: a preset such as ``int4``; needed unless the recipe names one.
        format: on-disk format; by default the one that fits the scheme.
        algorithm: ``auto``, ``rtn`` or ``mse``.
        recipe: a `Recipe`, or the path of a YAML file.
        group_size: values per scale, for schemes with groups.
        skip: globs of layers to leave as they are.
        rest: ``keep``, ``fp16`` or ``bf16`` for what is not quantized.
        target: the runtime that must load the result: ``transformers``, which is asked whether it would,
            ``vllm`` or ``sglang``, which are not, or ``onnxruntime``, also with a version: ``onnxruntime==1.22``.
        threads: worker threads; by default the number of usable cores.
        max_memory: bytes that must not be exceeded; fewer threads are used to stay below.
        calibration: statistics from `calibrate`, for static quantization to ONNX.
        data: in place of these, what to take them from; the artifact is also compared with the model on it.
        samples: how many of the data at the most.
        seq_len: tokens per sample of text.
        seed: what images are chosen by.
        tokenizer: a folder with the tokenizer, where the model has none.
        preprocess: a file that says how images become inputs.
        weights: a state dict for a model that is a function.
        dry_run: plan and report only.
        force: replace an existing output.
        progress: called with bytes (or samples) done and in all, from any thread.

    Returns:
        The report: sizes, error per layer, what was verified.

    Raises:
        UsageError: the wishes do not go together.
        InputError: the model is missing, damaged or unsupported, or the output cannot be written.
        VerificationError: what was written does not decode to what was meant.
    """
    started = time.monotonic()
    source, place = Path(model), Path(output)
    base = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe)) if recipe else Recipe()
    wishes = base.with_flags(
        scheme=scheme,
        format=format,
        algorithm=algorithm,
        group_size=group_size,
        skip=list(skip),
        rest=rest,
        target=target,
    )
    if goes_to_onnx(model, wishes.format):
        from quantcli.convert_onnx import Calibration, convert_onnx

        given = Calibration(
            stats=_path(calibration),
            data=None if data is None else str(data),
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            tokenizer=_path(tokenizer),
            preprocess=_path(preprocess),
        )
        if max_memory is not None:
            raise UsageError("--max-memory does not apply to ONNX, whose graph is worked on as a whole.")
        with at_most(threads):
            return convert_onnx(
                model, place, wishes, given, weights=_path(weights), dry_run=dry_run, force=force, progress=progress
            )
    if calibration or data:
        raise UsageError("Converting a checkpoint uses no calibration data.", "Leave it out, or use --format onnx.")
    checkpoint = open_checkpoint(source)
    plan = resolve(wishes, checkpoint.infos(), checkpoint.config)
    layout = plan_layout(plan, checkpoint, place)
    if dry_run:
        return _report(checkpoint, place, plan, layout, {}, None, {"dry_run": True})
    check_target(place, checkpoint.folder or source, force=force)
    workers = _worker_count(plan, threads, max_memory)
    conversion = _Conversion(checkpoint, plan, layout, workers, progress)
    with open_staging(place) as staging:
        done = staging.begin(conversion.fingerprint(), force=force)
        try:
            require_space(
                place, layout.nbytes - sum(path.stat().st_size for path in staging.out.rglob("*.safetensors"))
            )
            details = conversion.run(staging, done)
            staging.publish(single_file=layout.single_file)
        except OSError as error:
            raise explain(error, place) from error
    details |= {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
    return _report(checkpoint, place, plan, layout, conversion.results, conversion.sha256, details)


def goes_to_onnx(model: str | Path, format: str | None) -> bool:
    """Whether a conversion ends in ONNX: the model is ONNX, is code rather than weights, or the user says so."""
    path = Path(model)
    return format == "onnx" or is_onnx(path) or path.suffix == ".pt2" or is_function(str(model))


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


class _Conversion:
    """One run of `convert`: the state its steps share."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, layout: Layout, workers: int, progress: Progress | None
    ) -> None:
        self.checkpoint, self.plan, self.layout = checkpoint, plan, layout
        self.workers, self.progress = workers, progress
        self.results: dict[str, LayerResult] = {}
        self.sha256 = ""
        self._journal_lock = threading.Lock()

    def fingerprint(self) -> str:
        """Hash of all that decides the output, short of reading the weights."""
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.checkpoint.files]
        identity = {
            "quantcli": __version__,
            "recipe": self.plan.recipe.model_dump(),
            "files": files,
            "tensors": [(info.name, info.dtype, info.shape) for info in self.checkpoint.infos()],
            "config": self.checkpoint.config,
            "single_file": self.layout.single_file,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def run(self, staging: Staging, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Write, verify and describe everything inside the staging folder."""
        from quantcli.runtime_check import RuntimeCheck

        destinations = self.layout.create_files(staging.out)
        self._write_companions(staging.out)
        check = None
        if self.checkpoint.folder:
            check = RuntimeCheck(staging.out, self.plan, self.checkpoint, self.layout.nbytes)
        try:
            if check and not check.needs_weights:
                check.start()
            # The hash reads ahead of the workers, and hides the seconds that importing torch takes.
            hashing = Background(self.checkpoint.sha256)
            self._stream(staging, destinations, done)
            self.sha256 = hashing.result()
            for destination in destinations.values():
                destination.file.close()
            verified = self._verify(staging.out / (self.layout.single_file or ""))
            runtime = check.result() if check else {"checked": False, "reason": "a bare file has no runtime of its own"}
        finally:
            if check:
                check.stop()
        manifest = self._manifest({**verified, "runtime": runtime})
        self.layout.write_manifest(staging.out, manifest)
        return {"verified": manifest["verified"], "threads": self.workers}

    def _verify(self, artifact: Path) -> dict[str, Any]:
        from quantcli.verify import Verifier

        verifier = Verifier(artifact, self.plan, self.layout.specs)
        layers = [layer for layer in self.plan.layers if not layer.dropped]
        tasks = ((lambda layer=layer: verifier.check(layer, self.results[layer.info.name])) for layer in layers)
        in_parallel(tasks, self.workers)
        return {"tensors": len(layers), "codes": "equal", "names_and_shapes": "as planned"}

    def _stream(
        self, staging: Staging, destinations: Mapping[str, Destination], done: Mapping[str, Mapping[str, Any]]
    ) -> None:
        from quantcli.streaming import LayerJob, LayerResult

        self.results = {name: LayerResult.from_json(record) for name, record in done.items()}
        total = sum(layer.info.nbytes for layer in self.plan.layers)
        tracker = Tracker(total, self.progress)
        jobs = []
        for layer in self.plan.layers:
            if layer.dropped or layer.info.name in self.results:
                tracker.add(layer.info.nbytes)
            else:
                jobs.append(LayerJob(layer, self.plan, self.checkpoint, destinations))

        def convert_slab(job: LayerJob, index: int) -> None:
            result = job.run_slab(index)
            if result is not None:
                name = job.layer.info.name
                with self._journal_lock:
                    staging.record({"name": name, **result.to_json()})
                    self.results[name] = result
            tracker.add(job.slab_nbytes(index))

        tasks = (
            (lambda job=job, index=index: convert_slab(job, index)) for job in jobs for index in range(len(job.slabs))
        )
        in_parallel(tasks, self.workers)

    def _write_companions(self, out: Path) -> None:
        """Config and tokenizer files; what describes the weights is rewritten, the rest copied."""
        folder = self.checkpoint.folder
        if folder is None:
            return
        for relative in companions(folder):
            destination = out / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            if relative.as_posix() not in ("config.json", "quantcli.json"):
                shutil.copyfile(folder / relative, destination)
        config = self.layout.config(self.plan, self.checkpoint.config)
        if config is not None:
            (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _manifest(self, verified: Mapping[str, Any]) -> dict[str, Any]:
        layers = {}
        for layer in self.plan.layers:
            entry: dict[str, Any] = {"scheme": str(layer.scheme) if layer.scheme else None}
            if layer.scheme is not None:
                result = self.results[layer.info.name]
                sqnr_db = result.sqnr_db
                entry |= {"algorithm": layer.algorithm, "sqnr_db": None if sqnr_db is None else round(sqnr_db, 4)}
            else:
                entry |= {"dtype": layer.dtype, "reason": layer.reason}
            layers[layer.info.name] = {key: value for key, value in entry.items() if value is not None}
        return {
            "quantcli": __version__,
            "input_sha256": self.sha256,
            "format": self.plan.format,
            "scheme": self.plan.scheme,
            "algorithm": self.plan.algorithm,
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "layers": layers,
            "verified": dict(verified),
        }


def _worker_count(plan: Plan, threads: int | None, max_memory: int | None) -> int:
    """Threads to use, fewer where memory is short. Raises UsageError where not even one fits."""
    workers = threads or usable_cores()
    if max_memory is None:
        return workers
    from quantcli.streaming import working_set_bytes

    largest = max(plan.layers, key=working_set_bytes)
    each = working_set_bytes(largest)
    # A scale in float32 for every 16 values is the most there is.
    scales = max((layer.info.numel // 4 for layer in plan.layers if layer.is_coded), default=0)
    fitting = (max_memory - BASE_MEMORY_BYTES - scales) // max(1, each)
    if fitting < 1:
        needed = format_bytes(BASE_MEMORY_BYTES + scales + each)
        raise UsageError(
            f"--max-memory {format_bytes(max_memory)} is too little: {largest.info.name} needs {needed} in all.",
            hint="Raise the limit, or --skip this layer.",
        )
    return int(min(workers, fitting))


def plan_rows(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Plan, Layout, list[LayerRow]]:
    """What a recipe would do to a checkpoint. Raises as `quantcli.plan.resolve`."""
    plan = resolve(recipe, checkpoint.infos(), checkpoint.config)
    layout = plan_layout(plan, checkpoint, Path("out"))
    return plan, layout, [_layer_row(layer, layout, None) for layer in plan.layers]


def _report(
    checkpoint: Checkpoint,
    target: Path,
    plan: Plan,
    layout: Layout,
    results: Mapping[str, LayerResult],
    sha256: str | None,
    details: dict[str, Any],
) -> Report:
    before = checkpoint.size_bytes
    rows = [_layer_row(layer, layout, results.get(layer.info.name)) for layer in plan.layers]
    coded = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    metrics: dict[str, float | None] = {
        "size_ratio": layout.nbytes / before,
        "sqnr_db_min": min(coded, default=None),
    }
    source = ModelRow(str(checkpoint.path), "reference", sha256=sha256, size_bytes=before)
    artifact = ModelRow(
        str(target), "candidate", plan.format, plan.scheme, None, layout.nbytes, metrics, {"algorithm": plan.algorithm}
    )
    warnings = [*checkpoint.warnings, *plan.warnings]
    return Report("convert", [source, artifact], rows, [], warnings, details)


def _layer_row(layer: LayerPlan, layout: Layout, result: LayerResult | None) -> LayerRow:
    after = sum(spec.nbytes for spec in layout.layer_specs[layer.info.name].values())
    label = layer.label if layer.scheme else None
    if layer.scheme and layer.scheme.weights.granularity.kind in ("group", "block"):
        label = f"{layer.label} {layer.scheme.weights.granularity}"
    reason = layer.reason
    if reason and layer.dtype != layer.info.dtype:
        reason = f"{reason}; cast {layer.info.dtype} to {layer.dtype}"
    return LayerRow(
        layer.info.name,
        label,
        layer.info.nbytes,
        after,
        result.sqnr_db if result else None,
        reason,
        details={"shape": list(layer.info.shape), "role": layer.role},
    )
