"""`calibrate` from a path to a STATS file, checked against the activations that onnx's own evaluator computes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from quantcli import calibrate as calibrate_function
from quantcli.calibration.statistics import CalibrationStats
from quantcli.cli.app import main
from quantcli.commands.calibrate import collect
from quantcli.commands.convert import convert
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.errors import InputError, UsageError
from quantcli.models.source import model_sha256
from quantcli.onnx.graph.model import open_onnx

VALUES = ("image", "c1", "r1", "c2", "r2", "p")


def model_file(folder: Path, *, seed: int = 0, external: bool = False, batch: int | str = "n") -> Path:
    """Conv, Relu, Conv, Relu, pooling, Gemm; height and width are free."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (16, 8, 3, 3), "b2": (16,), "w3": (16, 5), "b3": (5,)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), name) for name, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, "h", "w"])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])
    graph = helper.make_graph(nodes, "g", [given], [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="model.data", size_threshold=0)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve samples of two sizes."""
    rng = np.random.default_rng(1)
    (tmp_path / "data").mkdir()
    for number, size in enumerate(((9, 7), (12, 8), (9, 7))):
        images = rng.standard_normal((4, 3, *size)).astype(np.float32)
        np.save(tmp_path / "data" / f"{number}.npy", images)
    return tmp_path / "data"


def samples_of(model: Path, data: Path) -> Samples:
    return load_samples(DataRequest(str(data)), open_onnx(model).inputs, folder=None)


def same(left: CalibrationStats, right: CalibrationStats) -> bool:
    return list(left.tensors) == list(right.tensors) and all(
        np.array_equal(left[name].bins, right[name].bins)
        and np.array_equal(left[name].counts, right[name].counts)
        and (left[name].minimum, left[name].maximum) == (right[name].minimum, right[name].maximum)
        and np.array_equal(left[name].channel_maximum, right[name].channel_maximum)  # type: ignore[arg-type]
        for name in left.tensors
    )


def test_statistics_are_those_of_the_reference_evaluator(tmp_path: Path, data: Path) -> None:
    path = model_file(tmp_path)
    stats = collect(open_onnx(path).ir, samples_of(path, data), VALUES, model_sha256="m" * 64, seed=4)
    proto = onnx.load(path)
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in VALUES[1:])
    evaluator = ReferenceEvaluator(proto)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in VALUES}
    for sample in samples_of(path, data):
        for name, value in zip(VALUES, [sample.inputs["image"], *evaluator.run(None, sample.inputs)], strict=True):
            seen[name].append(np.moveaxis(value, 1, 0).reshape(value.shape[1], -1))
    assert list(stats.tensors) == list(VALUES)
    assert (stats.samples, stats.seed, stats.method, stats.model_sha256) == (12, 4, "mse", "m" * 64)
    for name, parts in seen.items():
        values = np.concatenate(parts, axis=1)
        assert stats[name].elements == values.size
        assert stats[name].minimum == pytest.approx(values.min(), rel=1e-4, abs=1e-5)
        assert stats[name].maximum == pytest.approx(values.max(), rel=1e-4)
        assert stats[name].channel_maximum == pytest.approx(values.max(axis=1), rel=1e-4, abs=1e-4)
        assert stats[name].distribution.quantile(0.7) == pytest.approx(np.quantile(values, 0.7), rel=1e-2, abs=1e-2)


def test_batches_chunks_and_external_weights_change_nothing(tmp_path: Path, data: Path) -> None:
    path, apart = model_file(tmp_path), model_file(tmp_path / "apart", external=True)
    assert len(list(apart.parent.iterdir())) == 2
    graph = open_onnx(path).ir
    before = ir.to_proto(graph).SerializeToString()
    options: dict[str, Any] = {"model_sha256": "", "observed": VALUES}
    whole = collect(graph, samples_of(path, data), **options)
    calls: list[tuple[int, int]] = []
    for size in (3, 4):
        assert same(whole, collect(graph, samples_of(path, data), batch_size=size, **options))
    chunked = collect(
        graph, samples_of(path, data), chunk_bytes=1, progress=lambda *call: calls.append(call), **options
    )
    assert same(whole, chunked)
    assert calls[-1] == (12 * len(VALUES), 12 * len(VALUES)) and calls == sorted(calls)
    assert same(whole, collect(open_onnx(apart).ir, samples_of(apart, data), chunk_bytes=1, **options))
    assert ir.to_proto(graph).SerializeToString() == before


def test_unknown_values_and_integers(tmp_path: Path, data: Path) -> None:
    path = model_file(tmp_path)
    with pytest.raises(InputError, match="The graph has no value nowhere"):
        collect(open_onnx(path).ir, samples_of(path, data), ["nowhere"], model_sha256="")
    only = collect(open_onnx(path).ir, samples_of(path, data), ["image"], model_sha256="")
    assert list(only.tensors) == ["image"] and only["image"].elements == 3 * 4 * (9 * 7 * 2 + 12 * 8)


def run(*arguments: object) -> int:
    return main(["calibrate", *map(str, arguments)])


def test_the_command_writes_statistics_of_this_model(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = model_file(tmp_path), tmp_path / "out" / "stats.safetensors"
    assert run(path, "--data", data, "-o", output, "--method", "mse", "--samples", 6, "--seed", 3, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    stats = CalibrationStats.load(output)
    stats.require_model(model_sha256(path))
    assert document["command"] == "calibrate" and document["models"][0]["sha256"] == stats.model_sha256
    assert (document["samples"], document["method"], document["seed"]) == (6, "mse", 3)
    assert document["data_sha256"] == stats.data_sha256
    names = [row["name"] for row in document["tensors"]]
    assert names == list(stats.tensors) and "image" in names
    for row in document["tensors"]:
        assert (row["low"], row["high"]) == stats.range(row["name"])
        assert row["sqnr_db"] == stats.sqnr_db(row["name"], row["low"], row["high"])
    first = output.read_bytes()
    assert run(path, "--data", data, "-o", output) == 2
    assert "exists. Use --force" in capsys.readouterr().err and output.read_bytes() == first
    assert run(path, "--data", data, "-o", output, "--method", "mse", "--samples", 6, "--seed", 3, "--force") == 0
    captured = capsys.readouterr()
    assert output.read_bytes() == first
    assert "Hardest to quantize" in captured.out or "hardest to quantize first" in captured.out
    assert "--calibration" in captured.err
    with pytest.raises(InputError, match="belong to another model"):
        stats.require_model(model_sha256(model_file(tmp_path / "other", seed=1)))


def test_warnings_name_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.zeros((2, 3, 8, 8), np.float32)
    values[0, 0, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", values)
    assert run(model_file(tmp_path), "--data", tmp_path / "x.npy", "-o", tmp_path / "s", "--json") == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert "image is not a number (NaN) in 1 of its 384 values, which were left out." in warnings
    assert "image was 0 everywhere, so its range says little." in warnings


def test_bad_input(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = model_file(tmp_path), tmp_path / "stats"

    def fails(status: int, message: str, *arguments: object) -> None:
        assert run(*arguments) == status
        error = capsys.readouterr().err
        assert message in error, error
        assert not output.exists() and not list(tmp_path.glob(".*"))

    fails(2, "calibrate needs --data", path, "-o", output)
    fails(
        2,
        "Unknown method 'entropie'. Did you mean 'entropy'?",
        path,
        "--data",
        data,
        "-o",
        output,
        "--method",
        "entropie",
    )
    fails(2, "overlap", path, "--data", data, "-o", path)
    fails(2, "exists", path, "--data", data, "-o", data)
    fails(3, "does not exist", tmp_path / "missing.onnx", "--data", data, "-o", output)
    fails(3, "does not exist", path, "--data", tmp_path / "missing", "-o", output)
    np.savez(tmp_path / "wrong.npz", picture=np.zeros((2, 3, 8, 8)))
    message = "image: float32 n x 3 x h x w is expected, got nothing; picture is no input, got float64 2 x 3 x 8 x 8."
    fails(3, message, path, "--data", tmp_path / "wrong.npz", "-o", output)
    np.save(tmp_path / "small.npy", np.zeros((2, 3, 1, 1), np.float32))
    fails(3, "onnxruntime could not run the model", path, "--data", tmp_path / "small.npy", "-o", output)
    path.write_bytes(path.read_bytes()[:100])
    fails(3, "is not a readable ONNX model", path, "--data", data, "-o", output)


def test_values_that_an_upgrade_makes_are_observed(tmp_path: Path) -> None:
    """Upsample becomes Resize; conversion quantizes values of the newer graph."""
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], pads=[1] * 4), helper.make_node("Upsample", ["h", "s"], ["u"]),
        helper.make_node("Conv", ["u", "w"], ["y"], pads=[1] * 4),
    ]  # fmt: skip
    weights = {"w": generator.standard_normal((16, 16, 3, 3), np.float32) / 12, "s": np.array([1, 1, 2, 2], np.float32)}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=generator.standard_normal((8, 16, 4, 4), np.float32))
    calibrate_function(tmp_path / "m.onnx", data=tmp_path / "d.npz", output=tmp_path / "s.safetensors")
    report = convert(
        tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8-static", calibration=tmp_path / "s.safetensors"
    )
    assert report.details["verified"]["runtime"]["integer_kernels"]["QLinearConv"] == 2


def test_what_cannot_be_calibrated(tmp_path: Path, data: Path) -> None:
    given, output = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 9, 7]) for name in ("x", "y"))
    node = helper.make_node("Tanh", ["x"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [given], [output]), ir_version=8)
    onnx.save(model, tmp_path / "tanh.onnx")
    with pytest.raises(InputError, match="nothing to calibrate"):
        calibrate_function(tmp_path / "tanh.onnx", data=data, output=tmp_path / "s")
    with pytest.raises(UsageError, match="--batch-size 0"):
        calibrate_function(model_file(tmp_path), data=data, output=tmp_path / "s", batch_size=0)


MODULE = """
import torch
def net():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)).eval()
    return module
