"""Dynamic quantization: what the stored numbers say, in numpy; the kernels, in the runtime's own graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import node, normal
from support.static_graphs import Converted, conv, naive_conv, net


def dynamic(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear and back, by its definition in ONNX, in float64."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255
    if scale == 0:
        return np.zeros_like(x, dtype=np.float64)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x.astype(np.float64) / scale) + zero, 0, 255) - zero) * scale


def converted(
    nodes: list[Any], tmp_path: Path, inputs: dict[str, Any], feeds: Any = None, **constants: Any
) -> Converted:
    return Converted(net(nodes, inputs=inputs, **constants), tmp_path, feeds, "int8-dynamic")


def stored(found: Converted, name: str = "w") -> np.ndarray:
    """A weight as codes and scales, ``[rows, channels]``, or as a convolution has it."""
    held = {key: np.asarray(v.const_value.numpy(), np.float64) for key, v in found.graph.graph.initializers.items()}
    codes, scale = held[f"{name}_quantized"], held[f"{name}_scale"]
    return codes * (scale.reshape(-1, 1, 1, 1) if codes.ndim == 4 else scale)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    """Float32 may round a value between two codes to the other one: rarely, and by one step."""
    most = np.abs(expected).max()
    assert np.abs(got - expected).max() < 0.02 * most
    assert np.median(np.abs(got - expected)) < 1e-5 * most


@pytest.mark.parametrize("dims", [["n", 32], ["n", "m", 32], ["n", 2, "m", 32]])
@pytest.mark.parametrize("bias", [True, False])
def test_matmul(tmp_path: Path, dims: list[Any], bias: bool) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h" if bias else "y"])]
    if bias:
        nodes.append(node("Add", ["h", "b"], ["y"]))
    weight, added = normal(32, 24, seed=1), normal(24, seed=2)
    found = converted(nodes, tmp_path, {"x": dims}, w=weight, b=added)
    assert found.kernels == {"DynamicQuantizeMatMul": 1} and found.pairs == (0, 0)
    close(found.after["y"], dynamic(found.feeds["x"]) @ stored(found) + (added if bias else 0))
    assert found.sqnr_db() > 35


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("bias", [None, (24,), (1, 24), (), (3, 1), (3, 24)])
def test_gemm(tmp_path: Path, trans: int, bias: tuple[int, ...] | None) -> None:
    weight, added = normal(24, 32, seed=1), np.asarray(normal(*(bias or ()), seed=2))
    nodes = [node("Gemm", ["x", "w", *([] if bias is None else ["b"])], ["y"], transB=trans)]
    held = {"w": weight if trans else weight.T.copy(), "b": added}
    found = converted(nodes, tmp_path, {"x": ["n", 32]}, **held)
    assert found.kernels in ({"DynamicQuantizeMatMul": 1}, {"DynamicQuantizeMatMul": 1, "Add": 1})
    close(found.after["y"], dynamic(found.feeds["x"]) @ stored(found) + (added if bias is not None else 0))


@pytest.mark.parametrize(("shape", "group"), [((16, 8, 3, 3), 1), ((16, 4, 3, 3), 2), ((32, 1, 3, 3), 32)])
def test_a_convolution_keeps_its_float_kernel_and_gets_int8_weights(
    tmp_path: Path, shape: tuple[int, ...], group: int
) -> None:
    feeds = {"x": normal(2, shape[1] * group, 10, 10)}
    nodes = [conv("x", "w", "y", group=group)]
    found = converted(nodes, tmp_path, {"x": ["n", *feeds["x"].shape[1:]]}, feeds, w=normal(*shape, seed=1))
    assert found.kernels["Conv"] == 1 and "ConvInteger" not in found.kernels
    close(found.after["y"], naive_conv(feeds["x"].astype(np.float64), stored(found), group))


def test_an_input_that_several_layers_share_is_quantized_once(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", name], [f"y{name}"]) for name in ("q", "k", "v")]
    weights = {name: normal(32, 24, seed=seed) for seed, name in enumerate(("q", "k", "v"))}
    proto = net(nodes, ("yq", "yk", "yv"), {"x": ["n", "m", 32]}, **weights)
    found = Converted(proto, tmp_path, None, "int8-dynamic")
    assert sum(each.op_type == "DynamicQuantizeLinear" for each in found.graph.graph) == 1
    assert found.kernels == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}
    for name in weights:
        close(found.after[f"y{name}"], dynamic(found.feeds["x"]) @ stored(found, name))


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
def test_layers_that_share_a_weight_share_its_codes(tmp_path: Path, op: str) -> None:
    shape, dims = ((8, 8, 3, 3), ["n", 8, 10, 10]) if op == "Conv" else ((24, 24), ["n", 24])
    attributes: dict[str, Any] = {"MatMul": {}, "Gemm": {"transB": 1}, "Conv": {"pads": [1, 1, 1, 1]}}[op]
    nodes = [node(op, ["x", "w"], ["h"], **attributes), node(op, ["h", "w"], ["y"], **attributes)]
    found = converted(nodes, tmp_path, {"x": dims}, w=normal(*shape))
    large = [value for value in found.graph.graph.initializers.values() if value.const_value.size == np.prod(shape)]
    assert [value.dtype for value in large] == [ir.DataType.INT8]
    assert found.sqnr_db() > 30


def test_outputs_keep_their_names_also_when_they_are_read(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["z", "v"], ["y"])]
    proto = net(nodes, ("z", "y"), {"x": ["n", 32]}, w=normal(32, 24), v=normal(24, 16))
    found = Converted(proto, tmp_path, None, "int8-dynamic")
    assert found.kernels == {"DynamicQuantizeMatMul": 2}
    assert found.sqnr_db("z") > 35 and found.sqnr_db("y") > 30


def test_ranges_are_those_of_each_run(tmp_path: Path) -> None:
    from quantcli.models.session import Session

    found = converted([node("MatMul", ["x", "w"], ["y"])], tmp_path, {"x": ["n", 32]}, w=normal(32, 24))
    for factor in (1e-4, 1.0, 1e4):
        x = normal(5, 32) * np.float32(factor)
        close(Session(found.path).run({"x": x})["y"], dynamic(x) @ stored(found))
    zero = np.zeros((2, 32), dtype=np.float32)
    assert not Session(found.path).run({"x": zero})["y"].any()


def test_names_that_ours_would_collide_with(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["y"]), node("Mul", ["x", "y_scale"], ["x_dynamic_quantized"]),
        node("Tanh", ["x_dynamic_quantized"], ["y_integer"]), node("Tanh", ["y_integer"], ["z"]),
    ]  # fmt: skip
    proto = net(nodes, ("y", "z"), {"x": ["n", 32]}, w=normal(32, 24), y_scale=normal(32), w_quantized=normal(1))
    found = Converted(proto, tmp_path, None, "int8-dynamic")
    assert found.proof.integer == {"DynamicQuantizeMatMul": 1} and found.sqnr_db() > 35
    np.testing.assert_allclose(found.after["z"], found.before["z"], atol=1e-6)
