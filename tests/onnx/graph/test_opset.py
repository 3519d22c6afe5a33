"""IR versions beside the operator sets that need them."""

from __future__ import annotations

import pytest
from onnx import defs, helper

from quantcli.onnx.graph.model import OLDEST_OPSET
from quantcli.onnx.graph.opset import needed_ir_version


@pytest.mark.parametrize("opset", range(OLDEST_OPSET, defs.onnx_opset_version() + 1))
def test_no_graph_asks_for_more_than_the_release_of_its_operator_set(opset: int) -> None:
    # Version 3 wants every initializer to be an input as well.
    released = max(4, helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))
    assert released - 1 <= needed_ir_version(opset) <= released
    assert needed_ir_version(opset) <= needed_ir_version(opset + 1)
