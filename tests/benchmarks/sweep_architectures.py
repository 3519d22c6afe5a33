"""Every architecture of the installed transformers through every scheme: does what ends with exit status 0 run?

Run: .venv/bin/python tests/benchmarks/sweep_architectures.py [--only GLOB] [--schemes ...] [--jobs N] [--limit N]
     [--seed N] [--json FILE [--resume]] [--quick]

A tiny random model of each (tests/support/tiny_architectures.py) is converted in a process of its own, with a limit
of time. What comes of it:

ok       exit status 0, and the artifact, loaded by transformers (bitsandbytes, onnxruntime), computes what the
         original computes with its weights replaced by the decoded ones
refused  exit status 2 or 3, and --dry-run says the same
LATE     exit status 2 or 3 after work that --dry-run had called possible
FAULT    anything else: exit status 4, a traceback, a crash, no end; an artifact with exit status 0 that transformers
         does not load or run, or whose outputs are far from those of its own codes

``int8-eval`` and ``nf4-eval`` are ``quantcli eval`` of an artifact beside the original.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support import sweeping, tiny_architectures  # noqa: E402
from support.sweeping import FAULT, OK, REFUSED, SKIPPED, Outcome  # noqa: E402

#: Columns: what convert is asked for. Those behind ``-eval`` are evaluations of the artifact of that name.
ARGUMENTS = {
    "int8": ["--scheme", "int8"],
    "int4": ["--scheme", "int4"],
    "nf4": ["--scheme", "nf4"],
    "int8-dynamic": ["--scheme", "int8-dynamic"],
    "gptq": ["--scheme", "int4", "--algorithm", "gptq", "--data", "DATA"],
    "awq": ["--scheme", "int4", "--algorithm", "awq", "--data", "DATA"],
    "nf4-gptq": ["--scheme", "nf4", "--algorithm", "gptq", "--data", "DATA"],
    "onnx": ["--scheme", "int8-dynamic", "--format", "onnx"],
}
EVALUATIONS = ("int8-eval", "nf4-eval")
SCHEMES = (*ARGUMENTS, *EVALUATIONS)
#: Architectures of different kinds, and what they are asked for, in CI.
QUICK = (
    *("causal:llama", "causal:gpt2", "causal:mixtral", "causal:mamba", "masked:bert", "masked:modernbert"),
    *("seq2seq:t5", "vl:llava", "image:vit", "speech:whisper"),
)
QUICK_SCHEMES = ("int8", "nf4")
#: Seconds for one command, one check, and one export with its conversion.
COMMAND, CHECK, EXPORT = 150, 120, 300
#: Decibels over which outputs are those of the same codes, and those of the same codes with int8 activations.
SAME, DYNAMIC = 20.0, 8.0
#: Decibels that two runs in 16 bits may differ in how near they are to one in 32.
NOISE_MARGIN = 1.0
#: What torch says in a forked process that the machine gave no threads just then: it tells nothing of the artifact.
_NO_THREADS = "Invalid thread pool"


class _Mismatch(Exception):
    """The artifact runs, and does not compute what its codes say."""


def run(case: str, schemes: tuple[str, ...]) -> dict[str, Outcome]:
    """One architecture through all columns."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as place:
        model = Path(place) / "model"
        built = sweeping.forked(lambda: tiny_architectures.build(case, model), CHECK)
        if not built.value:
            return {"built": Outcome(SKIPPED, built.last_line, built.seconds)}
        loads = sweeping.forked(lambda: str(_load(model)[0].dtype), CHECK)
        if not loads.value:
            why = f"transformers does not load what it saved itself: {loads.last_line}"
            return {"built": Outcome(SKIPPED, why, built.seconds)}
        row = {"built": Outcome(OK, f"{built.value}", built.seconds)}
        for scheme in schemes:
            artifact = Path(place) / scheme.removesuffix("-eval")
            if scheme in EVALUATIONS:
                row[scheme] = _evaluated(model, artifact)
            else:
                row[scheme] = _converted(model, artifact, scheme)
                if scheme + "-eval" not in schemes:
                    shutil.rmtree(artifact, ignore_errors=True)
        return row


