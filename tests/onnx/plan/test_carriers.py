"""Which inputs of an operator are weights, and over which of their dimensions products are summed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from quantcli.onnx.plan.carriers import carried

MICROSOFT = "com.microsoft"


def weights(operator: str, shapes: list[tuple[int, ...] | None], domain: str, **attributes: Any) -> list[Any]:
    """What is found in a node whose inputs are constants of these shapes, or values that are computed."""
    inputs = []
    for number, shape in enumerate(shapes):
        value = ir.Value(name=f"v{number}")
        if shape is not None:
            value.const_value = ir.tensor(np.ones(shape, np.float32))
            value.shape = ir.Shape(shape)
        inputs.append(value)
    node = ir.node(operator, inputs, attributes, domain=domain)
    ir.Graph(
        [value for value, shape in zip(inputs, shapes, strict=True) if shape is None],
        node.outputs,
        nodes=[node],
        initializers=[value for value, shape in zip(inputs, shapes, strict=True) if shape is not None],
    )
    return [(found.index, found.role, found.summed) for found in carried(node)]


@pytest.mark.parametrize(
    ("operator", "shapes", "domain", "attributes", "expected"),
    [
        ("Gemm", [None, (4, 6)], "", {}, [(1, "linear", (0,))]),
        ("Gemm", [None, (6, 4)], "", {"transB": 1}, [(1, "linear", (1,))]),
        ("MatMul", [(6, 4), None], "", {}, [(0, "linear", (1,))]),
        ("FusedMatMul", [None, (2, 6, 4)], MICROSOFT, {"transB": 1}, [(1, "linear", (2,))]),
        ("FusedMatMul", [(2, 4, 6), None], MICROSOFT, {"transA": 1}, [(0, "linear", (1,))]),
        ("FusedMatMul", [None, (2, 4, 6)], MICROSOFT, {"transA": 1}, [(1, "linear", (1,))]),
        ("Conv", [None, (8, 4, 3, 3)], "", {}, [(1, "conv", (1, 2, 3))]),
        ("ConvTranspose", [None, (4, 8, 3, 3)], "", {}, [(1, "conv", (0, 2, 3))]),
        ("LSTM", [None, (1, 8, 4), (1, 8, 2)], "", {}, [(1, "recurrent", (2,)), (2, "recurrent", (2,))]),
        ("Attention", [None, (4, 12), (12,)], MICROSOFT, {}, [(1, "linear", (0,))]),
        ("Einsum", [None, (4, 6)], "", {"equation": "bi,io->bo"}, [(1, "linear", (0,))]),
        ("Einsum", [(6, 4), None], "", {"equation": "oi,bi->bo"}, [(0, "linear", (1,))]),
        (
            "EmbedLayerNormalization", [None, None, (9, 4), (5, 4), (2, 4), (4,), (4,)], MICROSOFT, {},
            [(index, "embedding", (1,)) for index in (2, 3, 4)],
        ),
        (
            "MoE", [None, None, (2, 8, 4), (2, 8), (2, 4, 8), (2, 4), (2, 8, 4)], MICROSOFT, {},
            [(index, "expert", (2,)) for index in (2, 4, 6)],
        ),
        ("Relu", [(4, 6)], "", {}, []),
        ("MatMul", [None, (4,)], "", {}, []),
        ("MatMul", [None, (4, 6)], "someone", {}, []),
    ],
)  # fmt: skip
def test_weights_of_a_node(
    operator: str, shapes: list[Any], domain: str, attributes: dict[str, Any], expected: list[Any]
) -> None:
    assert weights(operator, shapes, domain, **attributes) == expected
