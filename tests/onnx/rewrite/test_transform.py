"""Rewriting a graph holds what it makes of one weight after the other in a file, not in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.graphs import model, node, normal, prepared

from quantcli.onnx.graph.external import LARGE_BYTES
from quantcli.onnx.graph.mapped import MappedTensor
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.onnx.rewrite import transform as module
from quantcli.onnx.rewrite.transform import transform
from quantcli.planning.recipe import Recipe


@pytest.mark.parametrize("every", [1, 1 << 30])
def test_codes_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """However seldom is looked for what was made: in the end none of it is in memory."""
    monkeypatch.setattr(module, "_MOVED_EVERY", every)
    side = 1200
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "v"], ["y"])]
    weights = {"w": normal(side, side), "v": normal(side, side, seed=1)}
    plain, moved = (prepared(model(nodes, {"x": ["n", side]}, {"y": None}, weights)) for _ in range(2))
    for graph, scratch in ((plain, None), (moved, tmp_path / "codes")):
        transform(graph, resolve_graph(Recipe(scheme="int8"), graph, Path("m")), Evidence(), scratch)
    codes = [name for name, value in moved.graph.initializers.items() if value.const_value.nbytes >= LARGE_BYTES]
    assert len(codes) == 2
    for name in codes:
        held = moved.graph.initializers[name].const_value
        assert isinstance(held, MappedTensor) and held.path == str((tmp_path / "codes").resolve())
        np.testing.assert_array_equal(held.numpy(), plain.graph.initializers[name].const_value.numpy())
