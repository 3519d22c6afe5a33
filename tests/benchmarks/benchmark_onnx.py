"""The figures quantcli stands for with ONNX, measured on this machine and printed beside their limits.

Run: .venv/bin/python tests/benchmarks/benchmark_onnx.py [digits] [efficientnet] [detector] [weights] [minilm]
     [ocr] [recurrent] [calibration] [memory]

digits        a CNN trained on the spot, int8-static: integer kernels, accuracy, size
efficientnet  EfficientNet-Lite0, int8-static: output SQNR and latency beside onnxruntime's quantize_static. Images
              are crops of two photographs, all there is without a download: little data, and the same for both.
detector      a graph of the YOLO kind, random weights, int8-static: output SQNR and latency beside quantize_static's
              with unsigned activations, which alone become integer kernels
weights       convolutions with int8, int4 and FP16 weights and no more: latency beside the float graphs'
minilm        all-MiniLM-L6-v2: int8-dynamic, int8-static and int4 beside quantize_dynamic, quantize_static and the
              n-bits quantizer; calibrated on one half of a text, compared on the other
ocr           three PP-OCR models: every scheme, and the recognizer's accuracy on rendered pictures
recurrent     LSTM and GRU of two directions, weights as torch initializes them and with tails, int8-dynamic: size,
              output SQNR and latency beside quantize_dynamic's
calibration   EfficientNet-Lite0, entropy: peak memory with 512 samples beside 64, and time beside that of
              onnxruntime's entropy calibrator on as many samples as it can hold
memory        a graph of 4.03 GB in external data, int4 and int8-dynamic: peak memory of the conversion
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scoring
import theirs
from harness import line, main, show
from support import real_models
from support.detector import save_detector
from support.graphs import model, node, normal
from support.onnx_models import save_products

import quantcli
from quantcli.reporting.report import Report

SCHEMES = ("fp16", "bf16", "int8", "int4", "nf4", "int8-dynamic", "int8-static")

#: Samples to calibrate with, and pictures the recognizer reads; without that, outputs are compared on a few.
CALIBRATION, PICTURES, COMPARED = 64, 500, 64
#: Samples of the two runs whose memory is compared, and those that onnxruntime's calibrator is given.
MANY, FEW, THEIRS = 512, 64, 48

_OURS = """
import json, sys, time
from quantcli import calibrate
from quantcli.system.hardware import peak_rss_bytes
model, data, output, samples = sys.argv[1:]
start = time.monotonic()
report = calibrate(model, data=data, output=output, method="entropy", samples=int(samples), force=True)
print(json.dumps([time.monotonic() - start, peak_rss_bytes(), len(report.details["tensors"])]))
"""

_CONVERTED = """
import json, sys
from quantcli import convert
from quantcli.system.hardware import peak_rss_bytes
model, output, scheme = sys.argv[1:]
convert(model, output, scheme=scheme)
print(json.dumps([peak_rss_bytes()]))
"""

_THEIRS = """
import json, sys, time
import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator
from quantcli.system.hardware import peak_rss_bytes
model, data, scratch, samples = sys.argv[1:]
images = np.load(data)["image"][: int(samples)]

class Reader(CalibrationDataReader):
    def __init__(self):
        self.feeds = iter({"image": image[None]} for image in images)
    def get_next(self):
        return next(self.feeds, None)

start = time.monotonic()
calibrator = create_calibrator(model, augmented_model_path=scratch, calibrate_method=CalibrationMethod.Entropy)
calibrator.collect_data(Reader())
found = calibrator.compute_data()
print(json.dumps([time.monotonic() - start, peak_rss_bytes(), len(found.data)]))
"""


def ratio(report: Report) -> float:
    """Bytes of the artifact by those of the model."""
    return float(report.models[1].metrics["size_ratio"] or 0)


def kernels(counts: dict[str, int]) -> str:
    """How many of each, or "none"."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def show_latency(what: str, ours: Path, other: Path, samples: Sequence[scoring.Feeds]) -> None:
    """Ours beside theirs with one thread and with two; "not slower" up to what the interval of 95% tells."""
    for threads in (1, 2):
        found = scoring.latency(ours, other, samples, threads=threads)
        span = f"not slower; {found.ratio:.2f}x ({found.low:.2f}-{found.high:.2f})"
        line(f"{what}, {threads} thread(s), ours / theirs", str(found), span, found.not_slower)


