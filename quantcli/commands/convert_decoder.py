"""`convert` of a language model to a decoder with a key-value cache: quantize, pack, prove, publish.

The weights are quantized by the pipeline of checkpoints into a working copy beside the output, with all its algorithms,
and continued where a run was interrupted; the graph is packed from that, block by block.
"""

from __future__ import annotations

import json
import shutil
import time
from enum import Enum
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.config_file import config_of
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.hugging_face import is_causal_config, neighbours
from quantcli.checkpoint.quantized import QuantizedCheckpoint
from quantcli.conversion.checkpoint.layout import plan_layout
from quantcli.conversion.checkpoint.pipeline import Conversion, Work, hashing, use_loops, worker_count
from quantcli.conversion.checkpoint.repack import planned_conversion
from quantcli.conversion.checkpoint.rows import conversion_report, reference_row
from quantcli.conversion.decoder.recipe import decoder_recipe, fills_head
from quantcli.conversion.staging import Staging, open_staging
from quantcli.core.manifest import MANIFEST, MANIFEST_KEY, Manifest
from quantcli.data.request import DataRequest
from quantcli.errors import InputError, UsageError
from quantcli.export.decoder.architecture import (
    AS_CHECKPOINT,
    WITHOUT_DECODER,
    Decoder,
    read_decoder,
    refused,
    why_no_decoder,
    why_not_built,
)
from quantcli.formats import quantized_format
from quantcli.onnx.graph.model import is_onnx
from quantcli.planning.recipe import Recipe, build_scheme
from quantcli.planning.steps import training_step
from quantcli.planning.targets import exported_decoder_refusal, onnx_layout, require_onnx
from quantcli.planning.targets.base import OnnxLayout, Refusal
from quantcli.reporting.report import Report
from quantcli.search.budget import Budget
from quantcli.system.files import check_target, explain, require_space, write_json
from quantcli.system.hardware import peak_rss_bytes
from quantcli.system.progress import Progress
from quantcli.system.user_functions import is_function

#: The runtimes that want a decoder, and nothing else.
DECODER_TARGETS = ("onnxruntime-genai",)
#: The runtimes that run a language model as a decoder, and other models as they are.
CACHE_TARGETS = ("transformers.js",)
#: Lets MatMulNBits round its inputs to int8, for which alone it has fast kernels.
ACCURACY_LEVEL = 4


class Way(Enum):
    """How a language model becomes ONNX: built with fused operators, exported with a cache, or without one."""

    BUILT = "built"
    EXPORTED = "exported"
    PLAIN = "plain"


def way_to_onnx(
    model: str | Path, output: Path, recipe: Recipe, budget: Budget | None, statistics: str | Path | None
) -> Way:
    """Whether a conversion ends in a decoder with a key-value cache, and how that is made.

    A target that runs decoders wants one. Else a folder of ONNX holds one where the model, the scheme and the recipe
    allow it; what does not becomes a graph without a cache, as a single file always does.

    Raises:
        UsageError: the target wants a decoder, and something else that is asked for does not go with it.
        InputError: the target wants a decoder, and none can be made of this model.
    """
    path, runtime = Path(model), recipe.runtime[0]
    if runtime not in (*DECODER_TARGETS, *CACHE_TARGETS) and recipe.format != "onnx":
        return Way.PLAIN
    if runtime not in DECODER_TARGETS and is_onnx(path):
        # A graph stays the graph that it is, whatever lies beside it.
        return Way.PLAIN
    config = None if is_function(str(model)) else config_of(path)
    asked = runtime in DECODER_TARGETS or (runtime in CACHE_TARGETS and is_causal_config(config))
    reason = _usage_reason(output, recipe, budget, statistics)
    if asked and reason:
        raise UsageError(f"--target {recipe.target}: {reason}.")
    if config is None:
        if asked:
            raise InputError(
                f"{model} is no folder with a config.json, which a decoder is built by.",
                "Name a folder as transformers saves it.",
            )
        return Way.PLAIN
    if asked:
        require_onnx(recipe, config, output)
    if reason is not None or not is_causal_config(config):
        if asked:
            read_decoder(path)
        return Way.PLAIN
    if (unusual := why_not_built(path)) is None:
        return Way.BUILT
    if (lacking := _no_export(path, recipe)) is None:
        return Way.EXPORTED
    if asked:
        # Of an architecture that is built, the setting in the way is the nearer reason.
        raise refused(lacking.reason if why_no_decoder(path) else unusual, lacking.hint)
    return Way.PLAIN