net.example_inputs = (torch.zeros(2, 3, 9, 7),)
def random_net():
    return torch.nn.Conv2d(3, 8, 3)
"""


@pytest.mark.slow
def test_a_torch_module_is_exported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_net", raising=False)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 3, 9, 7)))
    report = calibrate_function("my_net:net", data="x.npy", output="stats")
    stats = CalibrationStats.load(tmp_path / "stats")
    assert report.models[0].sha256 == stats.model_sha256 == model_sha256("my_net:net")
    assert len(stats.tensors) >= 2
    torch.save(torch.nn.Conv2d(3, 8, 3).state_dict(), "weights.pt")
    calibrate_function("my_net:random_net", data="x.npy", output="one", weights="weights.pt")
    one = CalibrationStats.load(tmp_path / "one")
    one.require_model(hashlib.sha256(Path("weights.pt").read_bytes()).hexdigest())
    assert model_sha256("my_net:random_net") != model_sha256("my_net:random_net")


WIDE = """
import torch
def net():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3)).eval()
net.example_inputs = (torch.zeros(2, 3, 9, 7),)
"""


@pytest.mark.slow
def test_statistics_of_a_function_with_weights_fit_its_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wide_net.py").write_text(WIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 3, 9, 7)))
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3))
    torch.save(layers.state_dict(), "weights.pt")
    given: dict[str, Any] = {"weights": "weights.pt"}
    calibrate_function("wide_net:net", data="x.npy", output="stats", **given)
    convert("wide_net:net", "out.onnx", scheme="int8-static", calibration="stats", **given)
    assert (tmp_path / "out.onnx").exists()


def test_two_processes_do_not_write_one_file(tmp_path: Path, data: Path) -> None:
    model, target = model_file(tmp_path), tmp_path / "stats.safetensors"
    folder = tmp_path / ".stats.safetensors.partial"
    folder.mkdir()
    with FileLock(folder / "lock"), pytest.raises(InputError, match=r"Another process is writing .*stats.safetensors"):
        calibrate_function(model, data=data, output=target)
    assert folder.exists() and not target.exists()
    calibrate_function(model, data=data, output=target)
    assert target.is_file() and not folder.exists()
