"""A model measured in a process of its own: what it allocates counts, and what this process holds does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.graphs import model, node
from support.tiny_onnx import classifier, weights

from quantcli.benchmarking.probe import load_and_run, probe
from quantcli.errors import InputError
from quantcli.system.hardware import peak_rss_bytes

CODE = """
import time
import torch

class Slow(torch.nn.Module):
    def forward(self, x):
        held = torch.ones(50_000_000)
        return x + held[:8]

def slow():
    time.sleep(0.2)
    return Slow()
"""
FEEDS = {"x": np.zeros((1, 8), np.float32)}


def test_loading_and_peak_are_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe_user.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    found = probe("probe_user:slow", "function", FEEDS, threads=1)
    assert 200 <= found.load_ms < 2000
    assert 200e6 <= found.peak_rss_bytes - found.baseline_rss_bytes < 400e6


def test_what_this_process_holds_is_not_counted(tmp_path: Path) -> None:
    small = classifier(tmp_path / "model.onnx", *weights())
    held = np.ones(100_000_000)
    found = probe(str(small), "onnx", FEEDS, threads=1)
    assert found.peak_rss_bytes < held.nbytes < peak_rss_bytes()
    assert found.load_ms > 0 and found.baseline_rss_bytes <= found.peak_rss_bytes


def test_strings_are_fed(tmp_path: Path) -> None:
    nodes = [
        node("LabelEncoder", ["t"], ["k"], domain="ai.onnx.ml", keys_strings=["a", "b"], values_int64s=[1, 2]),
        node("Gather", ["e", "k"], ["y"]),
    ]
    proto = model(nodes, {}, {"y": None}, {"e": np.zeros((3, 8), np.float32)}, domains={"ai.onnx.ml": 3})
    proto.graph.input.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.STRING, ["n"]))
    onnx.save(proto, tmp_path / "m.onnx")
    found = probe(str(tmp_path / "m.onnx"), "onnx", {"t": np.array(["a", "b"], dtype=object)}, threads=1)
    assert found.load_ms > 0


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in a process of its own \(status 1\): .*does not exist"):
        probe(str(tmp_path / "missing.onnx"), "onnx", FEEDS, threads=1)


def test_weights_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe_user.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "feeds.npz", **FEEDS)
    request = {"model": "probe_user:slow", "kind": "function", "threads": 1, "weights": "none.pt"}
    request |= {"feeds": "feeds.npz", "custom_ops": [], "generates": False}
    with pytest.raises(InputError, match=r"none\.pt"):
        load_and_run(request)