def _no_export(folder: Path, recipe: Recipe) -> Refusal | None:
    """Why a model cannot be exported with a key-value cache, or its target would not run that; None where it can."""
    from quantcli.export.cache_shape import read_cache_shape, why_no_cache

    if lacking := why_no_cache(folder):
        return Refusal(lacking.reason, WITHOUT_DECODER if lacking.exports else AS_CHECKPOINT)
    uniform = read_cache_shape(folder).uniform is not None
    return exported_decoder_refusal(recipe, str((config_of(folder) or {}).get("model_type")), uniform=uniform)


def why_without_cache(
    model: str | Path, output: Path, recipe: Recipe, budget: Budget | None, statistics: str | Path | None
) -> list[str]:
    """What is to be said of a folder's graph that could be a decoder, and is none: it has no key-value cache."""
    path = Path(model)
    if output.suffix == ".onnx" or is_function(str(model)) or is_onnx(path) or not is_causal_config(config_of(path)):
        return []
    reason = _usage_reason(output, recipe, budget, statistics)
    if reason is None and (lacking := _no_export(path, recipe)) is not None:
        reason = lacking.reason
    return [f"The graph has no key-value cache, and serves for scoring alone: {reason}."]


def _usage_reason(output: Path, recipe: Recipe, budget: Budget | None, statistics: str | Path | None) -> str | None:
    """What of a command does not go with a decoder, or None."""
    schemes = [each for each in (recipe.scheme, *(rule.scheme for rule in recipe.rules)) if each is not None]
    named = quantized_format("onnx")
    if recipe.format not in (None, "onnx"):
        return f"it loads ONNX, not {recipe.format}"
    if output.suffix == ".onnx":
        return "a decoder is a folder, and the output names a file"
    if budget is not None and budget != Budget():
        return "a budget is not searched for decoders; name a scheme"
    if statistics is not None:
        return "statistics of `calibrate` are for ranges of activations, which a decoder has none of"
    if training_step(recipe):
        return "qat trains a checkpoint or a graph; train a checkpoint first (--format compressed-tensors)"
    return next((why for scheme in schemes if (why := named.supports(build_scheme(scheme)))), None)