def digits(folder: Path) -> None:
    """Kernels, accuracy and size."""
    import numpy as np

    model, calibration, test = real_models.digits_cnn(folder)
    small = folder / "int8.onnx"
    report = quantcli.convert(model, small, scheme="int8-static", data=str(calibration))
    proof = report.details["verified"]["runtime"]
    floating, left = sum(proof["float_kernels"].values()), proof["conversions_left"]
    show("digits int8-static: integer kernels", kernels(proof["integer_kernels"]))
    line("digits int8-static: Conv and Gemm left in float", str(floating), "none", floating == 0)
    show("digits int8-static: Q/DQ left", str(left))
    labels = np.load(test)["labels"]
    top1 = [
        100 * float(np.mean([each.argmax() for each in scoring.outputs(path, real_models.feeds(test))] == labels))
        for path in (model, small)
    ]
    drop = top1[0] - top1[1]
    line("digits int8-static: top1", f"{top1[0]:.2f} -> {top1[1]:.2f}%", "drop at most 0.5", drop <= 0.5)
    line("digits int8-static: size", f"{ratio(report):.3f}x", "at most 0.3x", ratio(report) <= 0.3)


def efficientnet(folder: Path) -> None:
    """Accuracy and speed of static quantization; the calibration images are the same for both."""
    model = real_models.efficientnet_lite0(folder)
    calibration, test = (real_models.crops(folder / f"{seed}.npz", 32, seed) for seed in (0, 1))
    samples = list(real_models.feeds(test))
    expected = scoring.outputs(model, samples)
    ours = folder / "ours.onnx"
    report = quantcli.convert(model, ours, scheme="int8-static", data=str(calibration))
    proof = report.details["verified"]["runtime"]
    prepared, best, best_db, fair_db = theirs.prepared(model, folder), folder, -99.0, -99.0
    for calibrator in theirs.CALIBRATORS:
        path = theirs.static(prepared, folder / f"{calibrator}.onnx", list(real_models.feeds(calibration)), calibrator)
        found = scoring.sqnr_db(expected, scoring.outputs(path, samples))
        fair = scoring.sqnr_db(expected, scoring.outputs(path, samples, exact=True))
        show(f"EfficientNet-Lite0 quantize_static {calibrator}: SQNR", f"{found:.1f} dB")
        show("  with session.x64quantprecision=1", f"{fair:.1f} dB")
        if found > best_db:
            best, best_db = path, found
        fair_db = max(fair_db, fair)
    values = scoring.outputs(ours, samples)
    ours_db = scoring.sqnr_db(expected, values)
    line("EfficientNet-Lite0 int8-static: SQNR", f"{ours_db:.1f} dB", f"above {best_db:.1f} dB", ours_db > best_db)
    limit = f"above {fair_db:.1f} dB"
    line("  beside theirs with session.x64quantprecision=1", f"{ours_db:.1f} dB", limit, ours_db > fair_db)
    show("EfficientNet-Lite0 int8-static: the same first class", f"{scoring.agreement(expected, values):.0%}")
    show("EfficientNet-Lite0 int8-static: float kernels left", kernels(proof["float_kernels"]))
    show_latency("EfficientNet-Lite0 int8-static", ours, best, samples)


def detector(folder: Path) -> None:
    """Static quantization where SiLU, Split, Concat and Resize stand between convolutions."""
    model = save_detector(folder / "detector.onnx")
    calibration, test = (real_models.crops(folder / f"{seed}.npz", 16, seed, size=320) for seed in (0, 1))
    samples, ours = list(real_models.feeds(test)), folder / "ours.onnx"
    report = quantcli.convert(model, ours, scheme="int8-static", data=str(calibration))
    proof = report.details["verified"]["runtime"]
    prepared = theirs.prepared(model, folder, symbolic=False)
    unsigned = theirs.QuantType.QUInt8
    other = theirs.static(prepared, folder / "theirs.onnx", list(real_models.feeds(calibration)), activations=unsigned)
    expected = scoring.outputs(model, samples)
    our_db, their_db = (scoring.sqnr_db(expected, scoring.outputs(path, samples)) for path in (ours, other))
    limit = f"at least {their_db:.1f} dB"
    line("detector int8-static: SQNR of the boxes", f"{our_db:.1f} dB", limit, our_db >= their_db)
    show("detector int8-static: integer kernels", kernels(proof["integer_kernels"]))
    show(
        "detector int8-static: float kernels, Q/DQ left",
        f"{kernels(proof['float_kernels'])}, {proof['conversions_left']}",
    )
    show_latency("detector int8-static", ours, other, samples)
    show("detector int8-static: latency, ours / float", str(scoring.latency(ours, model, samples, threads=1)))


