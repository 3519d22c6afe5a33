"""Layers of an ONNX candidate against the reference's values of the same name, checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from support.tiny_onnx import FLOAT, save

from quantcli.evaluation import layers_onnx
from quantcli.evaluation.layers_onnx import compare_graphs
from quantcli.onnx.graph.model import OnnxModel, open_onnx

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.standard_normal((2, 8, 8)).astype(np.float32)
FEEDS = [{"x": RNG.standard_normal((1, 8), np.float32)} for _ in range(3)]


def chain(path: Path, first: np.ndarray, second: np.ndarray, names: tuple[str, str], suffix: str = "") -> OnnxModel:
    """Two products; with a suffix the output of the first is rounded to halves under that name."""
    nodes = [helper.make_node("MatMul", ["x", names[0]], ["a"], name="one")]
    if suffix:
        halves = [("Mul", ["a", "two"], "d"), ("Round", ["d"], "r"), ("Div", ["r", "two"], f"a{suffix}")]
        nodes += [helper.make_node(kind, inputs, [output]) for kind, inputs, output in halves]
    nodes += [helper.make_node("MatMul", [f"a{suffix}", names[1]], ["y"], name="two_")]
    constants = {names[0]: first, names[1]: second} | ({"two": np.array(2, np.float32)} if suffix else {})
    ends = [helper.make_tensor_value_info(name, FLOAT, ["n", 8]) for name in "xy"]
    return open_onnx(save(path, nodes, ends[:1], ends[1:], constants))


def sqnr(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    signal = sum(float((one.astype(np.float64) ** 2).sum()) for one in ours)
    noise = sum(float(((one.astype(np.float64) - two) ** 2).sum()) for one, two in zip(ours, theirs, strict=True))
    return 10 * np.log10(signal / noise)


def test_every_changed_layer_by_the_output_that_later_ones_see(tmp_path: Path) -> None:
    reference = chain(tmp_path / "r.onnx", FIRST, SECOND, ("w1", "w2"))
    coarse = np.round(SECOND * 4) / 4
    candidate = chain(tmp_path / "c.onnx", FIRST, coarse, ("w1", "w2_quantized"), "_dequantized")
    rows = compare_graphs(reference, candidate, FEEDS, "C")
    before = [feeds["x"] @ FIRST for feeds in FEEDS]
    halves = [np.round(value * 2) / 2 for value in before]
    expected = {
        "w2": sqnr([value @ SECOND for value in before], [value @ coarse for value in halves]),
        "a": sqnr(before, halves),
    }
    found = {row.name: row.sqnr_db for row in rows}
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(value, abs=1e-3) for name, value in expected.items())
    assert [row.name for row in rows] == sorted(found, key=found.__getitem__)
    sizes = {row.name: (row.scheme, row.bytes_before, row.bytes_after, row.model) for row in rows}
    assert sizes == {"w2": ("quantized", 256, 256, "C"), "a": ("activation", 0, 0, "C")}


def test_values_in_chunks_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = chain(tmp_path / "r.onnx", FIRST, SECOND, ("w1", "w2"))
    candidate = chain(tmp_path / "c.onnx", FIRST * 1.01, SECOND * 0.99, ("v1", "v2"), "_dequantized")
    together = compare_graphs(reference, candidate, FEEDS, "C")
    monkeypatch.setattr(layers_onnx, "_CHUNK", 1)
    assert compare_graphs(reference, candidate, FEEDS, "C") == together
    assert {row.name for row in together} == {"w1", "w2"}


def test_a_model_beside_itself_has_no_row(tmp_path: Path) -> None:
    reference = chain(tmp_path / "r.onnx", FIRST, SECOND, ("w1", "w2"))
    assert compare_graphs(reference, reference, FEEDS, "C") == []
