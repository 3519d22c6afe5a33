"""One run of a checkpoint's conversion: calibrate, stream, verify, describe, inside a staging folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.algorithms import RANGES, where_reproducible
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.hugging_face import neighbours
from quantcli.conversion.checkpoint.layout import Layout
from quantcli.conversion.staging import Staging
from quantcli.core import compiled
from quantcli.core.manifest import Manifest, ManifestLayer
from quantcli.errors import UsageError, VerificationError
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.system import ranks
from quantcli.system.files import force_to_disk, write_json
from quantcli.system.parallel import Background, in_parallel, usable_cores
from quantcli.system.progress import Fractions, Progress, Tracker
from quantcli.system.text import format_bytes
from quantcli.version import __version__

if TYPE_CHECKING:
    from quantcli.conversion.checkpoint.stream import LayerJob
    from quantcli.conversion.checkpoint.writer import LayerResult, Output
    from quantcli.training.loop import History

#: What torch itself and the interpreter take before the first tensor.
BASE_MEMORY_BYTES = 300 << 20
#: In the count of progress, a byte of a block that is worked out from data against one that is only streamed.
_CALIBRATED_WEIGHT = 100

#: Files that tell how weights are stored: rewritten, or no longer true.
_OF_WEIGHTS = ("config.json", "quantcli.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")


class Work(Protocol):
    """The part of a conversion that works its tensors out by itself, before all others are streamed.

    ``plan``: of the whole conversion. ``history``: of training, where there was some.
    """

    plan: Plan
    history: History | None

    def names(self) -> set[str]:
        """The tensors it writes."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the output beside the recipe and the tensors."""

    def manifest(self) -> dict[str, Any]:
        """Entries of the manifest."""

    def has_learned(self, staging: Staging) -> bool:
        """Whether an interrupted run has learned what all of its tensors will be."""

    def run(self, output: Output) -> None:
        """Write every tensor that is not in the output's results yet."""


class Check(Protocol):
    """Who is asked, at the end, whether the output loads."""

    def result(self, artifact: Path) -> dict[str, Any]:
        """What is held of it, in the keys of `quantcli.conversion.checkpoint.proof.described`."""


def hashing(checkpoint: Checkpoint) -> Background[str]:
    """The hash of a model, begun as early as can be: while transformers is asked, a core is idle."""
    return Background(checkpoint.sha256 if ranks.is_first() else str)