def weights(folder: Path) -> None:
    """Weights alone in fewer bits: smaller, and not slower."""
    images = real_models.crops(folder / "images.npz", 8, 0)
    pages = real_models.text_pages(folder / "pages.npz", 4, 0)
    models = {"EfficientNet-Lite0": (real_models.efficientnet_lite0(folder), images)}
    models["PP-OCRv4 detector"] = (real_models.ocr_model("detector"), pages)
    for name, (plain, data) in models.items():
        for scheme in ("int8", "int4", "int8-dynamic", "fp16", "bf16"):
            path = folder / f"{name}-{scheme}.onnx"
            report = quantcli.convert(plain, path, scheme=scheme)
            found = scoring.latency(path, plain, list(real_models.feeds(data)), threads=1)
            shown = f"{found.ratio:.2f}x, {ratio(report):.2f} of the size"
            limit = f"at least 0.97x ({found.low:.2f}-{found.high:.2f})"
            line(f"{name} {scheme}: speed by that of floats", shown, limit, found.high >= 0.97)


def minilm(folder: Path) -> None:
    """Accuracy, speed and size of an encoder."""
    model, checkpoint = real_models.minilm(folder)
    calibration, test = real_models.prose_halves(folder)
    samples = real_models.sentences(test, model, checkpoint, CALIBRATION)
    expected = scoring.outputs(model, samples)

    def ours(scheme: str) -> tuple[Path, Report]:
        path = folder / f"{scheme}.onnx"
        text = str(calibration)
        return path, quantcli.convert(
            model, path, scheme=scheme, data=text, tokenizer=checkpoint, samples=CALIBRATION, seq_len=real_models.LENGTH
        )

    def scores(path: Path) -> tuple[float, float]:
        values = scoring.outputs(path, samples)
        return scoring.sqnr_db(expected, values), scoring.cosine(expected, values)

    other = theirs.dynamic(model, folder / "quantize_dynamic.onnx")
    dynamic, report = ours("int8-dynamic")
    (our_db, our_cosine), (their_db, their_cosine) = scores(dynamic), scores(other)
    line("MiniLM int8-dynamic: SQNR", f"{our_db:.2f} dB", f"at least {their_db:.2f} dB", our_db >= their_db)
    limit = f"at least {their_cosine:.4f}"
    line("MiniLM int8-dynamic: cosine", f"{our_cosine:.4f}", limit, our_cosine >= their_cosine)
    their_ratio = other.stat().st_size / model.stat().st_size
    show("MiniLM int8-dynamic: size, ours / theirs", f"{ratio(report):.3f} / {their_ratio:.3f}x")
    show_latency("MiniLM int8-dynamic", dynamic, other, samples)
    show_latency("MiniLM int8-dynamic, batches of 8", dynamic, other, batches(samples, 8))
    texts = real_models.sentences(calibration, model, checkpoint, CALIBRATION)
    # Their symbolic shape inference does not get through this model.
    prepared = theirs.prepared(model, folder, symbolic=False)
    other = theirs.static(prepared, folder / "quantize_static.onnx", texts)
    static, report = ours("int8-static")
    our_db, their_db = scores(static)[0], scores(other)[0]
    # "Far above": the noise must be less than half of theirs.
    line("MiniLM int8-static: SQNR", f"{our_db:.1f} dB", f"3 dB above {their_db:.1f} dB", our_db >= their_db + 3)
    proof = report.details["verified"]["runtime"]
    show("MiniLM int8-static: integer kernels", kernels(proof["integer_kernels"]))
    show("MiniLM int8-static: float kernels left", kernels(proof["float_kernels"]))
    small, report = ours("int4")
    other = theirs.four_bits(model, folder / "nbits.onnx")
    their_ratio = other.stat().st_size / model.stat().st_size
    what = f"at most 0.2x; theirs {their_ratio:.3f}x"
    line("MiniLM int4: size", f"{ratio(report):.3f}x", what, ratio(report) <= 0.2)
    show("MiniLM int4: SQNR, ours / theirs", f"{scores(small)[0]:.1f} / {scores(other)[0]:.1f} dB")


