"""`convert`: plan, stream every tensor through its algorithm into its format, verify, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.hugging_face import neighbours
from quantcli.commands.convert_checks import require_effect, require_known
from quantcli.commands.convert_decoder import Way, convert_decoder, way_to_onnx, why_without_cache
from quantcli.commands.convert_pipeline import convert_pipeline, is_pipeline
from quantcli.conversion.checkpoint.gguf_packing import Packing
from quantcli.conversion.checkpoint.layout import Layout, plan_layout
from quantcli.conversion.checkpoint.pipeline import Conversion, Work, hashing, use_loops, worker_count
from quantcli.conversion.checkpoint.repack import planned_conversion
from quantcli.conversion.checkpoint.rows import conversion_report, reference_row
from quantcli.conversion.staging import open_staging
from quantcli.data.request import DataRequest
from quantcli.errors import UsageError
from quantcli.onnx.graph.model import is_onnx
from quantcli.planning.plan import Loader, Plan
from quantcli.planning.recipe import Recipe, dequantizes, load_recipe
from quantcli.planning.resolve import resolve
from quantcli.planning.rules import Rules
from quantcli.planning.steps import training_step
from quantcli.planning.targets import completed, for_target
from quantcli.reporting.report import Report
from quantcli.search.budget import Budget
from quantcli.system import ranks
from quantcli.system.files import check_name, check_target, explain, require_space
from quantcli.system.hardware import peak_rss_bytes
from quantcli.system.memory import within_memory
from quantcli.system.parallel import at_most
from quantcli.system.progress import Progress
from quantcli.system.user_functions import is_function, load_function


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
    device: str = "cpu",
    verify: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    allow_larger: bool = False,
    budget: Budget | None = None,
    histograms: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model and verify the result.

    Args:
        model: a folder, a safetensors file or index, a torch state dict, an ONNX file, a ``.pt2`` program, or
            ``package.module:function``.
        output: the folder to write, for a single-file input also a ``.safetensors`` file, for ONNX also a
            ``.onnx`` file.
        scheme: a preset such as ``int4``; needed unless the recipe names one. A quantized checkpoint takes ``bf16``
            and ``fp16``.
        format: on-disk format; by default the one that fits the scheme. Alone, it changes the container of a
            quantized checkpoint.
        algorithm: ``auto``, ``rtn`` or ``mse``; with data also ``gptq``, ``awq``, ``smoothquant``, ``autoround``,
            ``qat``. A recipe can chain them, and add ``tune``.
        recipe: a `Recipe`, or the path of a YAML file.
        group_size: values per scale, for schemes with groups.
        skip: globs of layers to leave as they are.
        rest: ``keep``, ``fp16`` or ``bf16`` for what is not quantized.
        target: the runtime that must load the result: ``transformers``, which is asked whether it would,
            ``vllm`` or ``sglang``, which are not, ``onnxruntime``, or ``onnxruntime-genai`` and ``transformers.js``,
            which get a folder of their own kind; also with a version: ``onnxruntime==1.22``.
        threads: worker threads; by default the number of usable cores.
        max_memory: bytes that must not be exceeded; fewer threads are used to stay below, and graphs are run in pieces.
        calibration: statistics from `calibrate`, for static quantization to ONNX.
        data: in place of these, what to take them from; of a checkpoint, what its blocks are calibrated on. With
            ``qat``, what is learned from.
        samples: how many of the data at the most.
        seq_len: tokens per sample of text.
        seed: what images are chosen by.
        tokenizer: a folder with the tokenizer, where the model has none.
        preprocess: a file that says how images become inputs.
        weights: a state dict for a model that is a function; what is quantized where the output is a checkpoint.
        device: where the block at hand runs, and a model is trained: ``cpu`` or ``cuda``.
        verify: of a checkpoint, ``run`` to have transformers run it beside its decoded codes, ``codes`` to have it
            look at names and shapes alone; by default run where the model fits into half of the free memory.
        dry_run: plan and report only.
        force: replace an existing output.
        allow_larger: keep an ONNX artifact that is no smaller than its model.
        budget: ceilings of size, loss or latency, which a mix of schemes is searched for; in place of ``scheme``.
        histograms: of how many of the worst tensors of a kind the report has histograms, for a page.
        progress: called with bytes (or samples) done and in all, from any thread.

    Returns:
        The report: sizes, error per layer, what was verified.

    Raises:
        UsageError: the wishes do not go together.
        InputError: the model is missing, damaged or unsupported, or the output cannot be written.
        VerificationError: what was written does not decode to what was meant.
    """
    place = Path(output)
    require_known(verify, device)
    if budget is not None:
        budget.require_used()
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
    wishes = completed(wishes)
    request = (
        None
        if data is None
        else DataRequest.of(
            data, samples=samples, seq_len=seq_len, seed=seed, tokenizer=tokenizer, preprocess=preprocess
        )
    )
    if wishes.format is None:
        wishes = wishes.with_flags(format=implied_format(model, place))
    way = way_to_onnx(model, place, wishes, budget, calibration)
    becomes_onnx = way is not Way.PLAIN or goes_to_onnx(model, place, wishes.format)
    require_effect(place, onnx=becomes_onnx, verify=verify, calibration=calibration)
    if way is Way.BUILT:
        ranks.go_on_alone("A conversion to a decoder in ONNX")
        with at_most(threads):
            return convert_decoder(
                Path(model),
                place,
                wishes,
                request,
                device=device,
                threads=threads,
                max_memory=max_memory,
                dry_run=dry_run,
                force=force,
                progress=progress,
            )
    if becomes_onnx:
        from quantcli.commands.convert_onnx import convert_graph

        if device != "cpu":
            from quantcli.system.devices import check_device

            if not training_step(wishes):
                raise UsageError(f"--device {device} does not apply to ONNX, which is calibrated on the CPU.")
            check_device(device)
        if max_memory is not None and budget is not None and budget != Budget():
            raise UsageError(
                "--max-memory does not go with a budget, whose search measures whole graphs.",
                "Convert by the recipe that it finds, with --max-memory.",
            )
        with at_most(threads), within_memory(max_memory):
            report = convert_graph(
                model,
                place,
                wishes,
                request,
                _path(calibration),
                budget=budget,
                weights=_path(weights),
                device=device,
                dry_run=dry_run,
                force=force,
                allow_larger=allow_larger,
                histograms=histograms,
                progress=progress,
                cache=way is Way.EXPORTED,
            )
        if way is Way.PLAIN:
            report.warnings += why_without_cache(model, place, wishes, budget, calibration)
        return report
    one = partial(
        _convert_checkpoint, str(model), weights=weights, device=device, threads=threads, max_memory=max_memory,
        verify=verify, histograms=histograms, progress=progress,
    )  # fmt: skip
    if budget is not None and budget != Budget():
        ranks.go_on_alone("The search for a budget")
        return _within(budget, str(model), place, wishes, request, weights, one, dry_run=dry_run, force=force)
    return one(place, wishes, request, dry_run=dry_run, force=force)


