"""`bench`: figures that hang together, data that is made up only with a word, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from support.tiny_onnx import FLOAT, INT64, classifier, language_model, save, weights

import quantcli
from quantcli.benchmarking.probe import Probe, probe
from quantcli.cli.app import main
from quantcli.core.ports import Port
from quantcli.data.made_up import made_up_feeds
from quantcli.errors import InputError, UsageError
from quantcli.system.hardware import cpu_name

USER = """
import time
import torch

class Slow(torch.nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.linear = seconds, torch.nn.Linear(8, 7)

    def forward(self, x):
        time.sleep(self.seconds)
        return self.linear(x)

def slow():
    return Slow(0.02)

def fast():
    return Slow(0.005)

def large():
    torch.ones(50_000_000).sum()  # 200 MB for a moment
    return Slow(0)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bench_user.py").write_text(USER)
    classifier(tmp_path / "model.onnx", *weights())
    np.savez(tmp_path / "data.npz", x=np.zeros((6, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_user", raising=False)
    return tmp_path


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the processes that measure memory: each takes seconds."""
    monkeypatch.setattr("quantcli.benchmarking.probe.probe", lambda *_, **__: Probe(1.0, 2, 1))


def test_sleeping_models_are_as_slow_as_they_sleep(place: Path, no_child: None) -> None:
    gates = ["speedup > 1.5", "latency_ms_p50 < 1"]
    report = quantcli.bench("bench_user:slow", ["bench_user:fast"], data="data.npz", runs=8, require=gates)
    slow, fast = report.models
    assert 20 <= slow.metrics["latency_ms_p50"] <= slow.metrics["latency_ms_p90"] <= slow.metrics["latency_ms_p99"]
    assert 5 <= fast.metrics["latency_ms_p50"] < 20
    # Sleeps are four to one; on a busy machine either may last longer.
    assert 1.5 < fast.metrics["speedup_low"] <= fast.metrics["speedup"] <= fast.metrics["speedup_high"]
    assert fast.metrics["speedup"] < 6
    assert fast.details["batches"][0]["verdict"] == "faster"
    assert slow.metrics["throughput_per_s"] < 50
    assert "speedup" not in slow.metrics
    assert slow.metrics["size_bytes"] == (8 * 7 + 7) * 4
    assert [gate.passed for gate in report.gates] == [True, False]
    assert report.warnings == []
    assert slow.details["kernels"]["dtypes"] == ["float32"]


def test_several_batch_sizes(place: Path, no_child: None) -> None:
    report = quantcli.bench("model.onnx", ["model.onnx"], data="data.npz", batch_size=[2, 3], runs=20, threads=1)
    for row in report.models:
        assert [batch["batch_size"] for batch in row.details["batches"]] == [2, 3]
        assert row.metrics["latency_ms_p50"] == row.details["batches"][0]["latency_ms_p50"]
        for batch in row.details["batches"]:
            mean = 1e3 * batch["batch_size"] / batch["throughput_per_s"]
            assert batch["latency_ms_p50"] / 3 < mean < batch["latency_ms_p99"] * 3
    assert report.details["inputs"] == {"x": [2, 8]}
    assert (report.details["threads"], report.details["device"]) == (1, "cpu")
    assert report.models[0].details["kernels"]["float_kernels"] == {"Gemm": 1}
    assert report.details["runtimes"][0].startswith("onnxruntime ")


def test_the_command_line(place: Path, no_child: None, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["bench", "model.onnx", "model.onnx", "--runs", "3", "--threads", "1"]
    assert main([*base, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["models"][1]["batches"][0]["rounds"] == 3
    assert "the inputs are made up (x [1, 8])" in document["warnings"][0]
    assert "made up" in captured.err
    junit = place / "gates.xml"
    assert main([*base, "--data", "data.npz", "--require", "size_ratio < 1", "--junit", str(junit)]) == 1
    captured = capsys.readouterr()
    assert "Speed-up" in captured.out
    assert "float: 1 Gemm" in captured.out
    assert cpu_name() in captured.out.replace("\n", " ")
    assert "<failure" in junit.read_text()
    assert "made up" not in captured.err


@pytest.mark.slow
def test_memory_and_loading_are_measured_in_a_process_of_their_own(place: Path) -> None:
    ballast = torch.ones(200_000_000)  # 800 MB that the child must not be charged with
    feeds = {"x": np.zeros((1, 8), np.float32)}
    small = probe("bench_user:fast", "function", feeds, threads=1)
    large = probe("bench_user:large", "function", feeds, threads=1)
    assert 180e6 < large.peak_rss_bytes - small.peak_rss_bytes < 230e6
    assert small.peak_rss_bytes < ballast.nbytes
    assert 0 < small.baseline_rss_bytes <= small.peak_rss_bytes
    assert 0 < small.load_ms < 30_000
    with pytest.raises(InputError, match=r"bench_user:fast could not be run in a process of its own.*cannot be run on"):
        probe("bench_user:fast", "function", {"x": np.zeros((1, 3), np.float32)}, threads=1)


def test_made_up_inputs_are_in_range() -> None:
    ports = [
        Port("input_ids", np.dtype(np.int64), ("n", "s")),
        Port("attention_mask", np.dtype(np.int32), ("n", "s")),
        Port("token_type_ids", np.dtype(np.int64), ("n", "s")),
        Port("image", np.dtype(np.float16), (None, 3, None, 48)),
    ]
    found = made_up_feeds(ports, 2, 5, seed=0)
    again = made_up_feeds(ports, 2, 5, seed=0)
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        "input_ids": ((2, 5), np.int64),
        "attention_mask": ((2, 5), np.int32),
        "token_type_ids": ((2, 5), np.int64),
        "image": ((2, 3, 224, 48), np.float16),
    }
    assert (found["input_ids"] == 1).all()
    assert (found["attention_mask"] == 1).all()
    assert (found["token_type_ids"] == 0).all()
    assert np.array_equal(found["image"], again["image"])
    assert found["image"].std() == pytest.approx(1, abs=0.05)
    with pytest.raises(InputError, match="--data"):
        made_up_feeds([Port("x", np.dtype(np.float32), None)], 1, None, 0)


def test_a_language_model_without_data(tmp_path: Path, no_child: None) -> None:
    language_model(tmp_path / "m.onnx", np.ones((11, 6), np.float32), np.ones((6, 11), np.float32))
    report = quantcli.bench(tmp_path / "m.onnx", runs=2, seq_len=7, batch_size=3)
    assert report.details["inputs"] == {"input_ids": [3, 7], "attention_mask": [3, 7]}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["model.onnx", "--require", "speedup > 1"], 2, "Known: latency_ms_p50"),
        (["model.onnx", "--require", "top1 > 1"], 2, "unknown metric 'top1'"),
        (["bench_user:fast"], 3, "Give real ones with --data"),
        (["model.onnx", "--data", "data.npz", "--batch-size", "7"], 3, "holds no 7 samples of equal shape"),
        (["fixed.onnx", "--batch-size", "2"], 2, "fixed.onnx takes 1 at a time"),
        (["model.onnx", "text.onnx", "--data", "data.npz"], 3, "text.onnx needs inputs that the data lacks"),
        (["no.onnx"], 3, "no.onnx does not exist"),
    ],
)
def test_bad_input_is_explained(
    place: Path, no_child: None, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str
) -> None:
    classifier(place / "fixed.onnx", *weights(), batch=1)
    language_model(place / "text.onnx", np.ones((11, 6), np.float32), np.ones((6, 11), np.float32))
    assert main(["bench", *arguments]) == status
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_numbers_that_cannot_be_meant() -> None:
    for wrong in ({"runs": 0}, {"threads": 0}):
        with pytest.raises(UsageError, match="at least one is needed"):
            quantcli.bench("any.onnx", **wrong)


def test_made_up_inputs_of_a_graph_that_takes_no_usual_lengths(tmp_path: Path, no_child: None) -> None:
    """A table of 20 positions serves no sequence of 128; nothing but a run tells of it."""
    nodes = [
        helper.make_node("Gather", ["table", "positions"], ["p"]),
        helper.make_node("Add", ["x", "p"], ["h"]),
        helper.make_node("Slice", ["whole", "zero", "length", "zero"], ["part"]),
        helper.make_node("Add", ["h", "part"], ["y"]),
        helper.make_node("Shape", ["positions"], ["length"], start=1),
    ]
    inputs = [
        helper.make_tensor_value_info("x", FLOAT, ["n", "s", 8]),
        helper.make_tensor_value_info("positions", INT64, ["n", "s"]),
    ]
    constants = {
        "table": weights()[0][:, :1].repeat(8, 1),
        "whole": np.ones((20, 8), np.float32),
        "zero": np.array([0]),
    }
    model = save(tmp_path / "m.onnx", [*nodes[-1:], *nodes[:-1]], inputs,
                 [helper.make_tensor_value_info("y", FLOAT, ["n", "s", 8])], constants)  # fmt: skip
    report = quantcli.bench(model, runs=2)
    assert report.details["inputs"]["x"][1] <= 20
