"""onnxruntime's own quantizers, as their documentation says to use them, to be measured beside ours."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

# The n-bits quantizer, when it is imported, makes every library's log go to stderr.
logging.getLogger().setLevel(logging.ERROR)

CALIBRATORS = ("MinMax", "Entropy", "Percentile")


class _Reader(CalibrationDataReader):
    def __init__(self, samples: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._samples: Iterator[Mapping[str, np.ndarray]] = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self._samples, None)
        return None if found is None else dict(found)


def prepared(model: Path, folder: Path, *, symbolic: bool = True) -> Path:
    """The model after their preparation: graph optimized, shapes inferred, symbolic ones where that succeeds."""
    path = folder / f"{model.stem}-prepared.onnx"
    # Where symbolic shapes fail, it leaves the graph and its weights in the working directory.
    source, target = str(model.resolve()), str(path.resolve())
    with contextlib.chdir(folder):
        quant_pre_process(source, target, skip_symbolic_shape=not symbolic)
    return path


def static(
    model: Path,
    output: Path,
    samples: Sequence[Mapping[str, np.ndarray]],
    calibrator: str = "MinMax",
    *,
    activations: QuantType = QuantType.QInt8,
) -> Path:
    """QDQ, weights per channel, 8-bit activations; signed ones are their default."""
    with contextlib.redirect_stdout(None):
        quantize_static(
            str(model), str(output), _Reader(samples), per_channel=True,
            calibrate_method=getattr(CalibrationMethod, calibrator), activation_type=activations,
        )  # fmt: skip
    return output


def dynamic(model: Path, output: Path) -> Path:
    """Weights per channel, activations by their range at inference."""
    quantize_dynamic(str(model), str(output), per_channel=True, weight_type=QuantType.QInt8)
    return output


def four_bits(model: Path, output: Path) -> Path:
    """Weights of MatMul in blocks of 128."""
    quantizer = MatMulNBitsQuantizer(str(model), block_size=128, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    onnx.save(quantizer.model.model, str(output))
    return output
