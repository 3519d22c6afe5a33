"""Outputs that are NaN or infinite: compared where both are finite, counted, and a reason for a gate to fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import quantcli
from quantcli.cli.app import main
from quantcli.evaluation.metrics import Fidelity, Perplexity


def scaled(path: Path, factor: float, *, masked: bool = False) -> Path:
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.standard_normal((64, 96)).astype(np.float32),
        "k": np.float32(factor),
        "m": np.arange(96) % 5 == 0,
        "low": np.float32(-np.inf),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Mul", ["a", "k"], ["b" if masked else "y"]),
    ]
    if masked:
        nodes.append(helper.make_node("Where", ["m", "low", "b"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 96])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32))
    return tmp_path / "d.npz"


@pytest.mark.parametrize("factor", [np.nan, 3e38])
@pytest.mark.parametrize("gate", ["sqnr_db >= 20", "cosine > 0.9", "not_finite <= 0"])
def test_a_gate_fails(tmp_path: Path, data: Path, factor: float, gate: str, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(scaled(tmp_path / "m.onnx", 1)), str(scaled(tmp_path / "broken.onnx", factor))]
    assert main(["eval", *models, "--data", str(data), "--require", gate, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["models"][1]["metrics"]
    assert found["not_finite"] > 0
    assert found["sqnr_db"] is None


def test_masked_scores_are_compared_where_both_are_finite(tmp_path: Path, data: Path) -> None:
    model = scaled(tmp_path / "m.onnx", 1, masked=True)
    quantcli.convert(model, tmp_path / "o.onnx", scheme="int8")
    found = quantcli.evaluate(model, [tmp_path / "o.onnx"], data=data).models[1].metrics
    assert found["not_finite"] == 0
    assert found["sqnr_db"] is not None and 30 < found["sqnr_db"] < 60


def test_fidelity_counts_what_the_reference_lacks() -> None:
    fidelity = Fidelity()
    inf, nan = float("inf"), float("nan")
    fidelity.add(torch.tensor([1.0, -inf, nan, 3.0]), torch.tensor([1.5, -inf, nan, 3.0]))
    assert fidelity.not_finite == 0
    assert fidelity.sqnr_db == pytest.approx(10 * np.log10(10 / 0.25))
    fidelity.add(torch.tensor([1.0, -inf, nan, inf]), torch.tensor([nan, inf, 0.0, inf]))
    assert fidelity.not_finite == 2
    assert fidelity.metrics() == {"sqnr_db": None, "cosine": None, "cosine_se": None, "not_finite": 2.0}


def test_a_perplexity_beyond_floats() -> None:
    perplexity = Perplexity()
    perplexity.add(torch.tensor([[0.0, 2000.0], [0.0, 2000.0]]), torch.tensor([0, 0]))
    assert perplexity.metrics()["perplexity"] == float("inf")
