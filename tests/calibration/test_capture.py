"""Graphs that run for the sake of values inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.graphs import model, node, normal, prepared, run

from quantcli.calibration.capture import capture_activations


def test_attention_that_goes_on_from_a_state_runs_where_nobody_reads_the_next_one(tmp_path: Path) -> None:
    """With a past, onnxruntime insists on returning the present."""
    names, states = ["a", "a", "a", "", "past", "past"], ["b", "key", "value"]
    attention = node("Attention", names, states, q_num_heads=4, kv_num_heads=4)
    nodes = [node("MatMul", ["x", "w"], "a"), attention, node("MatMul", ["b", "k"], "y")]
    held = {"w": normal(64, 64, scale=0.1), "k": normal(64, 64, scale=0.1), "past": normal(2, 4, 3, 16)}
    proto = model(nodes, {"x": [2, 5, 64]}, {"y": None}, held, opset=23, ir_version=11)
    feeds = {"x": normal(2, 5, 64)}
    graph = prepared(proto)
    np.testing.assert_allclose(run(graph, feeds)["y"], run(proto, feeds)["y"], rtol=1e-5)
    session = capture_activations(graph, tmp_path).session(["b"])
    assert session is not None
    assert session.run(feeds)["b"].shape == (2, 5, 64)