class Conversion:
    """One run of `convert`: the state its steps share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        layout: Layout,
        workers: int,
        work: Work | None,
        progress: Progress | None,
        check: Check,
        sha256: Background[str],
    ) -> None:
        self._check, self._hashing = check, sha256
        self.checkpoint, self.plan, self.layout = checkpoint, plan, layout
        self.workers, self.work, self.progress = workers, work, progress
        self.results: dict[str, LayerResult] = {}
        self.sha256 = ""
        self._own_names = work.names() if work else set[str]()
        # An output may take the place of its input.
        self._earlier = checkpoint.manifest

    def fingerprint(self) -> str:
        """Hash of all that decides the output, short of reading the weights."""
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.checkpoint.files]
        identity = {
            "quantcli": __version__,
            "recipe": self.plan.recipe.model_dump(),
            "files": files,
            "tensors": [(info.name, info.dtype, info.shape) for info in self.checkpoint.infos()],
            "config": self.checkpoint.config,
            "layers": [(layer.info.name, repr(layer.scheme), layer.dtype) for layer in self.plan.layers],
            "single_file": self.layout.single_file,
            "work": self.work.fingerprint() if self.work else None,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def run(self, staging: Staging, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Write, verify and describe everything inside the staging folder; returns details for the report.

        Args:
            staging: where the output is built.
            done: records of the tensors that an interrupted run has written, by name.
        """
        output = self._open_output(staging, done)
        if ranks.is_first():
            self._write_companions(staging.out)
        if self.work:
            self._require_finite(output)
            self.work.run(output)
            output.results.update(ranks.broadcast(output.results))
        self._stream(output)
        self.sha256 = self._hashing.result()
        self.checkpoint.require_unchanged()
        for destination in output.destinations.values():
            destination.file.close()
        # A slow disk writes while the artifact is read again and run; publishing forces what is left.
        forcing = Background(partial(force_to_disk, staging.out)) if ranks.is_first() else None
        verified = self._verify(staging.out / (self.layout.single_file or ""))
        ranks.finish()
        verified["runtime"] = self._check.result(staging.out)
        if forcing:
            forcing.result()
        manifest = self._manifest(verified)
        self.layout.write_manifest(staging.out, manifest)
        history = self.work.history if self.work else None
        trained = {"training": history.to_json()} if history else {}
        return {"verified": verified, "threads": self.workers, "manifest": manifest.to_json(), **trained}

    def _require_finite(self, output: Output) -> None:
        """Raise InputError where a weight holds what is no number: on data, outputs would not tell whose it is."""
        from quantcli.conversion.checkpoint.stream import require_finite

        if not isinstance(self.checkpoint, DecodedCheckpoint):
            infos = [layer.info for layer in self._own_layers() if layer.info.name not in output.results]
            in_parallel(
                (partial(require_finite, info, self.checkpoint) for info in infos if info.is_float and info.shape),
                self.workers,
            )

    def _open_output(self, staging: Staging, done: Mapping[str, Mapping[str, Any]]) -> Output:
        from quantcli.conversion.checkpoint.writer import LayerResult, Output

        if ranks.is_first():
            destinations = self.layout.create_files(staging.out)
        ranks.gather(None)
        if not ranks.is_first():
            destinations = self.layout.create_files(staging.out)  # the same bytes once more
        self.results = {name: LayerResult.from_json(record) for name, record in done.items()}
        self._forget_what_is_not_there(staging)
        own = sum(layer.info.nbytes for layer in self.plan.layers if layer.info.name in self._own_names)
        streamed = sum(layer.info.nbytes for layer in self.plan.layers) - own
        tracker = Tracker(_CALIBRATED_WEIGHT * own + streamed, self.progress)
        tick = Fractions(tracker, _CALIBRATED_WEIGHT * own)
        return Output(staging, destinations, self.results, self.workers, tracker, tick)

    def _forget_what_is_not_there(self, staging: Staging) -> None:
        """Hold what an interrupted run says that it wrote against the files: after a power cut they may hold less."""
        if not self.results:
            return
        from quantcli.conversion.checkpoint.verify import Verifier

        verifier = Verifier(staging.out / (self.layout.single_file or ""), self.plan, self.layout.specs)
        # What was learned is written over what was there, and all of it anew.
        known = self._own_names if self.work and self.work.has_learned(staging) else set[str]()
        layers = [layer for layer in self.plan.layers if layer.info.name in self.results.keys() - known]
        lost: list[str] = []

        def check(layer: LayerPlan) -> None:
            try:
                verifier.check(layer, self.results[layer.info.name])
            except VerificationError:
                lost.append(layer.info.name)

        in_parallel((partial(check, layer) for layer in layers), self.workers)
        for name in lost:
            del self.results[name]
        ranks.gather(None)  # no rank writes while another still looks

    def _stream(self, output: Output) -> None:
        """Write all tensors that are not done, on worker threads; ranks share them, and tell each other."""
        from quantcli.conversion.checkpoint.stream import LayerJob

        jobs = []
        for layer in self._own_layers():
            if not layer.dropped and layer.info.name not in output.results:
                jobs.append(LayerJob(layer, self.plan, self.checkpoint, output.destinations))
            elif layer.info.name not in self._own_names:
                output.tracker.add(layer.info.nbytes)
        in_parallel(
            (partial(self._stream_slab, output, job, index) for job in jobs for index in range(len(job.slabs))),
            self.workers,
        )
        for results in ranks.gather(output.results):
            output.results.update(results)

    def _own_layers(self) -> list[LayerPlan]:
        """This rank's share of the layers, in order."""
        own = ranks.share({layer.info.name: layer.info.nbytes for layer in self.plan.layers})
        return [layer for layer in self.plan.layers if layer.info.name in own]

    def _stream_slab(self, output: Output, job: LayerJob, index: int) -> None:
        result = job.run_slab(index)
        if result is not None:
            output.record(job.layer.info.name, result)
        if job.layer.info.name not in self._own_names:
            output.tracker.add(job.slab_nbytes(index))

    def _verify(self, artifact: Path) -> dict[str, Any]:
        from quantcli.conversion.checkpoint.verify import Verifier

        verifier = Verifier(artifact, self.plan, self.layout.specs)
        layers = [layer for layer in self.plan.layers if not layer.dropped]
        own = [layer for layer in self._own_layers() if not layer.dropped]
        in_parallel((partial(verifier.check, layer, self.results[layer.info.name]) for layer in own), self.workers)
        return {"tensors": len(layers), "codes": "equal", "names_and_shapes": "as planned"}

    def _write_companions(self, out: Path) -> None:
        """All that lies beside the weights; what describes them is rewritten, the rest copied."""
        folder = self.checkpoint.folder
        if folder is None:
            return
        for relative in neighbours(folder, self.checkpoint.files).copied:
            destination = out / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            if relative.as_posix() not in _OF_WEIGHTS:
                shutil.copyfile(folder / relative, destination)
        config = self.layout.config(self.plan, self.checkpoint.config)
        if config is not None:
            write_json(out / "config.json", config)

    def _calibration(self) -> dict[str, Any]:
        """What is known of calibration data: of this run's, or of that which a quantized source has seen."""
        kept = {key: getattr(self._earlier, key) for key in ("calibration", "calibration_fingerprint")}
        return kept | (self.work.manifest() if self.work else {})

    def _sources_of_codes(self) -> Iterator[str]:
        """Names of what decided on codes, scales and ranges; codes that were kept as they are count, too."""
        yield from (step.name for step in self.plan.steps.all)
        for layer in self.plan.quantized:
            yield self.results[layer.info.name].rounding.algorithm
            if layer.scheme and layer.scheme.is_static:
                yield RANGES

    def _manifest(self, verified: Mapping[str, Any]) -> Manifest:
        layers = {}
        for layer in self.plan.layers:
            entry = layers[layer.info.name] = ManifestLayer(scheme=str(layer.scheme) if layer.scheme else None)
            if layer.scheme is not None:
                rounding = self.results[layer.info.name].rounding
                entry.algorithm, entry.note = rounding.algorithm or None, rounding.note
                entry.sqnr_db = None if rounding.sqnr_db is None else round(rounding.sqnr_db, 4)
            else:
                entry.dtype, entry.reason = layer.dtype, layer.reason
        return Manifest(
            quantcli=__version__,
            input_sha256=self.sha256,
            format=self.plan.format,
            scheme=self.plan.scheme,
            algorithm=self.plan.algorithm,
            recipe=self.plan.recipe.model_dump(mode="json"),
            source=self.checkpoint.origin() if isinstance(self.checkpoint, DecodedCheckpoint) else None,
            **self._calibration(),
            reproducible=where_reproducible(self._sources_of_codes()) or None,
            layers=layers,
            verified=dict(verified),
        )