def _within(
    budget: Budget,
    model: str,
    output: Path,
    recipe: Recipe,
    request: DataRequest | None,
    weights: str | Path | None,
    convert_one: Callable[..., Report],
    *,
    dry_run: bool,
    force: bool,
) -> Report:
    """A checkpoint's conversion by the mix of schemes that keeps a budget."""
    from quantcli.commands.convert_budget import convert_within, require_other_data, uses_data
    from quantcli.search.subject import CheckpointSubject

    if is_pipeline(Path(model)):
        raise UsageError(f"{model} is a diffusers pipeline; a budget is for one model.", "Name one of its folders.")
    if recipe.scheme is not None:
        raise UsageError("A budget chooses the scheme.", "Leave --scheme out, or name schemes with --allow.")
    if recipe.format == "gguf":
        raise UsageError(
            "A budget is not searched for GGUF.", "Keep it with --format compressed-tensors, then convert that to GGUF."
        )
    budget = budget.checked(onnx=False, data=request is not None)
    require_other_data(recipe, budget, data=request is not None)
    source, function = _weights_of(model, weights)
    given = request if uses_data(recipe) else None
    subject = CheckpointSubject(open_checkpoint(source), function, recipe, request, output, given is not None)

    def convert_by(found: Recipe, place: Path, planned: bool) -> Report:
        data = None if dequantizes(found) else given
        return convert_one(place, found, data, dry_run=planned, force=not planned)

    return convert_within(
        model, output, budget, subject.search, convert_by, subject.losses, dry_run=dry_run, force=force
    )


