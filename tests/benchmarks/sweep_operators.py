"""Every operator test that the onnx package generates through every scheme: is what ends with exit status 0 right?

Run: .venv/bin/python tests/benchmarks/sweep_operators.py [--only GLOB] [--schemes ...] [--jobs N]
     [--limit N [--seed N]] [--json FILE [--resume]] [--quick]

Each graph is tried in six forms: ``as-is``; ``product``, two MatMul (of a rank-4 output two Conv beside them) with
constant weights behind its first float output; and ``constants``, the same with all inputs but the first turned
into initializers. ``listed`` is ``constants`` whose initializers are graph inputs, too, as before IR 4; ``external``
is ``product`` with its weights in a file beside it; ``alias`` is ``product`` whose output is an output twice, the
second time by an Identity. Each is inspected and converted with every scheme; what is written is run by onnxruntime
beside the original on the test's own inputs. ``int8-static`` is given data, ``calibrated`` is int8-static of ranges
that ``quantcli calibrate`` found. A scheme that asks for data, since the graph runs on nothing made up, gets it.

ok       exit status 0, the outputs' number, names, order, types and shapes are the original's, and their error is
         what weights of that many bits explain
refused  exit status 2 or 3, with a reason
FAULT    exit status 4, a traceback, a crash, no end; wrong outputs with exit status 0; a graph that onnxruntime runs
         and onnx accepts is called invalid or corrupt, or cannot be inspected
-        onnxruntime does not run the graph: inspect and convert may refuse it, and nothing else
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support import sweeping  # noqa: E402
from support.sweeping import FAULT, OK, REFUSED, SKIPPED, Ended, Outcome  # noqa: E402

if TYPE_CHECKING:
    import numpy
    import onnx

SCHEMES = ("inspect", "fp16", "bf16", "int8", "int4", "int8-dynamic", "int8-static", "calibrated")
FORMS = ("as-is", "product", "constants", "listed", "external", "alias")
#: Of many operators of different kinds, in CI.
QUICK = (
    *("test_gemm_default_matrix_bias", "test_matmul_3d", "test_conv_with_strides_padding", "test_lstm_defaults"),
    *("test_gru_seq_length", "test_if", "test_loop11", "test_scan9_sum", "test_sequence_insert_at_back"),
    *("test_averagepool_2d_ceil", "test_hardmax_axis_1", "test_einsum_batch_matmul", "test_attention_4d"),
    *("test_optional_get_element_tensor", "test_strnormalizer_nostopwords_nochangecase", "test_range_int32_type"),
    *("test_softmax_axis_1", "test_layer_normalization_4d_axis2", "test_gather_0", "test_where_example"),
    *("test_resize_upsample_scales_nearest", "test_quantizelinear", "test_dequantizelinear", "test_identity_sequence"),
)
#: Decibels under which the error is not that of weights of so many bits (and of activations of eight). Operator
#: tests are small and unkind: a threshold or an index behind a product turns a small error into another value.
LEAST = {
    "fp16": 30.0,
    "bf16": 25.0,
    "int8": 18.0,
    "int4": 5.0,
    "int8-dynamic": 8.0,
    "int8-static": 5.0,
    "calibrated": 5.0,
}
#: Schemes in which layers take integers.
INTEGER_INPUTS = ("int8-dynamic", "int8-static", "calibrated")
#: Floats of a byte that numpy does not have.
_EIGHT_BITS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
#: Seconds of processor time for one command, and of any time for one form of a graph through all of them: on a busy
#: machine a command may wait long.
COMMAND, CASE = 60, 1800
#: How a message says that a graph, which does run, does not; or that what it was just fed does not fit it.
_UNTRUE = re.compile(
    r"invalid|not (a )?valid|corrupt|damaged|malformed|not parse|could not run|cannot run|cannot be (loaded|written)"
    r"|which is missing|consistent ONNX|different numbers of samples|: ([\w ]+) is expected, got \3[;.]",
    re.IGNORECASE,
)
#: How a message says that made-up inputs are none that the graph runs on, and that data is needed.
_WITHOUT_DATA = re.compile(r"Nothing would show what the artifact computes")
#: Operator sets that no upgrade reaches may be refused.
_OLD = re.compile(r"uses operator set [1-6];")
#: Outputs that follow an error without measure, and so are compared by count, name, type and shape alone.
_JUMPS = re.compile(r"top_?k|argm|hardmax|nonzero|unique|multinomial|bernoulli|random|dropout|nonmax|round|floor|ceil")


def graphs() -> dict[str, Any]:
    """``test/form`` -> the operator test it is made of."""
    from onnx.backend.test.loader import load_model_tests

    return {f"{case.name}/{form}": case for case in load_model_tests(kind="node") for form in FORMS}


def formed(case: Any, form: str) -> tuple[onnx.ModelProto, dict[str, Any]] | None:
    """A graph in one of the forms, and what it is fed; None where this form of it would be another one."""
    import numpy
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    values = [_array(value) for value in case.data_sets[0][0]]
    feeds = dict(zip([entry.name for entry in model.graph.input], values, strict=False))
    if form != "as-is" and not _append_product(model):
        return None
    if form == "alias":
        first = model.graph.output[0]
        model.graph.node.append(onnx.helper.make_node("Identity", [first.name], ["sweep_alias"]))
        model.graph.output.append(first)
        model.graph.output[-1].name = "sweep_alias"
    if form in ("constants", "listed"):
        fixed = [name for name, value in list(feeds.items())[1:] if isinstance(value, numpy.ndarray)]
        fixed = [name for name in fixed if feeds[name].dtype.kind in "fiubV"]
        if not fixed:
            return None
        for name in fixed:
            model.graph.initializer.append(onnx.numpy_helper.from_array(feeds.pop(name), name))
        listed = form == "listed"
        kept = [entry for entry in model.graph.input if listed or entry.name in feeds]
        del model.graph.input[:]
        model.graph.input.extend(kept)
    return model, feeds


def _array(value: Any) -> Any:
    """What a test feeds, as a numpy array: types that numpy does not know come as protocol buffers."""
    import onnx

    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _append_product(model: onnx.ModelProto) -> bool:
    """Put weights, large enough to be worth it, behind the first float32 output; whether there is one."""
    import numpy
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    for place, output in enumerate(graph.output):
        tensor = output.type.tensor_type
        shape = [axis.dim_value for axis in tensor.shape.dim]
        if tensor.elem_type != TensorProto.FLOAT or not shape or 0 in shape or not _has_opset(model):
            continue
        wide, random = 128, numpy.random.default_rng(0)
        shapes = {"sweep_narrow": (shape[-1], wide), "sweep_weight": (wide, wide)}
        nodes = [("MatMul", output.name, "sweep_narrow", "sweep_hidden")]
        nodes += [("MatMul", "sweep_hidden", "sweep_weight", "sweep_product")]
        made = [helper.make_tensor_value_info("sweep_product", TensorProto.FLOAT, [*shape[:-1], wide])]
        if len(shape) == 4:
            shapes |= {"sweep_kernel": (64, shape[1], 1, 1), "sweep_kernels": (64, 64, 1, 1)}
            nodes += [("Conv", output.name, "sweep_kernel", "sweep_maps")]
            nodes += [("Conv", "sweep_maps", "sweep_kernels", "sweep_conv")]
            made.append(helper.make_tensor_value_info("sweep_conv", TensorProto.FLOAT, [shape[0], 64, *shape[2:]]))
        for name, form in shapes.items():
            incoming = form[1] if len(form) == 4 else form[0]
            values = random.standard_normal(form, numpy.float32) / numpy.float32(incoming**0.5)
            graph.initializer.append(numpy_helper.from_array(values, name))
        for operator, data, weight, result in nodes:
            graph.node.append(helper.make_node(operator, [data, weight], [result]))
        others = [entry for index, entry in enumerate(graph.output) if index != place]
        graph.value_info.append(output)
        del graph.output[:]
        graph.output.extend([*made, *others])
        return True
    return False


def _has_opset(model: onnx.ModelProto) -> bool:
    return any(entry.domain in ("", "ai.onnx") and entry.version >= 7 for entry in model.opset_import)


def run(name: str, case: Any, schemes: Sequence[str]) -> dict[str, Outcome]:
    """One form of one graph through all columns; what crashes is that column's fault, and the rest goes on."""
    row: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="sweep-") as place:
        log = Path(place) / "row.jsonl"
        while len(row) < len(schemes):
            left = [scheme for scheme in schemes if scheme not in row]
            done = sweeping.forked(lambda left=left: _columns(name, case, left, Path(place), log), CASE)
            lines = log.read_text().splitlines() if log.is_file() else []
            for line in lines:
                scheme, verdict, why, seconds = line.split("\t")
                row[scheme] = Outcome(verdict, why, float(seconds))
            if done.value == "none":
                return {}
            if len(row) < len(schemes):
                crashed = next(scheme for scheme in schemes if scheme not in row)
                row[crashed] = Outcome(FAULT, f"the process ended with status {done.status}: {done.last_line}"[:400])
    return row


