"""Small ONNX graphs of products and lookups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from quantcli.models.session import Session


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def free(name: str, shape: Sequence[int | str] | None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))


def constant(name: str, values: np.ndarray) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    return ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def model_of(
    inputs: list[ir.Value], nodes: list[ir.Node], constants: list[ir.Value], outputs: list[ir.Value]
) -> ir.Model:
    for number, node in enumerate(nodes):
        node.name = node.name or f"node{number}"
    for output in outputs:
        output.type = output.type or ir.TensorType(inputs[0].dtype or ir.DataType.FLOAT)
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 17}, name="graph")
    return ir.Model(graph, ir_version=8)


def one_node(op_type: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None) -> ir.Model:
    node = ir.node(op_type, inputs, attributes or {}, name="layer")
    node.outputs[0].name = "y"
    fed = [value for value in inputs if value.const_value is None]
    return model_of(fed, [node], [value for value in inputs if value.const_value is not None], [node.outputs[0]])


def matmul(weight: np.ndarray) -> ir.Model:
    dtype = ir.DataType.FLOAT16 if weight.dtype == np.float16 else ir.DataType.FLOAT
    return one_node("MatMul", [free("x", ["rows", weight.shape[0]], dtype), constant("w", weight)])


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    return list(Session(ir.to_proto(model).SerializeToString(), threads=1).run(feeds).values())


def tied(*, shared_by_add: bool = False, head: str = "Transpose") -> ir.Model:
    """An embedding whose table is the head's matrix too."""
    table, ids = constant("table", normal(40, 64)), free("ids", ["n"], ir.DataType.INT64)
    look_up = ir.node("Gather", [table, ids], name="embed")
    nodes = [look_up]
    if head == "Transpose":
        nodes.append(ir.node("Transpose", [table], {"perm": [1, 0]}, name="turn"))
        nodes.append(ir.node("MatMul", [look_up.outputs[0], nodes[-1].outputs[0]], name="head"))
    else:
        nodes.append(ir.node("Gemm", [look_up.outputs[0], table], {"transB": 1}, name="head"))
    nodes[-1].outputs[0].name = "y"
    outputs = [nodes[-1].outputs[0]]
    if shared_by_add:
        nodes.append(ir.node("Neg", [table], name="other"))
        nodes[-1].outputs[0].name = "z"
        outputs.append(nodes[-1].outputs[0])
    for output in outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    return model_of([ids], nodes, [table], outputs)