def convert_decoder(
    model: Path,
    output: Path,
    recipe: Recipe,
    request: DataRequest | None,
    *,
    device: str,
    threads: int | None,
    max_memory: int | None,
    dry_run: bool,
    force: bool,
    progress: Progress | None,
) -> Report:
    """Convert a folder into a folder with a decoder. Arguments are those of `quantcli.convert`.

    Raises:
        UsageError: the wishes do not go together.
        InputError: the model is damaged or of a kind that no decoder is built of, the output cannot be written, or the
            decoder computes something else than torch on the same weights.
        VerificationError: what was written does not decode to what was meant.
    """
    started = time.monotonic()
    decoder, stored = read_decoder(model), open_checkpoint(model)
    if not dry_run:
        check_target(output, model, force=force)
    reference = reference_row(stored)
    recipe = decoder_recipe(recipe, stored, decoder)
    checkpoint, plan, carried = planned_conversion(stored, recipe, data=request is not None)
    work: Work | None = carried
    if request is not None:
        from quantcli.conversion.checkpoint.calibrated import prepare_calibration

        work = prepare_calibration(checkpoint, plan, request, device=device, memory_limit=max_memory)
        plan = work.plan
    layout = plan_layout(plan, checkpoint, output)
    if dry_run:
        planned = {"dry_run": True, "runtime": _NotAsked().result(output)}
        return conversion_report(checkpoint, reference, output, plan, layout, {}, planned)
    workers = worker_count(plan, checkpoint, threads, max_memory)
    use_loops(plan, checkpoint, workers, max_memory)
    conversion = Conversion(checkpoint, plan, layout, workers, work, progress, _NotAsked(), hashing(stored))
    with open_staging(output) as staging:
        try:
            require_space(output, 2 * layout.nbytes)
            details = _quantize(conversion, staging, force=force)
            place = onnx_layout(plan.recipe, ((each.scheme, each.info.numel) for each in plan.layers))
            proof = _pack(decoder, model, staging, place, fill_head=fills_head(recipe))
            manifest = _publish(details.pop("manifest"), proof, decoder, checkpoint, staging, place)
        except OSError as error:
            raise explain(error, output) from error
    details["verified"] |= proof
    details |= {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
    reference.sha256 = conversion.sha256
    report = conversion_report(checkpoint, reference, output, plan, layout, conversion.results, details)
    artifact = report.models[-1]
    file = output / place.file
    artifact.size_bytes = sum(each.stat().st_size for each in (file, file.with_name(place.data)))
    artifact.metrics["size_ratio"] = artifact.size_bytes / checkpoint.size_bytes
    artifact.manifest = manifest
    from quantcli.conversion.decoder.proof import warnings

    report.warnings += warnings(proof, decoder, recipe.target) + place.warnings(model)
    return report


class _NotAsked:
    """Nobody loads the working copy; the decoder itself is run."""

    def result(self, artifact: Path) -> dict[str, Any]:
        """What is held of it."""
        summary = "the decoder is run by onnxruntime, from its cache and beside torch"
        return {"checked": False, "run": "none", "foreseen": True, "summary": summary}


def _quantize(conversion: Conversion, staging: Staging, *, force: bool) -> dict[str, Any]:
    """Make the working copy, or finish it, in the place of the output."""
    done = staging.begin(conversion.fingerprint(), force=force)
    return conversion.run(staging, done)


def _pack(decoder: Decoder, model: Path, staging: Staging, place: OnnxLayout, *, fill_head: bool) -> dict[str, Any]:
    """Build the graph from the working copy, and prove it; what was proven, in the manifest's keys."""
    from quantcli.conversion.decoder.proof import prove_decoder
    from quantcli.export.decoder.graph import build_decoder
    from quantcli.export.decoder.weights import DecoderWeights

    codes = open_checkpoint(staging.set_aside())
    has_codes = "quantization_config" in (codes.config or {})
    quantized = QuantizedCheckpoint(codes, quantized_format("onnx")) if has_codes else None
    artifact = staging.out / place.file
    artifact.parent.mkdir(exist_ok=True)
    tensors = build_decoder(
        decoder, DecoderWeights(codes, quantized), model, artifact, data=place.data, accuracy_level=ACCURACY_LEVEL,
        fill_head=fill_head,
    )  # fmt: skip
    values: Checkpoint = DecodedCheckpoint(quantized) if quantized else codes
    return {"tensors": tensors, "codes": "equal"} | prove_decoder(artifact, decoder, values)


def _publish(
    made: dict[str, Any],
    proof: dict[str, Any],
    decoder: Decoder,
    checkpoint: Checkpoint,
    staging: Staging,
    place: OnnxLayout,
) -> dict[str, Any]:
    """Write what goes beside the graph, say in the graph how it was made, and put all in place."""
    from quantcli.export.decoder.genai import Dimensions, genai_config
    from quantcli.models.decoder import GENAI_CONFIG
    from quantcli.onnx.graph.save import add_metadata

    folder, out = checkpoint.folder, staging.out
    assert folder is not None
    for relative in neighbours(folder, checkpoint.files).copied:
        if relative.as_posix() not in (MANIFEST, "config.json"):
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / relative, out / relative)
    config = {k: v for k, v in (checkpoint.config or {}).items() if k != "quantization_config"}
    write_json(out / "config.json", place.config(config, True) if place.config else config)
    if place.config is None:
        write_json(out / GENAI_CONFIG, genai_config(Dimensions.of(decoder), folder, place.file))
    manifest = Manifest.of(made | {"verified": {**made["verified"], **proof}}, staging.target).to_json()
    add_metadata(out / place.file, MANIFEST_KEY, json.dumps(manifest, sort_keys=True))
    staging.publish()
    return manifest