def _columns(name: str, case: Any, schemes: Sequence[str], place: Path, log: Path) -> str:
    """In a fork: the columns one after another, each written down as soon as it is known."""
    import onnx

    test, _, form = name.rpartition("/")
    made = formed(case, form)
    if made is None:
        return "none"
    model, feeds = made
    file = place / "model.onnx"
    external = form == "external"
    onnx.save(
        model, file, save_as_external_data=external, location="weights.bin" if external else None, size_threshold=0
    )
    try:
        expected = _run(file, feeds)
    except Exception:
        expected = None
    _save_data(feeds, place / "data")
    for scheme in schemes:
        outcome = _column(file, scheme, place, feeds, expected, bool(_JUMPS.search(test)))
        why = " ".join(outcome.why.split())
        with log.open("a") as lines:
            lines.write(f"{scheme}\t{outcome.verdict}\t{why}\t{outcome.seconds:.2f}\n")
    return "done"


def _column(
    file: Path, scheme: str, place: Path, feeds: dict[str, Any], expected: dict[str, Any] | None, jumps: bool
) -> Outcome:
    artifact = place / f"{scheme}.onnx"
    command = ["convert", str(file), "-o", str(artifact), "--scheme", scheme, "--threads", "1"]
    if scheme == "inspect":
        command = ["inspect", str(file), "--scheme", "int8"]
    if scheme == "int8-static":
        command += ["--data", str(place / "data")]
    if scheme == "calibrated":
        ranges = str(place / "ranges.safetensors")
        command[command.index("--scheme") + 1] = "int8-static"
        command += ["--calibration", ranges]
        collected = _command(["calibrate", str(file), "--data", str(place / "data"), "-o", ranges])
        outcome = sweeping.judged(collected if collected.value else _command(command))
    else:
        outcome = sweeping.judged(_command(command))
    if _WITHOUT_DATA.search(outcome.why):
        outcome = sweeping.judged(_command([*command, "--data", str(place / "data")]))
    refused = outcome.verdict == REFUSED and expected is not None and not _OLD.search(outcome.why)
    if refused and (scheme == "inspect" or _UNTRUE.search(outcome.why)):
        return Outcome(FAULT, f"a graph that runs is refused: {outcome.why}", outcome.seconds)
    if outcome.verdict != OK or scheme == "inspect":
        return outcome
    if expected is None:
        return Outcome(SKIPPED, "onnxruntime does not run the original", outcome.seconds)
    if scheme == "int8-dynamic" and not all(map(_is_finite, feeds.values())):
        return Outcome(SKIPPED, "a range with a NaN in it leaves no numbers", outcome.seconds)
    try:
        wrong = _difference(expected, _run(artifact, feeds), LEAST[scheme], jumps, scheme in INTEGER_INPUTS)
    except Exception as error:
        wrong = f"the artifact does not run: {error}"
    return Outcome(FAULT if wrong else OK, f"exit 0, and {wrong}"[:400] if wrong else "", outcome.seconds)