def batches(samples: Sequence[scoring.Feeds], size: int) -> list[scoring.Feeds]:
    """Samples of one row put together, so many at a time, as long as the shortest of them."""
    import numpy as np

    found: list[scoring.Feeds] = []
    for start in range(0, len(samples) - size + 1, size):
        group = samples[start : start + size]
        length = min(next(iter(each.values())).shape[1] for each in group)
        found.append({name: np.concatenate([each[name][:, :length] for each in group]) for name in group[0]})
    return found


def ocr(folder: Path) -> None:
    """Every scheme on every model, and what the recognizer reads."""
    read, known = real_models.phrases(PICTURES, 2), real_models.phrases(CALIBRATION, 1)
    data = {
        "detector": (real_models.text_pages(folder / "d0.npz", 16, 0), real_models.text_pages(folder / "d1.npz", 8, 1)),
        "recognizer": (
            real_models.text_lines(folder / "r0.npz", known, 0),
            real_models.text_lines(folder / "r1.npz", read, 1),
        ),
        "classifier": (
            real_models.text_directions(folder / "c0.npz", known, 0),
            real_models.text_directions(folder / "c1.npz", read[:64], 1),
        ),
    }
    drops = {}
    for kind, (calibration, test) in data.items():
        model = real_models.ocr_model(kind)
        samples = list(real_models.feeds(test))
        expected = scoring.outputs(model, samples)
        characters = scoring.recognizer_characters(model) if kind == "recognizer" else None
        if characters:
            accuracy = _accuracy(expected, read, characters)
            show("recognizer fp32: pictures read", f"{accuracy:.1f}%")
        for scheme in SCHEMES:
            path = folder / f"{kind}-{scheme}.onnx"
            # What reads activations gets data; the others need none.
            active = scheme.startswith("int8-")
            report = quantcli.convert(model, path, scheme=scheme, data=str(calibration) if active else None)
            values = scoring.outputs(path, samples if active else samples[:COMPARED])
            found = f"{scoring.sqnr_db(expected[: len(values)], values):.1f} dB, {ratio(report):.3f}x"
            show(f"{kind} {scheme}: SQNR, size", found)
            if characters and active:
                right = _accuracy(values, read, characters)
                drops[scheme] = accuracy - right
                show(f"{kind} {scheme}: pictures read", f"{right:.1f}%")
            if characters and scheme == "int8-static":
                chosen = report.details.get("recommended", scheme)
    drop = drops[chosen]
    line(f"recognizer {chosen}, recommended: drop", f"{drop:.1f} points", "at most 1", drop <= 1)


def _accuracy(values: Sequence[Any], texts: Sequence[str], characters: Sequence[str]) -> float:
    """Percent of texts read without a fault, spaces aside."""
    pairs = zip(values, texts, strict=True)
    right = [scoring.recognized(each, characters).replace(" ", "") == text.replace(" ", "") for each, text in pairs]
    return 100 * sum(right) / len(right)


def recurrent(folder: Path) -> None:
    """Recurrent layers, of one sample and of eight, beside `quantize_dynamic`."""
    for kind in ("LSTM", "GRU"):
        for tails in (False, True):
            name = f"{kind}, {'tails' if tails else 'as initialized'}"
            plain = _recurrent(folder / f"{kind}{tails}.onnx", kind, tails)
            ours = folder / f"{kind}{tails}-ours.onnx"
            report = quantcli.convert(plain, ours, scheme="int8-dynamic")
            other = theirs.dynamic(plain, folder / f"{kind}{tails}-theirs.onnx")
            line(f"{name}: size", f"{ratio(report):.3f}x", "at most 0.3x", ratio(report) <= 0.3)
            show(f"{name}: size with quantize_dynamic", f"{other.stat().st_size / plain.stat().st_size:.3f}x")
            for batch in (1, 8):
                samples = [{"x": normal(50, batch, 128, seed=seed)} for seed in range(4)]
                wanted = scoring.outputs(plain, samples)
                found, given = (scoring.sqnr_db(wanted, scoring.outputs(path, samples)) for path in (ours, other))
                # Where onnxruntime leaves a layer in float there is nothing to compare with.
                says, limit = ("at least theirs", given - 0.1) if given < 100 else ("theirs is float", 35.0)
                shown = f"{found:.1f} dB ({given:.1f})" if given < 100 else f"{found:.1f} dB"
                line(f"{name}, batch {batch}: output SQNR (theirs)", shown, says, found >= limit)
                show_latency(f"{name}, batch {batch}: latency", ours, other, samples)