def _converted(model: Path, artifact: Path, scheme: str) -> Outcome:
    data = model.with_name("data.npz")
    arguments = [str(data) if value == "DATA" else value for value in ARGUMENTS[scheme]]
    onnx = scheme == "onnx"
    output = artifact / "model.onnx" if onnx else artifact
    if onnx:
        artifact.mkdir()
    command: list[str | Path] = ["convert", model, "-o", output, *arguments, "--threads", "1"]
    seconds = EXPORT if onnx else COMMAND
    done = sweeping.quantcli(command, seconds)
    outcome = sweeping.judged(done, lambda: sweeping.quantcli([*command, "--dry-run"], seconds))
    if outcome.verdict != OK:
        return outcome
    check: Callable[[], float] = lambda: compare_onnx(model, output) if onnx else compare(model, artifact, data, scheme)  # noqa: E731
    proof = sweeping.forked(check, CHECK)
    if _NO_THREADS in proof.last_line:
        proof = sweeping.forked(check, CHECK)
    if proof.status == 0:
        return Outcome(OK, f"{proof.value:.1f} dB", outcome.seconds)
    why = f"exit 0, and: {proof.last_line}" if proof.status is not None else f"exit 0, and no forward in {CHECK} s"
    return Outcome(FAULT, " ".join(why.split())[:500], outcome.seconds)


def _evaluated(model: Path, artifact: Path) -> Outcome:
    if not artifact.exists():
        return Outcome(SKIPPED, "no artifact")
    command = ["eval", model, artifact, "--data", model.with_name("data.npz"), "--task", "fidelity", "--samples", "2"]
    outcome = sweeping.judged(sweeping.quantcli(command, COMMAND))
    if outcome.verdict == FAULT or outcome.verdict == REFUSED:
        # Once more, since a forked process may get no threads, for which there are several messages.
        outcome = sweeping.judged(sweeping.quantcli(command, COMMAND))
    # The sweep's data fits the model, which it has run on: there is nothing to refuse.
    return Outcome(FAULT, outcome.why, outcome.seconds) if outcome.verdict == REFUSED else outcome


