"""Models with scalar inputs, states and first axes that count no samples: every command takes their feeds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.tokenizers import save_tokenizer

import quantcli
from quantcli.benchmarking.feeds import load_feeds
from quantcli.benchmarking.generation import NEW_TOKENS
from quantcli.core.ports import Port
from quantcli.data.request import DataRequest
from quantcli.data.samples import batches, load_samples
from quantcli.data.sources.base import batch_sizes
from quantcli.errors import InputError
from quantcli.models.session import Session
from quantcli.models.source import open_model

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)


def ports(*shapes: tuple[Any, ...]) -> list[Port]:
    return [Port(f"p{number}", FLOAT, shape) for number, shape in enumerate(shapes)]


def folder(place: Path, *files: dict[str, np.ndarray]) -> Path:
    place.mkdir()
    for number, arrays in enumerate(files):
        np.savez(place / f"{number}.npz", **arrays)  # type: ignore[arg-type]
    return place


def sample_shapes(data: Path, inputs: list[Port]) -> list[list[tuple[int, ...]]]:
    samples = load_samples(DataRequest(str(data)), inputs, folder=None)
    return [[array.shape for array in feeds.values()] for feeds, _ in batches(samples, 4)]


def array(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("inputs", "shapes", "expected"),
    [
        (ports(("n", 4), (2, "n", 4), ()), [(1, 4), (2, 1, 4), ()], [(1, 4), (2, 1, 4), ()]),
        (ports((3, 4), (6, 5)), [(3, 4), (6, 5)], [(3, 4), (6, 5)]),
        (ports(("n", 4), (2, 4)), [(2, 4), (2, 4)], [(2, 4), (2, 4)]),
        (ports(()), [()], [()]),
    ],
)
def test_a_file_of_a_folder_that_fits_exactly_is_one_feed(
    tmp_path: Path, inputs: list[Port], shapes: list[tuple[int, ...]], expected: list[tuple[int, ...]]
) -> None:
    feeds = {f"p{number}": array(*shape) for number, shape in enumerate(shapes)}
    assert sample_shapes(folder(tmp_path / "d", feeds, feeds), inputs) == [expected, expected]


def test_samples_along_first_axes_stay_samples(tmp_path: Path) -> None:
    feeds = {"p0": array(5, 4), "p1": array(5, 3)}
    data = folder(tmp_path / "d", feeds)
    assert sample_shapes(data, ports(("n", 4), ("n", 3))) == [[(4, 4), (4, 3)], [(1, 4), (1, 3)]]
    fixed = folder(tmp_path / "f", {"p0": array(4, 4)}, {"p0": array(4, 4)})
    assert sample_shapes(fixed, ports((2, 4))) == [[(2, 4)]] * 4


def test_which_first_dimension_counts_samples() -> None:
    assert batch_sizes(ports((4, 3), (4, 2))) == {4}
    assert batch_sizes(ports(("n", 3), (2, "n", 2))) == set()
    assert batch_sizes(ports((3, 3), (6, 2))) == {3, 6}


def stateful(path: Path) -> Path:
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["state", "zero"], ["s"], axis=0),
        helper.make_node("Add", ["x", "s"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["z"]),
        helper.make_node("Cast", ["rate"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["z", "f"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "n", 64]),
        helper.make_tensor_value_info("rate", TensorProto.INT64, []),
    ]
    weights = {"zero": np.array(0), "w": generator.standard_normal((64, 96)).astype(np.float32)}
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 96])
    graph = helper.make_graph(nodes, "graph", inputs, [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_a_state_and_a_scalar_in_every_command(tmp_path: Path) -> None:
    model, generator = stateful(tmp_path / "m.onnx"), np.random.default_rng(1)
    files = [
        {
            "x": generator.standard_normal((1, 64)).astype(np.float32),
            "state": generator.standard_normal((2, 1, 64)).astype(np.float32),
            "rate": np.array(16000),
        }
        for _ in range(6)
    ]
    data = folder(tmp_path / "data", *files)
    quantcli.calibrate(model, data=data, output=tmp_path / "stats.safetensors")
    report = quantcli.convert(model, tmp_path / "o.onnx", scheme="int8-static", data=data)
    assert report.details["outputs"]["samples"] == 6
    found = quantcli.evaluate(model, [tmp_path / "o.onnx"], data=data).models[1].metrics
    before, after = (
        np.concatenate([Session(path).run(each)["y"] for each in files]).astype(np.float64)
        for path in (model, tmp_path / "o.onnx")
    )
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(np.square(before).sum() / np.square(before - after).sum()))
    stacked = {"x": "x", "state": "state", "rate": "rate"}
    np.savez(tmp_path / "all.npz", **{name: np.stack([each[key] for each in files]) for name, key in stacked.items()})
    again = quantcli.evaluate(model, [tmp_path / "o.onnx"], data=tmp_path / "all.npz").models[1].metrics
    assert again["sqnr_db"] == pytest.approx(found["sqnr_db"])


@pytest.mark.parametrize("scheme", ["int8-static", "int8", "int4"])
def test_a_fixed_number_of_samples(tmp_path: Path, scheme: str) -> None:
    generator = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, columns])]
        for name, columns in (("x", 64), ("y", 96))
    )
    weights = [numpy_helper.from_array(generator.standard_normal((64, 96)).astype(np.float32), "w")]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=generator.standard_normal((40, 64)).astype(np.float32))
    algorithm = "gptq" if scheme == "int4" else None
    report = quantcli.convert(
        tmp_path / "m.onnx", tmp_path / "o.onnx", scheme=scheme, algorithm=algorithm, data=tmp_path / "d.npz"
    )
    assert report.details["outputs"]["samples"] == 8


def traced_with(size: int, path: Path) -> Path:
    """A graph whose batch axis is free, and whose Reshape takes one number of samples."""
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Reshape", ["x", "split"], ["heads"]),
        helper.make_node("Reshape", ["heads", "join"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", columns])]
        for name, columns in (("x", 64), ("y", 96))
    )
    constants = {
        "split": np.array([size, 8, 8]),
        "join": np.array([size, -1]),
        "w": generator.standard_normal((64, 96)).astype(np.float32),
    }
    initializers = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(("size", "count"), [(8, 17), (37, 37)])
def test_a_free_batch_axis_that_runs_at_one_size_only(tmp_path: Path, size: int, count: int) -> None:
    model, data = traced_with(size, tmp_path / "m.onnx"), tmp_path / "d.npz"
    np.savez(data, x=np.random.default_rng(1).standard_normal((count, 64)).astype(np.float32))
    stats, artifact = tmp_path / "stats.safetensors", tmp_path / "o.onnx"
    left = count % size
    report = quantcli.calibrate(model, data=data, output=stats)
    assert report.details["samples"] == count - left
    told = [f"The model takes {size} samples at a time; the last {left} are left."] if left else []
    assert [warning for warning in report.warnings if "at a time" in warning] == told
    assert quantcli.convert(model, artifact, scheme="int8-static", calibration=stats, data=data).passed
    found = quantcli.evaluate(model, [artifact], data=data, by_layer=True)
    assert found.details["samples"] == count - left
    assert found.models[1].metrics["sqnr_db"] > 25  # type: ignore[operator]


def test_bench_takes_the_batch_size_that_runs(tmp_path: Path) -> None:
    request = DataRequest(str(tmp_path / "d.npz"))
    for size in (8, 37):
        model = traced_with(size, tmp_path / f"{size}.onnx")
        np.savez(request.data, x=np.random.default_rng(1).standard_normal((size, 64)).astype(np.float32))
        assert load_feeds([open_model(model)], request, None).shapes == {"x": [size, 64]}
    assert load_feeds([open_model(tmp_path / "8.onnx")], None, None).shapes == {"x": [8, 64]}


def test_a_free_batch_axis_without_data(tmp_path: Path) -> None:
    model = traced_with(8, tmp_path / "m.onnx")
    assert quantcli.convert(model, tmp_path / "o.onnx", scheme="int8").passed


def test_what_fits_in_no_way_is_listed(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", {"p0": array(3, 5), "p1": array(6, 5)})
    with pytest.raises(InputError, match="p0: float32 3 x 4 is expected, got float32 3 x 5"):
        sample_shapes(data, ports((3, 4), (6, 5)))


def test_text_is_fed_to_inputs_of_strings(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Identity", ["words"], ["same"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16]),
         helper.make_tensor_value_info("words", TensorProto.STRING, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
         helper.make_tensor_value_info("same", TensorProto.STRING, None)],
        [numpy_helper.from_array(array(16, 96), "w")],
    )  # fmt: skip
    model, data = tmp_path / "m.onnx", tmp_path / "d.npz"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), model)
    words = np.array([["a", "bcd"], ["é", ""]])
    hashes = set()
    for stored in (words, np.char.encode(words, "utf-8")):
        np.savez(data, x=array(2, 16), words=stored)
        samples = load_samples(DataRequest(str(data)), Session(model).inputs, folder=None)
        assert [sample.inputs["words"].tolist() for sample in samples] == [[["a", "bcd"]], [["é", ""]]]
        hashes |= {samples.sha256}
    assert len(hashes) == 1
    report = quantcli.convert(model, tmp_path / "o.onnx", scheme="int8-static", data=data)
    assert report.details["outputs"]["equal"] == 1.0
    assert quantcli.evaluate(model, [tmp_path / "o.onnx"], data=data).models[1].metrics["sqnr_db"] > 20


def test_sequences_are_no_longer_than_a_model_takes(models: Path, tmp_path: Path) -> None:
    """The tiny models know 64 positions; a decoder generates behind its prompt."""
    text = tmp_path / "text.txt"
    text.write_text("word " * 1000, encoding="utf-8")
    save_tokenizer(shutil.copytree(models / "bert", tmp_path / "bert"))
    bert = [open_model(tmp_path / "bert")]
    for request in (None, DataRequest(str(text))):
        assert load_feeds(bert, request, None).shapes["input_ids"] == [1, 64]
    assert load_feeds(bert, None, None, seq_len=9).shapes["input_ids"] == [1, 9]
    save_tokenizer(shutil.copytree(models / "llama", tmp_path / "llama"))
    quantcli.convert(tmp_path / "llama", tmp_path / "decoder", scheme="int8", format="onnx")
    decoder = open_model(tmp_path / "decoder")
    assert load_feeds([decoder], None, None).shapes["input_ids"] == [1, 64 - NEW_TOKENS]


def test_a_graph_with_few_places_is_given_as_few_tokens(tmp_path: Path) -> None:
    """A table of 20 positions, of which a text takes as many as it has tokens: no file says that it has 20."""
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["length"], start=1),
        helper.make_node("Slice", ["positions", "zero", "length", "zero"], ["own"]),
        helper.make_node("Gather", ["words", "input_ids"], ["embedded"]),
        helper.make_node("Add", ["embedded", "own"], ["y"]),
    ]
    values = np.random.default_rng(0).standard_normal((70, 8)).astype(np.float32)
    constants = {"words": values[:50], "positions": values[50:], "zero": np.zeros(1, np.int64)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    model = open_model(tmp_path / "m.onnx")
    assert load_feeds([model], None, None).shapes == {"input_ids": [1, 16]}
    assert load_feeds([model], None, [3]).shapes == {"input_ids": [3, 16]}
    assert load_feeds([model], None, None, seq_len=19).shapes == {"input_ids": [1, 19]}