def _is_finite(value: Any) -> bool:
    import numpy

    if not isinstance(value, numpy.ndarray) or (value.dtype.kind != "f" and "float" not in value.dtype.name):
        return True
    return bool(numpy.isfinite(value.astype(numpy.float64)).all())


def _command(arguments: Sequence[str]) -> Ended:
    """The command line in this process, with everything that is said on both streams."""
    from quantcli.cli.app import main

    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as said, _streams(said.fileno()):
        signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, COMMAND)
        try:
            status = main(list(arguments))
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stderr.flush()
        sys.stdout.flush()
        said.seek(0)
        text = said.read()
    return Ended(0, status, "", text, time.monotonic() - start)


def _too_long(_signal: int, _frame: Any) -> None:
    raise TimeoutError(f"no end within {COMMAND} s")


@contextlib.contextmanager
def _streams(number: int) -> Iterator[None]:
    """Both streams of this process, those of C++ too, into one file."""
    kept = [os.dup(stream) for stream in (1, 2)]
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(number, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, old in zip((1, 2), kept, strict=True):
            os.dup2(old, stream)
            os.close(old)


def _run(file: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    fed = {name: value for name, value in feeds.items() if name in wanted}
    types = [entry.type for entry in (*session.get_inputs(), *session.get_outputs())]
    if any(_is_narrow(kind) for kind in types):
        return dict(zip(names, _run_narrow(session, fed), strict=True))
    return dict(zip(names, session.run(None, fed), strict=True))


def _is_narrow(kind: str) -> bool:
    """Whether numpy has no such type, and onnxruntime neither takes nor gives arrays of it."""
    return bool(re.search(r"tensor\((bfloat16|float[84]|u?int[24]\))", kind))


def _run_narrow(session: Any, feeds: dict[str, Any]) -> list[Any]:
    """Run a graph with inputs or outputs of types that numpy does not have; those below a byte come as their bytes."""
    import ctypes

    import ml_dtypes
    import numpy
    import onnx
    import onnxruntime

    # onnxruntime calls the types of eight bits without the underscore that ml_dtypes has.
    known = {name.replace("_", ""): getattr(ml_dtypes, name) for name in ("bfloat16", *_EIGHT_BITS)}

    fed = {}
    for name, value in feeds.items():
        values = numpy.asarray(value)
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        fed[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, kind)
    found = []
    for value in session.run_with_ort_values(None, fed):
        if not _is_narrow(value.data_type()):
            found.append(value.numpy())
            continue
        content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        dtype = known.get(value.data_type()[len("tensor(") : -1])
        found.append(numpy.frombuffer(content, numpy.uint8 if dtype is None else dtype))
        if dtype is not None:
            found[-1] = found[-1].reshape(value.shape())
    return found


def _save_data(feeds: dict[str, Any], folder: Path) -> None:
    """One sample of exactly these arrays, four times."""
    import numpy

    folder.mkdir(exist_ok=True)
    arrays = {name: numpy.asarray(value) for name, value in feeds.items() if not isinstance(value, list | type(None))}
    # numpy's files know no types but its own.
    arrays = {name: _plain(array) for name, array in arrays.items()}
    for number in range(4):
        with contextlib.suppress(Exception):
            numpy.savez(folder / f"{number}.npz", **arrays)


def _plain(array: numpy.ndarray) -> numpy.ndarray:
    import ml_dtypes
    import numpy

    if not hasattr(ml_dtypes, array.dtype.name):
        return array
    return array.astype(numpy.int8 if "int" in array.dtype.name else numpy.float32)


def _difference(
    expected: dict[str, Any], got: dict[str, Any], least: float, jumps: bool, integer_inputs: bool = False
) -> str:
    """What differs beyond what weights of fewer bits explain; empty where nothing does.

    ``integer_inputs``: layers take integers, among which there is no NaN; a test that feeds one gets a number.
    """
    import numpy

    if list(expected) != list(got):
        return f"outputs are {list(got)}, expected {list(expected)}"
    for name, value in expected.items():
        other = got[name]
        if type(value) is not type(other):
            return f"{name} is a {type(other).__name__}, expected a {type(value).__name__}"
        if not isinstance(value, numpy.ndarray):
            if isinstance(value, list) and len(value) != len(other):
                return f"{name} has {len(other)} elements, expected {len(value)}"
            continue
        if value.dtype != other.dtype:
            return f"{name} is {other.dtype}, expected {value.dtype}"
        if value.shape != other.shape:
            return f"{name} has shape {other.shape}, expected {value.shape}"
        if jumps:
            continue
        wrong = _far(name, value, other, least, integer_inputs)
        if wrong:
            return wrong
    return ""


def _far(name: str, value: numpy.ndarray, other: numpy.ndarray, least: float, integer_inputs: bool) -> str:
    import numpy

    if value.dtype.kind != "f" and "float" not in value.dtype.name:
        if value.dtype.kind in "OSU":
            return "" if (value == other).all() else f"{name} has other strings"
        apart = (value.astype(numpy.float64) != other.astype(numpy.float64)).mean() if value.size else 0
        return f"{name}: {100 * apart:.0f} % of its {value.dtype} values differ" if apart > 0.1 else ""
    a, b = value.astype(numpy.float64), other.astype(numpy.float64)
    finite = numpy.isfinite(a)
    if not numpy.isfinite(b)[finite].all():
        return f"{name} is not finite where the original is"
    if not integer_inputs and numpy.isfinite(b)[~finite].any():
        return f"{name} is finite where the original is not"
    signal, noise = (a[finite] ** 2).sum(), ((a[finite] - b[finite]) ** 2).sum()
    if noise <= 1e-12 * max(finite.sum(), 1):
        return ""
    decibels = 10 * numpy.log10(signal / noise) if signal else -100.0
    return f"{name} has {decibels:.1f} dB" if decibels < least else ""


def preload() -> None:
    """Import once what every case needs, before the first fork; nothing of it may start a thread."""
    os.environ.update(sweeping.ENVIRONMENT)
    import onnx
    import onnxruntime
    import torch

    import quantcli.cli.app
    import quantcli.commands.convert
    import quantcli.commands.inspect
    import quantcli.commands.inspect_onnx
    import quantcli.conversion.onnx.pipeline  # noqa: F401

    onnx.checker  # noqa: B018
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(4)


def quick(jobs: int = 2) -> dict[str, dict[str, Outcome]]:
    """The part that runs in CI."""
    preload()
    known = graphs()
    # The last three forms are the same work whatever the operator: one of them each.
    every = [name for name in known if name.rpartition("/")[0] in QUICK]
    names = [n for n in every if n.rpartition("/")[2] in FORMS[:3] or n.startswith((QUICK[0], QUICK[5]))]
    return swept(names, known, SCHEMES, jobs)


def swept(
    names: Sequence[str],
    known: dict[str, Any],
    schemes: Sequence[str],
    jobs: int,
    file: Path | None = None,
    resume: bool = False,
) -> dict[str, dict[str, Outcome]]:
    """Rows of all forms that there are."""
    done = sweeping.read(file) if file and resume else None
    found = sweeping.sweep(names, lambda name: run(name, known[name], schemes), jobs, file, done)
    return {name: row for name, row in found.items() if row}


def main() -> int:
    wanted = sweeping.options(__doc__, SCHEMES).parse_args()
    preload()
    if wanted.quick:
        found = quick(wanted.jobs)
    else:
        known = graphs()
        names = sweeping.chosen(known, wanted.only, wanted.limit, wanted.seed)
        found = swept(names, known, tuple(wanted.schemes.split(",")), wanted.jobs, wanted.json, wanted.resume)
    sweeping.print_matrix(found)
    if wanted.json:
        sweeping.write(wanted.json, found)
    return bool(sweeping.faults(found))


if __name__ == "__main__":
    sys.exit(main())