def compare(model: Path, artifact: Path, data: Path, scheme: str) -> float:
    """The least SQNR of an artifact's outputs, beside those of the original with decoded weights.

    One that is no farther than the decoded weights in 16 bits are from themselves in 32 is as near as its arithmetic: a
    router, or an indexer that chooses tokens, may choose otherwise in 16 bits. Where it chooses in one of both runs
    only, the artifact is run in 32 bits, in which nothing but its codes can tell the two apart.

    Raises:
        _Mismatch: it is too low, or outputs differ in name, shape or in what is finite.
        Exception: whatever transformers says where it cannot load or run the artifact.
    """
    import numpy
    import torch

    with numpy.load(data) as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    codes = _decoded(model, artifact)
    decoded, lost = _load_decoded(codes, torch.float32)
    loaded, also_lost = _load(artifact)
    if new := (lost | also_lost) - _load(model)[1] - set(decoded.all_tied_weights_keys):
        raise _Mismatch(f"tensors of the model are missing: {sorted(new)[:3]}")
    expected = tiny_architectures.outputs(decoded, inputs)
    # Pictures and sound in the type that the artifact computes in, as a processor's user gives them.
    fed = {name: value.to(loaded.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    found, wanted = tiny_architectures.outputs(loaded, fed), DYNAMIC if "dynamic" in scheme else SAME
    decibels, name = _least(expected, found)
    if decibels < wanted:
        narrow = _load_decoded(codes, torch.bfloat16)[0]
        fed = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
        wanted = min(wanted, _least(expected, tiny_architectures.outputs(narrow, fed))[0] - NOISE_MARGIN)
    if decibels < wanted:
        wide = _in_float32(loaded)
        wanted = DYNAMIC if "dynamic" in scheme else SAME
        decibels, name = _least(expected, tiny_architectures.outputs(wide, inputs))
    return _enough(decibels, name, wanted)


def _load_decoded(folder: Path, dtype: Any) -> tuple[Any, set[str]]:
    """As `_load`; experts that the class fuses are single layers where the folder has them so."""
    model, lost = _load(folder, dtype)
    if any(".experts" in name for name in lost):
        lost = _load_layers_for_experts(model, folder, dtype)
    return model, lost


def _load(folder: Path, dtype: Any = "auto") -> tuple[Any, set[str]]:
    """A model by its own class, as people load it, and the parameters that its files lack."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    loader: Any = getattr(transformers, config.architectures[0])
    torch.manual_seed(0)
    found, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    return found.eval(), set(info["missing_keys"])


def _in_float32(model: Any) -> Any:
    """A loaded artifact that decodes and computes in float32, which transformers does not offer for bitsandbytes."""
    import torch

    for value in itertools.chain(model.parameters(), model.buffers()):
        if value.is_floating_point():
            value.data = value.data.float()
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            state.dtype = module.compute_dtype = torch.float32
    return model


def _load_layers_for_experts(model: Any, folder: Path, dtype: Any) -> set[str]:
    """Give a model that fuses experts the single layers that an artifact has; returns what these lack."""
    from safetensors.torch import load_file

    from quantcli.models.stored_parameters import use_layers_for_experts

    use_layers_for_experts(model)
    values = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    return set(model.load_state_dict(values, strict=False, assign=True).missing_keys)


def _decoded(model: Path, artifact: Path) -> Path:
    """A folder with the original's configuration and names, and the values that the artifact's codes stand for."""
    from safetensors.torch import save_file

    from quantcli.checkpoint.checkpoint import open_checkpoint
    from quantcli.checkpoint.decoded import DecodedCheckpoint
    from quantcli.checkpoint.quantized import is_quantized, open_quantized

    written = open_checkpoint(artifact)
    if is_quantized(written):
        written = DecodedCheckpoint(open_quantized(written))
    values = {info.name: written.load(info.name).float().contiguous() for info in written.infos()}
    folder = artifact.with_name(f"{artifact.name}-decoded")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in model.glob("*.json"):
        shutil.copy(file, folder)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return folder


def compare_onnx(model: Path, artifact: Path) -> float:
    """The SQNR of an ONNX artifact's first output in onnxruntime, beside the original's in transformers."""
    import numpy
    import onnxruntime
    import torch
    from transformers import AutoModel

    onnxruntime.set_default_logger_severity(4)
    session = onnxruntime.InferenceSession(artifact, providers=["CPUExecutionProvider"])
    with numpy.load(model.with_name("data.npz")) as arrays:
        known = {name: arrays[name][:2] for name in arrays.files}
    length = next(iter(known.values())).shape[1]
    feeds, used = {}, {}
    for entry in session.get_inputs():
        kind = entry.type.removeprefix("tensor(").removesuffix(")")
        dtype = {"float": "float32", "int64": "int64", "int32": "int32", "bool": "bool"}.get(kind, "float32")
        if entry.name in known:
            given = known[entry.name]
            sizes = [
                fixed if isinstance(fixed, int) else size for fixed, size in zip(entry.shape, given.shape, strict=True)
            ]
            # A picture of the size that the graph takes.
            given = given if tuple(sizes) == given.shape else numpy.resize(given, sizes)
            feeds[entry.name] = used[entry.name] = given.astype(dtype)
        elif entry.name == "decoder_input_ids":
            feeds[entry.name] = used[entry.name] = known["input_ids"]
        elif entry.name == "position_ids":
            feeds[entry.name] = numpy.tile(numpy.arange(length), (2, 1))
        else:
            # A cache is empty; whatever else the graph asks for is as long as the text.
            length_of = 0 if "past" in entry.name or "cache" in entry.name else length
            sizes = [2 if index == 0 else length_of for index in range(len(entry.shape))]
            shape = [given if isinstance(given, int) else size for given, size in zip(entry.shape, sizes, strict=True)]
            feeds[entry.name] = numpy.zeros(shape, dtype)
    got = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    tensors = {name: torch.from_numpy(value) for name, value in (used or known).items()}
    # Without a head where the graph has none, as of models that fill masks.
    whole = "last_hidden_state" not in got
    original = _load(model, torch.float32)[0] if whole else AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    expected = tiny_architectures.outputs(original, tensors)
    common = [name for name in expected if name in got]
    if not common:
        raise _Mismatch(f"outputs {sorted(got)[:4]} are not those of the model, {sorted(expected)[:4]}")
    name = common[0]
    least = _least({name: expected[name]}, {name: torch.from_numpy(got[name]).float()})
    return _enough(*least, DYNAMIC)


def _enough(decibels: float, name: str, limit: float) -> float:
    if decibels < limit:
        raise _Mismatch(f"{name} is {decibels:.1f} dB from what its codes say")
    return decibels


def _least(expected: dict[str, Any], got: dict[str, Any]) -> tuple[float, str]:
    """The least SQNR of outputs, and which one has it."""
    if expected.keys() != got.keys():
        raise _Mismatch(f"outputs are {sorted(got)}, expected {sorted(expected)}")
    least = (200.0, "")
    for name, value in expected.items():
        if value.shape != got[name].shape:
            raise _Mismatch(f"{name} has shape {tuple(got[name].shape)}, expected {tuple(value.shape)}")
        if not bool((value.isfinite() == got[name].isfinite()).all()):
            raise _Mismatch(f"{name} is not finite where it should be")
        both = value.isfinite()
        signal, noise = value[both].double().square().sum(), (value[both] - got[name][both]).double().square().sum()
        decibels = float(10 * (signal / noise).log10()) if noise > 0 and signal > 0 else 200.0
        least = min(least, (decibels, name))
    return least


def preload() -> None:
    """Import once what every case needs, before the first fork; nothing of it may start a thread."""
    os.environ.update(sweeping.ENVIRONMENT)
    import bitsandbytes  # noqa: F401
    import compressed_tensors  # noqa: F401
    import torch
    import transformers

    import quantcli.cli.app
    import quantcli.commands.convert
    import quantcli.commands.evaluate
    import quantcli.conversion.checkpoint.pipeline
    import quantcli.conversion.checkpoint.transformers_check  # noqa: F401

    torch.set_num_threads(1)
    for name in ("PreTrainedModel", "PreTrainedConfig", "AutoModel", "AutoConfig"):
        getattr(transformers, name)


def quick(jobs: int = 2) -> dict[str, dict[str, Outcome]]:
    """The part that runs in CI."""
    preload()
    return sweeping.sweep(QUICK, lambda case: run(case, QUICK_SCHEMES), jobs)


def main() -> int:
    wanted = sweeping.options(__doc__, SCHEMES).parse_args()
    preload()
    if wanted.quick:
        found = quick(wanted.jobs)
    else:
        names = sweeping.chosen(tiny_architectures.architectures(), wanted.only, wanted.limit, wanted.seed)
        schemes = tuple(wanted.schemes.split(","))
        known = sweeping.read(wanted.json) if wanted.resume and wanted.json else None
        seed = wanted.seed or 0
        found = sweeping.sweep(names, lambda case: run(case, schemes), wanted.jobs, wanted.json, known, seed)
    sweeping.print_matrix(found)
    if wanted.json:
        sweeping.write(wanted.json, found)
    return bool(sweeping.faults(found))


if __name__ == "__main__":
    sys.exit(main())
