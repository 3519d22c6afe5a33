"""Graphs that run for the sake of values inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.graphs import model, node, normal, prepared, run

from quantcli.calibration import capture as capturing
from quantcli.calibration.capture import capture_activations
from quantcli.errors import InputError
from quantcli.models.session import Session


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


def test_values_that_are_asked_for_break_what_the_runtime_rewrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnxruntime 1.32 breaks a dilated pool with automatic padding behind a convolution."""

    class Fragile(Session):
        def __init__(self, *given: Any, optimize: bool = True, **options: Any) -> None:
            super().__init__(*given, optimize=optimize, **options)
            self.breaks = optimize

        def run(self, *given: Any) -> dict[str, np.ndarray]:
            if self.breaks:
                raise InputError("onnxruntime could not run the model: another size was expected.")
            return super().run(*given)

    monkeypatch.setattr(capturing, "Session", Fragile)
    proto = model([node("Conv", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])], {"x": ["n", 4, 8, 8]}, {"y": None},
                  {"w": normal(16, 4, 3, 3)})  # fmt: skip
    feeds, capture = {"x": normal(2, 4, 8, 8)}, capture_activations(prepared(proto), tmp_path)
    assert capture.sizes(["h"], feeds) == {"h": 4 * 2 * 16 * 6 * 6}
    session = capture.session(["h"])
    assert session is not None
    assert session.run(feeds)["h"].shape == (2, 16, 6, 6)
