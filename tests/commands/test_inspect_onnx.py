"""`inspect` of ONNX files: what is in them, what is quantized already, what a scheme would do; from headers only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.graphs import model, node
from support.onnx_models import cnn, encoder, feeds

from quantcli.cli.app import main
from quantcli.commands.convert import convert
from quantcli.commands.inspect_onnx import inspect_onnx
from quantcli.errors import InputError, UsageError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    for name, build in (("cnn", cnn), ("encoder", encoder)):
        onnx.save(build(), folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **feeds(name))
    return folder


def test_operators_weights_inputs_and_outputs(home: Path) -> None:
    report = inspect_onnx(home / "cnn.onnx")
    details = report.models[0].details
    assert details["operators"] == {
        "Conv": 2, "Relu": 2, "BatchNormalization": 1, "Add": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1,
    }  # fmt: skip
    sizes = [64 * 3 * 9, 64, 64, 64 * 64 * 9, 64, 128 * 64, 128]
    assert details["parameters"] == sum(sizes) and details["tensors"] == 7 and details["files"] == 1
    assert details["dtypes"] == {"F32": {"tensors": 7, "bytes": 4 * sum(sizes)}}
    assert details["inputs"] == ["x: float32 n x 3 x 12 x 12"] and details["outputs"] == ["y: float32 n x 128"]
    assert details["quantization"] is None
    assert report.models[0].size_bytes == (home / "cnn.onnx").stat().st_size
    roles = {row.name: row.details["role"] for row in report.layers}
    assert roles["body.weight"] == "Conv" and roles["head.weight"] == "Gemm" and roles["gamma"] == "constant"


@pytest.mark.parametrize(
    ("name", "scheme", "kind"),
    [
        ("cnn", "int8-static", "QDQ"), ("cnn", "int8", "n-bit"), ("encoder", "int4", "n-bit"),
        ("encoder", "nf4", "n-bit"),
        ("encoder", "int8-dynamic", "QOperator"),
    ],
)  # fmt: skip
def test_what_is_quantized_is_recognised(home: Path, tmp_path: Path, name: str, scheme: str, kind: str) -> None:
    convert(home / f"{name}.onnx", tmp_path / "o.onnx", scheme=scheme, data=home / f"{name}.npz")
    report = inspect_onnx(tmp_path / "o.onnx")
    details = report.models[0].details
    assert details["quantization"] == kind and details["parameters"] is None
    assert report.models[0].scheme == scheme and sum(details["quantized_layers"].values()) >= 2
    planned = inspect_onnx(tmp_path / "o.onnx", ["int8"])
    assert planned.details["schemes"][0]["applies"] is False
    assert "already quantized" in planned.details["schemes"][0]["reason"]


@pytest.mark.parametrize(
    ("nodes", "kind"),
    [
        ([node("DequantizeLinear", ["q", "s"], ["w"]), node("MatMul", ["x", "w"], ["y"])], "QDQ"),
        (
            [
                node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
                node("MatMulInteger", ["xq", "q", "xz"], ["i"]),
                node("Cast", ["i"], ["y"], to=1),
            ],
            "QOperator",
        ),
    ],
)  # fmt: skip
def test_models_that_others_quantized(tmp_path: Path, nodes: list[onnx.NodeProto], kind: str) -> None:
    held = {"q": np.arange(32 * 16, dtype=np.int8).reshape(32, 16), "s": np.float32(0.1)}
    onnx.save(model(nodes, {"x": ["n", 32]}, {"y": None}, held), tmp_path / "m.onnx")
    assert inspect_onnx(tmp_path / "m.onnx").models[0].details["quantization"] == kind


def test_schemes_are_planned_without_weights_or_data(home: Path) -> None:
    wanted = ["int8-static", "int4", "fp16"]
    report = inspect_onnx(home / "cnn.onnx", wanted)
    found = {entry["scheme"]: entry for entry in report.details["schemes"]}
    assert list(found) == wanted
    before = report.models[0].size_bytes
    assert before is not None
    for scheme, entry in found.items():
        assert entry["applies"] and entry["quantized_tensors"] == 3 and entry["left"] == {}
        assert entry["size_ratio"] == pytest.approx(entry["size_bytes"] / before)
        assert (0.23 if scheme != "fp16" else 0.49) < entry["size_ratio"] < (0.35 if scheme != "fp16" else 0.55)
    assert any("int4" in warning for warning in report.warnings), "convolutions get int8 instead"


def test_a_scheme_that_does_not_apply_says_why(tmp_path: Path) -> None:
    onnx.save(model([node("Relu", ["x"], ["y"])], {"x": ["n"]}, {"y": None}), tmp_path / "m.onnx")
    report = inspect_onnx(tmp_path / "m.onnx", ["int8"])
    assert report.details["schemes"][0]["applies"] is False and report.models[0].details["parameters"] == 0


def test_an_unknown_scheme_and_a_missing_file(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int9"):
        inspect_onnx(home / "cnn.onnx", ["int9"])
    with pytest.raises(InputError, match="does not exist"):
        inspect_onnx(tmp_path / "none.onnx")
    (tmp_path / "m.onnx").write_bytes((home / "cnn.onnx").read_bytes()[:1000])
    with pytest.raises(InputError, match="readable"):
        inspect_onnx(tmp_path / "m.onnx")


def test_weights_are_not_read(tmp_path: Path) -> None:
    """A hole of a file in place of the weights: reading its 40 GB would not go unnoticed."""
    rows, columns = 100_000, 100_000
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    proto = model(nodes, {"x": ["n", rows]}, {"y": None})
    tensor = proto.graph.initializer.add(name="w", data_type=1, dims=[rows, columns], data_location=1)
    tensor.external_data.add(key="location", value="w.bin")
    onnx.save(proto, tmp_path / "m.onnx")
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(4 * rows * columns)
    report = inspect_onnx(tmp_path / "m.onnx", ["int8", "int4", "fp16", "int8-dynamic"])
    assert report.models[0].details["parameters"] == rows * columns and report.models[0].details["files"] == 2
    assert all(entry["applies"] for entry in report.details["schemes"])


def test_the_command_and_its_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(home / "encoder.onnx")]) == 0
    shown = capsys.readouterr().out
    assert "MatMul" in shown and "ids: int64" in shown
    assert main(["inspect", str(home / "encoder.onnx"), "--scheme", "int8-dynamic", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "inspect" and document["models"][0]["format"] == "onnx"
    layers = {layer["name"]: layer for layer in document["layers"]}
    assert layers["up.weight"]["scheme"] == "int8-dynamic"
    assert layers["up.weight"]["bytes_before"] == 4 * 64 * 256 > 3 * layers["up.weight"]["bytes_after"]


@pytest.mark.parametrize("options", [[], ["--layers"], ["--json"]])
def test_neither_torch_nor_the_runtime_is_loaded(home: Path, options: list[str]) -> None:
    code = """if True:
        import json, sys
        from quantcli.cli.app import main
        status = main(sys.argv[1:])
        print(json.dumps([status, *sys.modules]))"""
    command = [sys.executable, "-c", code, "inspect", str(home / "cnn.onnx"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status, *loaded = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    assert not {"torch", "onnxruntime", "transformers"} & set(loaded)
