"""Rules over the layers of a graph: obeyed, told where only some can be, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.graphs import model, node, normal, prepared

from quantcli.errors import UsageError
from quantcli.onnx.plan.plan import GraphPlan
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.planning.recipe import validate


def planned(**rule: Any) -> GraphPlan:
    nodes = [node("MatMul", ["x", "body"], ["h"], name="up"), node("MatMul", ["h", "head"], ["y"], name="score")]
    proto = model(nodes, {"x": ["n", 64]}, {"y": None}, {"body": normal(64, 64), "head": normal(64, 3)})
    recipe = validate({"scheme": "int8-dynamic", "rules": [rule] if rule else []}, "test")
    return resolve_graph(recipe, prepared(proto), Path("model.onnx"))


@pytest.mark.parametrize("match", ["head", "score", "h*"])
def test_a_rule_for_a_layer_that_stays_is_refused(match: str) -> None:
    assert {plan.name: plan.mode for plan in planned().nodes} == {"body": "dynamic", "head": "float"}
    with pytest.raises(UsageError, match=r"(head|score).* has to stay as it is: too small to save anything"):
        planned(match=match, scheme="int8")


def test_a_rule_that_is_obeyed_in_part_is_told() -> None:
    found = planned(match="*", scheme="int8")
    assert {plan.name: plan.mode for plan in found.nodes} == {"body": "weights", "head": "float"}
    assert found.warnings[0].startswith("The rule for '*' means head as well, which stays as it is: too small")
    assert not any("rule" in warning for warning in planned(match="up", scheme="int8").warnings)
