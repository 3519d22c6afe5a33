"""Convolutions with int8 weights and no more: floats again before the first run, in the kernels of floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from support.graphs import model, node, normal, run
from support.static_graphs import Converted

import quantcli
from quantcli.errors import InputError
from quantcli.models.kernels import prove
from quantcli.models.session import Session

#: Operators and their weights: plain, in groups, depthwise, one and three dimensions, and the other way.
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "plain": ("Conv", (16, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
    "groups": ("Conv", (32, 8, 3, 3), {"group": 2}),
    "depthwise": ("Conv", (32, 1, 3, 3), {"group": 32}),
    "one": ("Conv", (16, 16, 5), {}),
    "three": ("Conv", (16, 16, 2, 2, 2), {}),
    "turned": ("ConvTranspose", (16, 24, 2, 2), {"strides": [2, 2]}),
    "turned in groups": ("ConvTranspose", (16, 24, 2, 2), {"strides": [2, 2], "group": 2}),
}


def graph_of(case: str, opset: int = 17) -> onnx.ModelProto:
    operator, shape, attributes = CASES[case]
    channels = shape[0] if operator == "ConvTranspose" else shape[1] * attributes.get("group", 1)
    nodes = [node(operator, ["x", "w", "b"], ["y"], **attributes)]
    biases = shape[1] * attributes.get("group", 1) if operator == "ConvTranspose" else shape[0]
    held = {"w": normal(*shape, seed=1), "b": normal(biases, seed=2)}
    return model(nodes, {"x": [2, channels, *[12] * (len(shape) - 2)]}, {"y": None}, held, opset=opset)


def with_dequantize(proto: onnx.ModelProto, case: str) -> onnx.ModelProto:
    """The same artifact with a DequantizeLinear in place of the Cast and the Mul."""
    held = {each.name: each for each in proto.graph.initializer}
    (mul,) = [each for each in proto.graph.node if each.op_type == "Mul"]
    (cast,) = [each for each in proto.graph.node if each.output[0] == mul.input[0]]
    scale = held[mul.input[1]]
    values = onnx.numpy_helper.to_array(scale).reshape(-1)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    axis = int(CASES[case][0] == "ConvTranspose")
    index = list(proto.graph.node).index(cast)
    proto.graph.node.remove(cast)
    proto.graph.node.remove(mul)
    both = helper.make_node("DequantizeLinear", [cast.input[0], scale.name], [mul.output[0]], axis=axis)
    proto.graph.node.insert(index, both)
    return proto


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
@pytest.mark.parametrize("case", CASES)
def test_the_runtime_finds_float_weights(tmp_path: Path, case: str, scheme: str) -> None:
    found = Converted(graph_of(case), tmp_path, scheme=scheme)
    assert [layer.form for layer in found.plan.nodes] == ["expanded"]
    plain = tmp_path / "plain.onnx"
    onnx.save(graph_of(case), plain)
    # Nothing is computed of constants in a run, and the layout is that of the float graph.
    assert found.proof.kernels == prove(plain).kernels
    assert {value.dtype.name for value in found.graph.graph.initializers.values()} == {"INT8", "FLOAT"}
    old = run(with_dequantize(onnx.load(found.path), case), found.feeds)["y"]
    np.testing.assert_allclose(found.after["y"], old, rtol=1e-5, atol=1e-5 * float(np.abs(old).max()))
    assert found.sqnr_db() > 38


def test_an_old_operator_set_will_do(tmp_path: Path) -> None:
    found = Converted(graph_of("plain", 9), tmp_path, scheme="int8")
    assert found.graph.opset_imports[""] < 13 and found.sqnr_db() > 38


def test_what_is_stored_is_read_as_quantized_and_compared_layer_by_layer(tmp_path: Path) -> None:
    source, small, again = (tmp_path / f"{name}.onnx" for name in ("source", "small", "again"))
    nodes = [node("Conv", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("Conv", ["r", "v"], ["y"])]
    held = {"w": normal(32, 16, 3, 3, seed=1), "v": normal(32, 32, 3, 3, seed=2)}
    onnx.save(model(nodes, {"x": ["n", 16, 9, 9]}, {"y": None}, held), source)
    np.savez(tmp_path / "data.npz", x=normal(4, 16, 9, 9, seed=3))
    quantcli.convert(source, small, scheme="int8", skip=["v"])
    layers = quantcli.evaluate(source, [small], data=tmp_path / "data.npz", by_layer=True).layers
    (row,) = [row for row in layers if row.name == "w"]
    assert row.sqnr_db is not None and row.sqnr_db > 38
    assert row.bytes_before == held["w"].nbytes and row.bytes_after == held["w"].size + 4 * 32
    # The rest is quantized later, and what was so stays as it is.
    report = quantcli.convert(small, again, scheme="int8")
    assert any("quantized in part already" in warning for warning in report.warnings)
    values = {each.name: each for each in onnx.load(again).graph.initializer}
    first = {each.name: each for each in onnx.load(small).graph.initializer}
    assert values["w_quantized"].raw_data == first["w_quantized"].raw_data and "v_quantized" in values
    with pytest.raises(InputError, match="already quantized"):
        quantcli.convert(again, tmp_path / "third.onnx", scheme="int8")
    assert Session(again).run({"x": normal(4, 16, 9, 9, seed=3)})["y"].shape == (4, 32, 5, 5)


def test_half_precision_weights_stay_half_for_their_readers(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"])]
    proto = model(nodes, {"x": ["n", 16, 9, 9]}, {"y": None}, {"w": normal(32, 16, 3, 3, seed=1).astype(np.float16)})
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(proto, tmp_path / "half.onnx")
    quantcli.convert(tmp_path / "half.onnx", tmp_path / "small.onnx", scheme="int8")
    feeds = {"x": normal(2, 16, 9, 9, seed=3).astype(np.float16)}
    before, after = (Session(tmp_path / f"{name}.onnx").run(feeds)["y"].astype(float) for name in ("half", "small"))
    assert np.linalg.norm(after - before) < 0.01 * np.linalg.norm(before)
