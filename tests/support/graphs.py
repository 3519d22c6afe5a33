"""Small ONNX graphs for tests: built with onnx.helper, run in onnxruntime as they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from quantcli.models.session import Session
from quantcli.onnx.graph.model import OnnxModel
from quantcli.onnx.graph.prepare import prepare

node = helper.make_node

Shape = Sequence[int | str | None]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal float32 values."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def with_accuracy_level(proto: onnx.ModelProto, level: int) -> onnx.ModelProto:
    """A model, changed in place: what its n-bit products may round inputs to; 0 and 1 leave them as they are."""
    for each in proto.graph.node:
        for attribute in each.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    return proto


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape | None],
    constants: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    dtype: int = TensorProto.FLOAT,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A model; inputs and outputs are of one dtype."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in (constants or {}).items()],
    )
    opsets = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(name, version) for name, version in (domains or {}).items()),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))


def opened(proto: onnx.ModelProto) -> OnnxModel:
    """As `open_onnx` gives it, without a file."""
    return OnnxModel(Path("model.onnx"), ir.from_proto(proto))


def prepared(proto: onnx.ModelProto) -> ir.Model:
    """What `prepare` makes of it."""
    return prepare(opened(proto))


def run(graph: onnx.ModelProto | ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a graph as it is written, without onnxruntime's own optimizations."""
    proto = ir.to_proto(graph) if isinstance(graph, ir.Model) else graph
    return Session(proto.SerializeToString(), threads=1, optimize=False).run(feeds)


def operators(graph: ir.Model) -> dict[str, int]:
    """Number of nodes of each type."""
    return dict(Counter(each.op_type for each in graph.graph.all_nodes()))


def same_function(
    proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], after: ir.Model, tolerance: float = 1e-5
) -> None:
    """Assert that a graph computes what it computed before, under the same names."""
    expected, got = run(proto, feeds), run(after, feeds)
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        assert values.dtype == got[name].dtype and values.shape == got[name].shape
        most = float(np.abs(values.astype(np.float64)).max(initial=1.0))
        np.testing.assert_allclose(got[name], values, rtol=tolerance, atol=tolerance * most)


def codes_of(graph: ir.Model, name: str) -> Any:
    """Values of a constant of a graph."""
    tensor = graph.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
