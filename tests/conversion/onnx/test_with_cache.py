"""The scheme of an exported decoder's head: that of decoders which are built."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantcli.conversion.onnx.with_cache import with_head_scheme
from quantcli.planning.recipe import Recipe


def decoder(*, tied: bool = False, output: str = "logits") -> ir.Model:
    """Words, a product, and a head whose logits are scaled."""
    table = np.zeros((32, 16), np.float32)
    inits = {"words.weight": table, "up.weight": np.zeros((16, 16), np.float32), "two": np.float32(2)}
    head = "turned" if tied else "lm_head.weight"
    nodes = [
        helper.make_node("Gather", ["words.weight", "ids"], ["looked_up"], "words/Gather"),
        helper.make_node("MatMul", ["looked_up", "up.weight"], ["up"], "up/MatMul"),
        helper.make_node("MatMul", ["up", head], ["said"], "lm_head/MatMul"),
        helper.make_node("Mul", ["two", "said"], [output], "scaled"),
    ]
    if tied:
        nodes.insert(0, helper.make_node("Transpose", ["words.weight"], ["turned"], "turn"))
    else:
        inits["lm_head.weight"] = table.T.copy()
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "length"])
    logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, "length", 32])
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in inits.items()]
    return ir.from_proto(helper.make_model(helper.make_graph(nodes, "g", [ids], [logits], constants)))


@pytest.mark.parametrize(("tied", "weight"), [(False, "lm_head.weight"), (True, "words.weight")])
def test_the_head_gets_eight_bits(tied: bool, weight: str) -> None:
    (rule,) = with_head_scheme(Recipe(scheme="int4"), decoder(tied=tied)).rules
    assert (rule.match, rule.scheme) == ([weight, "lm_head/MatMul"], "int8")


@pytest.mark.parametrize(
    "wishes",
    [
        {"scheme": "int4", "rules": [{"match": "lm_head", "scheme": "int4"}]},
        {"scheme": "int4", "skip": ["lm_head*"]},
        {"scheme": "fp16"},
        {"scheme": "int8-dynamic"},
        {},
    ],
)
def test_a_wish_for_the_head_is_kept(wishes: dict[str, Any]) -> None:
    asked = Recipe(**wishes)
    assert with_head_scheme(asked, decoder()) == asked


def test_a_graph_without_logits_has_no_head() -> None:
    assert with_head_scheme(Recipe(scheme="int4"), decoder(output="last_hidden_state")).rules == []