def _recurrent(path: Path, kind: str, tails: bool) -> Path:
    """A layer of 128 inputs and 2 x 256 states."""
    import numpy as np
    import onnx

    rows, rng = {"LSTM": 4, "GRU": 3}[kind] * 256, np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        values = rng.standard_t(5, shape) / 1.5 if tails else rng.uniform(-1, 1, shape)
        return np.asarray(values / 16, np.float32)

    held = {"w": drawn(2, rows, 128), "r": drawn(2, rows, 256), "b": drawn(2, 2 * rows)}
    nodes = [node(kind, ["x", "w", "r", "b"], ["y"], hidden_size=256, direction="bidirectional")]
    onnx.save(model(nodes, {"x": ["steps", "batch", 128]}, {"y": None}, held), path)
    return path


def child(code: str, *arguments: object) -> list[Any]:
    """What a script prints as JSON, run in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(json.loads(output.splitlines()[-1]))


def calibration(folder: Path) -> None:
    """Memory and time of entropy calibration."""
    model = real_models.efficientnet_lite0(folder)
    data = real_models.synthetic_images(folder / "images.npz", MANY)
    few = child(_OURS, model, data, folder / "few.safetensors", FEW)
    many = child(_OURS, model, data, folder / "many.safetensors", MANY)
    growth = many[1] / few[1]
    show(f"peak memory, {FEW} samples", f"{few[1] / 1e6:.0f} MB")
    line(f"peak memory, {MANY} samples", f"{many[1] / 1e6:.0f} MB ({growth:.3f}x)", "at most 1.1x", growth <= 1.1)
    show(f"time of {MANY} samples, {many[2]} tensors", f"{many[0]:.1f} s")
    ours = child(_OURS, model, data, folder / "same.safetensors", THEIRS)
    other = child(_THEIRS, model, data, folder / "augmented.onnx", THEIRS)
    show(f"onnxruntime's peak memory, {THEIRS} samples", f"{other[1] / 1e6:.0f} MB")
    show(f"onnxruntime's time, {THEIRS} samples, {other[2]} tensors", f"{other[0]:.1f} s")
    share = ours[0] / other[0]
    line(f"our time, {THEIRS} samples", f"{ours[0]:.1f} s ({share:.3f}x)", "at most 0.333x", share <= 1 / 3)


def memory(folder: Path) -> None:
    """Peak memory of a conversion: the runtime holds one piece of one model at a time, and quantcli one weight."""
    plain = save_products(folder / "plain.onnx", layers=60, width=4096)
    size = plain.with_name("plain.onnx.data").stat().st_size
    for scheme in ("int4", "int8-dynamic"):
        (peak,) = child(_CONVERTED, plain, folder / f"{scheme}.onnx", scheme)
        line(f"{scheme} of {size / 1e9:.2f} GB: peak memory", f"{peak / 1e9:.2f} GB", "below 1 GB", peak < 1e9)


if __name__ == "__main__":
    prose = "prose, the help texts that come with Python"
    main(
        __doc__,
        {
            "digits": (digits, "the CNN of examples/digits.py on scikit-learn's digits"),
            "efficientnet": (efficientnet, "EfficientNet-Lite0 on crops of scikit-learn's two photographs"),
            "detector": (detector, "a detector of the YOLO kind, 320 x 320, on crops of the same photographs"),
            "weights": (weights, "EfficientNet-Lite0 and PP-OCRv4's detector, weights alone in fewer bits"),
            "minilm": (minilm, f"all-MiniLM-L6-v2 on {prose}"),
            "ocr": (ocr, "PP-OCRv4 detector, recognizer and classifier on rendered pictures of text"),
            "recurrent": (recurrent, "LSTM and GRU, 128 inputs and 2 x 256 states, on random sequences of 50 steps"),
            "calibration": (calibration, "EfficientNet-Lite0 on synthetic images"),
            "memory": (memory, "sixty products of random 4096 x 4096 matrices"),
        },
    )
