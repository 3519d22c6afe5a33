"""Members of a family that are added from outside of the package, and used from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_onnx import classifier

from quantcli.algorithms import ALGORITHMS
from quantcli.algorithms import Entry as AlgorithmEntry
from quantcli.cli.app import main
from quantcli.core.plugins import Entry
from quantcli.core.scheme import PRESETS, Granularity, NumberFormat, Scheme
from quantcli.formats import FORMATS
from quantcli.planning.targets import TARGETS

ROUNDING = """
from dataclasses import replace
from quantcli.algorithms import rtn

NEEDS = frozenset()

def supports(number_format):
    return None if number_format.dtype == "int8" else "mine knows int8 only"

def run(weight, number_format, scale_dtype):
    tensor = rtn.run(weight, number_format, scale_dtype)
    return replace(tensor, codes=tensor.codes // 2 * 2)
"""

CALIBRATED = """
from pydantic import Field
from quantcli.algorithms import rtn
from quantcli.algorithms.base import AlgorithmOptions
from quantcli.core.tensors import RoundedTensor, Rounding

NEEDS = frozenset({"absmax"})

class Options(AlgorithmOptions):
    limit: float = Field(default=1.0, gt=0)

def supports(number_format):
    return None

def round_layers(layers, options):
    chosen = {}
    for name, weight in layers.weights.items():
        assert layers.stats[name].absmax.shape == (weight.shape[1],)
        tensor = rtn.run(weight.clamp(-options.limit, options.limit), layers.formats[name], layers.scale_dtype)
        chosen[name] = RoundedTensor(tensor, Rounding("mine", f"clipped at {options.limit:g}"))
    return chosen
"""

TRANSFORM = """
import torch

NEEDS = frozenset({"absmax"})

def supports(number_format):
    return None

def input_scale(readers, options):
    return torch.full_like(readers.stats.absmax, 2.0)
"""

FORMAT = """
from quantcli.core.tensors import TensorSpec
from quantcli.formats.base import Storage

NAME = "mine"
STORAGE = Storage(scale_dtype="F32")

def supports(scheme):
    return None if str(scheme) == "int8, channel" else "mine carries int8 per channel"

def carries(role):
    return None

def fits(shape, scheme):
    return None

def together(schemes):
    return None

def codes_name(weight, scheme):
    return f"{weight}.codes"

def layout(weight, shape, scheme, scale_dtype):
    return {f"{weight}.codes": TensorSpec("I8", shape), f"{weight}.scale": TensorSpec(scale_dtype, (shape[0],))}

def codes_offset(row, columns, scheme):
    return row * columns

def encode_codes(codes, scheme):
    return ~codes

def decode_codes(stored, columns, scheme):
    return ~stored

def encode_scales(weight, tensor, scheme, scale_dtype):
    return {f"{weight}.scale": tensor.scale.squeeze(1)}

def decode_scales(weight, shape, scheme, load):
    return load(f"{weight}.scale").unsqueeze(1), None

def config(schemes, left, dtype):
    return {"quant_method": NAME}

def find(infos, section, load):
    return {}
"""

TARGET = """
from quantcli.planning.targets.base import Refusal

CHECKED = {"mine": "Mine 1.0"}
LOADS_ONNX = False

def no_groups(plan, target):
    if target.is_before("2") and any(layer.scheme.weights.is_grouped for layer in plan.quantized):
        return Refusal(f"{target.name} has no groups", "Use --scheme int8.")

RULES = (no_groups,)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_runtime_check: None) -> Path:
    """A folder on the path with a model in it."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{index}.fc.weight": torch.randn(16, 64, generator=generator) for index in range(2)}
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def converted(folder: Path, *options: str, model: str = "model.safetensors") -> dict[str, Any]:
    """The manifest of a conversion of the model into ``out``."""
    assert main(["convert", str(folder / model), "-o", str(folder / "out"), "--quiet", *options]) == 0
    manifest: dict[str, Any] = json.loads((folder / "out" / "quantcli.json").read_text())
    return manifest


def test_a_rounding_of_ones_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_rounding.py").write_text(ROUNDING)
    monkeypatch.setitem(ALGORITHMS, "mine", AlgorithmEntry("my_rounding", "even codes", ("rounding",), onnx=True))
    manifest = converted(folder, "--scheme", "int8-dynamic", "--algorithm", "mine", "--format", "compressed-tensors")
    assert manifest["algorithm"] == "mine"
    assert manifest["layers"]["layers.0.fc.weight"]["algorithm"] == "mine"
    codes = load_file(folder / "out" / "model.safetensors")["layers.0.fc.weight"]
    assert codes.dtype == torch.int8 and codes.any() and not (codes % 2).any()
    assert main(["convert", str(folder / "model.safetensors"), "-o", "x", "-s", "int4", "--algorithm", "mine"]) == 2
    assert "The algorithm mine does not fit: mine knows int8 only." in capsys.readouterr().err
    classifier(folder / "model.onnx", np.random.default_rng(0).standard_normal((64, 16)), np.zeros(16))
    options = ["--scheme", "int8", "--algorithm", "mine", "--json"]
    assert main(["convert", str(folder / "model.onnx"), "-o", str(folder / "out.onnx"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["models"][1]["algorithm"] == "mine"


def test_a_calibrated_rounding_and_a_transform_of_ones_own(
    folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "my_clipping.py").write_text(CALIBRATED)
    (folder / "my_transform.py").write_text(TRANSFORM)
    monkeypatch.setitem(ALGORITHMS, "mine", AlgorithmEntry("my_clipping", "clip", ("calibrated rounding",)))
    monkeypatch.setitem(ALGORITHMS, "twice", AlgorithmEntry("my_transform", "double", ("transform",)))
    (folder / "recipe.yaml").write_text("scheme: int8\nsteps: [twice, mine: {limit: 0.05}]\n")
    (folder / "data.py").write_text(
        "import numpy as np\ndef load():\n    yield {'input_ids': np.arange(16, dtype=np.int64)[None]}\n"
    )
    manifest = converted(
        folder, "--recipe", str(folder / "recipe.yaml"), "--data", "data:load", model=str(models / "llama")
    )
    assert manifest["algorithm"] == "twice + mine"
    entries = [entry for entry in manifest["layers"].values() if entry.get("scheme")]
    assert entries and all(entry["note"] == "clipped at 0.05" for entry in entries)


def test_a_format_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_format.py").write_text(FORMAT)
    monkeypatch.setitem(FORMATS, "mine", Entry("my_format", "inverted bits"))
    assert converted(folder, "--scheme", "int8", "--format", "mine")["format"] == "mine"
    weight = load_file(folder / "model.safetensors")["layers.1.fc.weight"]
    parts = load_file(folder / "out" / "model.safetensors")
    decoded = (~parts["layers.1.fc.weight.codes"]).float() * parts["layers.1.fc.weight.scale"].unsqueeze(1)
    assert torch.allclose(decoded, weight, atol=float(weight.abs().max()) / 250)


@pytest.mark.parametrize(
    ("function", "returned"),
    [
        ("encode_codes", "codes[:, 1:]"),
        ("encode_scales", '{f"{weight}.scale": tensor.scale}'),
        ("encode_scales", '{f"{weight}.scale": tensor.scale.squeeze(1).half()}'),
        ("decode_codes", "stored[:, 1:]"),
        ("decode_scales", 'load(f"{weight}.scale").half(), None'),
    ],
)
def test_a_format_that_does_not_do_as_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, returned: str
) -> None:
    start = FORMAT.index(f"def {function}(")
    line = FORMAT[FORMAT.index("    return", start) :].split("\n", 1)[0]
    name = f"broken_{abs(hash((function, returned)))}"
    (folder / f"{name}.py").write_text(FORMAT[:start] + FORMAT[start:].replace(line, f"    return {returned}", 1))
    monkeypatch.setitem(FORMATS, "mine", Entry(name, "broken"))
    with pytest.raises(AssertionError):
        converted(folder, "--scheme", "int8", "--format", "mine", "--debug")


def test_a_scheme_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "mine", Scheme(NumberFormat("int8", Granularity("group", 32)), help="finer int8"))
    manifest = converted(folder, "--scheme", "mine")
    assert manifest["scheme"] == "mine"
    assert load_file(folder / "out" / "model.safetensors")["layers.0.fc.weight_scale"].shape == (16, 2)


def test_a_target_of_ones_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_target.py").write_text(TARGET)
    monkeypatch.setitem(TARGETS, "mine", Entry("my_target", "My runtime"))
    command = ["convert", str(folder / "model.safetensors"), "-o", str(folder / "out"), "--dry-run"]
    assert main([*command, "--scheme", "int8", "--target", "mine==1.5"]) == 0
    assert main([*command, "--scheme", "int4", "--target", "mine"]) == 0
    capsys.readouterr()
    assert main([*command, "--scheme", "int4", "--target", "mine==1.5"]) == 2
    assert "--target mine==1.5: Mine has no groups (checked on Mine 1.0). Use --scheme int8." in capsys.readouterr().err
    classifier(folder / "model.onnx", np.random.default_rng(0).standard_normal((64, 16)), np.zeros(16))
    assert (
        main(
            [
                "convert",
                str(folder / "model.onnx"),
                "-o",
                str(folder / "o.onnx"),
                "--scheme",
                "int8",
                "--target",
                "mine",
            ]
        )
        == 2
    )
    assert "mine does not load ONNX." in capsys.readouterr().err