def worker_count(plan: Plan, checkpoint: Checkpoint, threads: int | None, max_memory: int | None) -> int:
    """Threads to use, fewer where memory is short. Raises UsageError where not even one fits."""
    workers = threads or usable_cores()
    if max_memory is None:
        return workers
    largest, fixed, per_worker = _memory(plan, checkpoint)
    fitting = (max_memory - fixed) // max(1, per_worker)
    if fitting < 1:
        needed = format_bytes(fixed + per_worker)
        raise UsageError(
            f"--max-memory {format_bytes(max_memory)} is too little: {largest} needs {needed} in all.",
            hint="Raise the limit, or --skip this layer.",
        )
    return int(min(workers, fitting))


def use_loops(plan: Plan, checkpoint: Checkpoint, workers: int, max_memory: int | None) -> None:
    """Use compiled loops where a conversion is worth them, and there is room for them beside its workers."""
    counts = Counter[bool]()
    for layer in plan.quantized:
        if layer.scheme is not None and layer.has_codes:
            counts[layer.scheme.weights.dtype == "nf4"] += layer.info.numel
    if not compiled.pays(nf4=counts[True], integers=counts[False]):
        return
    _, fixed, per_worker = _memory(plan, checkpoint)
    if max_memory is None or fixed + workers * per_worker + compiled.NBYTES <= max_memory:
        compiled.use()


def _memory(plan: Plan, checkpoint: Checkpoint) -> tuple[str, int, int]:
    """The layer that takes most, and bytes that a conversion takes: once, and for every worker."""
    from quantcli.conversion.checkpoint.writer import working_set_bytes

    largest = max(plan.layers, key=working_set_bytes)
    decoding = checkpoint.held_bytes if isinstance(checkpoint, DecodedCheckpoint) else 0
    # A scale in float32 for every 16 values is the most there is.
    scales = max((layer.info.numel // 4 for layer in plan.layers if layer.has_codes), default=0)
    return largest.info.name, BASE_MEMORY_BYTES + scales, working_set_bytes(largest) + decoding