def _convert_checkpoint(
    model: str,
    output: Path,
    recipe: Recipe,
    request: DataRequest | None,
    *,
    weights: str | Path | None,
    device: str,
    threads: int | None,
    max_memory: int | None,
    verify: str | None,
    dry_run: bool,
    force: bool,
    histograms: int,
    progress: Progress | None,
) -> Report:
    if is_pipeline(Path(model)):
        if request is not None:
            raise UsageError(
                f"{model} is a diffusers pipeline, which is not calibrated from data.", "Leave out --data."
            )
        one = partial(
            _convert_checkpoint, request=None, weights=weights, device=device, threads=threads,
            max_memory=max_memory, verify=verify, force=force, histograms=0, progress=progress,
        )  # fmt: skip
        return convert_pipeline(
            Path(model),
            output,
            recipe,
            lambda source, place, own, planned: one(str(source), place, own, dry_run=planned),
            dry_run=dry_run,
            force=force,
        )
    started = time.monotonic()
    source, function = _weights_of(model, weights)
    stored = open_checkpoint(source)
    reference = reference_row(stored)
    from quantcli.conversion.checkpoint.transformers_check import RuntimeCheck, with_single_experts

    held_apart = with_single_experts(stored, recipe)
    checkpoint, plan, carried = planned_conversion(held_apart, recipe, data=request is not None)
    work: Work | None = carried
    if checkpoint.folder:
        checkpoint.warnings += neighbours(checkpoint.folder, checkpoint.files).warnings
    if recipe.format != "gguf":
        check_name(output, ".safetensors", folder=True)
    check_target(output, checkpoint.folder or source, force=force or dry_run)
    sha256 = None if dry_run else hashing(stored)
    with at_most(threads), RuntimeCheck(plan, checkpoint, verify, max_memory) as check:
        held = None if work else check.as_held(Rules(recipe))
        if held:
            checkpoint = held
            plan = for_target(resolve(recipe, checkpoint.infos(), checkpoint.config, data=request is not None))
            check.ask(plan)
        plan = _as_loaded(plan, checkpoint, check.survey(), data=request is not None, carried=work is not None)
        if request is not None:
            from quantcli.conversion.checkpoint.calibrated import prepare_calibration

            work = prepare_calibration(
                checkpoint, plan, request, function=function, device=device, memory_limit=max_memory
            )
            plan = work.plan
        layout = plan_layout(plan, checkpoint, output)
        packing = Packing(plan, checkpoint, output, verify, max_memory) if plan.format == "gguf" else None
        planned = packing.planned if packing else check.rehearse(plan, layout)
        if sha256 is None:
            told = packing.as_reported(layout) if packing else layout
            planned = {"dry_run": True, "runtime": planned}
            return conversion_report(checkpoint, reference, output, plan, told, {}, planned)
        workers = worker_count(plan, checkpoint, threads, max_memory)
        use_loops(plan, checkpoint, workers, max_memory)
        conversion = Conversion(checkpoint, plan, layout, workers, work, progress, check, sha256)
        layout, details = _carried_out(conversion, output, packing, force=force)
    details |= {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
    reference.sha256 = conversion.sha256
    report = conversion_report(checkpoint, reference, output, plan, layout, conversion.results, details)
    report.models[-1].manifest = details.pop("manifest")
    if histograms:
        from quantcli.conversion.checkpoint.histograms import weight_histograms

        report.details["histograms"] = weight_histograms(checkpoint, output, report.layers, histograms)
    return report


def _carried_out(
    conversion: Conversion, output: Path, packing: Packing | None, *, force: bool
) -> tuple[Layout, dict[str, Any]]:
    """Convert and publish; what was written is laid out as the first value says, the second is for the report."""
    layout = conversion.layout
    with open_staging(output) as staging:
        done = staging.begin(conversion.fingerprint(), force=force)
        try:
            written = sum(path.stat().st_size for path in staging.out.rglob("*.safetensors"))
            require_space(output, layout.nbytes - written + (packing.nbytes if packing else 0))
            details = conversion.run(staging, done)
            if packing:
                layout = packing.run(staging, layout, details)
            staging.publish(single_file=packing.name if packing else layout.single_file)
        except OSError as error:
            raise explain(error, output) from error
    return layout, details


def _as_loaded(plan: Plan, checkpoint: Checkpoint, loader: Loader, *, data: bool, carried: bool) -> Plan:
    """The plan with what is known of the library that loads the result; codes that are carried over stay."""
    if loader == Loader():
        return plan
    if carried:
        return replace(plan, loader=replace(loader, leave={}, unpacked=frozenset(), weights_only=frozenset()))
    return for_target(resolve(plan.recipe, checkpoint.infos(), checkpoint.config, data=data, loader=loader))


def implied_format(model: str | Path, output: Path) -> str | None:
    """The format that an output's name stands for, where a model could become several."""
    if output.suffix.lower() == ".onnx" and not goes_to_onnx(model, output, None):
        return "onnx"
    return "gguf" if output.suffix.lower() == ".gguf" else None


def goes_to_onnx(model: str | Path, output: Path, format: str | None) -> bool:
    """Whether a conversion ends in ONNX: the model is ONNX, is code rather than weights, or the user says so.

    The weights of a function's module stay a checkpoint where format or output are those of one.
    """
    path = Path(model)
    if is_function(str(model)):
        return format == "onnx" or (format is None and output.suffix != ".safetensors")
    return format == "onnx" or is_onnx(path) or path.suffix == ".pt2"


def _weights_of(model: str, weights: str | Path | None) -> tuple[Path, str | None]:
    """What becomes another checkpoint, and the function whose module has these weights, if the model is one."""
    if not is_function(model):
        if weights is not None:
            raise UsageError(f"--weights is for a model that is a function, and {model} has its own.")
        return Path(model), None
    if weights is None:
        raise UsageError(
            f"{model} is code, and what becomes a checkpoint is a file of weights.",
            hint="Name the state dict of its module with --weights FILE, or use --format onnx.",
        )
    load_function(model)
    return Path(weights), model


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
