"""What the runtime makes of our graphs: each pattern is converted, loaded, and its optimized graph read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import model, node, normal, prepared
from support.static_graphs import IMAGE, Converted, W, conv, naive_conv, net

from quantcli.models.kernels import prove
from quantcli.onnx.graph.save import save_graph
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.planning.recipe import validate


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((8, 8, 3, 3), {}), ((40, 8, 1, 1), {"pads": [0, 0, 0, 0]}), ((8, 4, 3, 3), {"group": 2}),
        ((40, 1, 3, 3), {"group": 8}), ((32, 1, 3, 3), {"group": 32}), ((8, 8, 5, 5), {"pads": [2, 2, 2, 2]}),
        ((8, 8, 3, 3), {"strides": [2, 2]}), ((8, 8, 3, 3), {"dilations": [2, 2]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "Relu", "Clip"])
def test_convolutions(
    tmp_path: Path, shape: tuple[int, ...], attributes: dict[str, Any], bias: bool, activation: str | None
) -> None:
    inputs = {"x": ["n", shape[1] * attributes.get("group", 1), 10, 10]}
    nodes = [conv("x", "w", "h" if activation else "y", *(["b"] if bias else []), **attributes)]
    if activation:
        nodes.append(node(activation, ["h", "zero", "six"] if activation == "Clip" else ["h"], ["y"]))
    held = {"w": normal(*shape, seed=1, scale=0.3), "b": normal(shape[0], seed=2)}
    held |= {"zero": np.float32(0), "six": np.float32(6)}
    found = Converted(net(nodes, inputs=inputs, **held), tmp_path)
    assert found.kernels == {"QLinearConv": 1} and found.pairs == (1, 1)
    assert found.sqnr_db() > 30


@pytest.mark.parametrize(
    "bounds",
    [
        (0.0, 6.0),
        (0.0, 1.0),
        (0.0, 0.7),
        (0.0, 3.3),
        (0.0, None),
        (-1.0, 1.0),
        (-0.3, 0.7),
        (-1.5, 6.0),
        (None, 1.0),
        (0.5, 6.0),
    ],
)
def test_a_clip_never_costs_the_convolution_before_it_its_kernel(
    tmp_path: Path, bounds: tuple[float | None, float | None]
) -> None:
    names = ["" if bound is None else name for bound, name in zip(bounds, ("low", "high"), strict=True)]
    held = {name: np.float32(bound) for name, bound in zip(names, bounds, strict=True) if name}
    nodes = [conv("x", "w", "h", "b"), node("Clip", ["h", *names], ["c"]), conv("c", "w2", "y")]
    found = Converted(net(nodes, **held), tmp_path)
    assert found.kernels["QLinearConv"] == 2 and found.kernels.keys() <= {"QLinearConv", "Clip"}
    if bounds[0] == 0:
        assert found.kernels == {"QLinearConv": 2} and found.pairs == (1, 1)
    assert found.sqnr_db() > 25


@pytest.mark.parametrize("bound", [*np.random.default_rng(0).uniform(0.1, 30, 12).round(3), 20.0, 3.0, 5.5])
def test_upper_bounds_vanish_or_are_kept_whatever_they_round_to(tmp_path: Path, bound: float) -> None:
    """255 * (bound / 255) may lie above the bound, and then the runtime would keep both the cut and a float layer."""
    nodes = [conv("x", "w", "h", "b"), node("Clip", ["h", "low", "high"], ["y"])]
    found = Converted(net(nodes, w=W * 20, low=np.float32(0), high=np.float32(bound)), tmp_path)
    assert found.kernels["QLinearConv"] == 1


def test_a_convolution_over_one_dimension(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1]), node("Relu", ["h"], ["y"])]
    found = Converted(net(nodes, inputs={"x": ["n", 32, 20]}, w=normal(16, 32, 3), b=normal(16)), tmp_path)
    assert found.kernels == {"QLinearConv": 1} and found.pairs == (1, 1)
    assert found.sqnr_db() > 30


def test_a_convolution_over_three_dimensions(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w", "b"], ["h"], pads=[1] * 6), node("Relu", ["h"], ["y"])]
    found = Converted(net(nodes, inputs={"x": ["n", 8, 6, 6, 6]}, w=normal(16, 8, 3, 3, 3), b=normal(16)), tmp_path)
    assert found.kernels == {"QLinearConv": 1} and found.pairs == (1, 1)
    assert found.sqnr_db() > 30


def test_a_chain_stays_in_codes(tmp_path: Path) -> None:
    nodes = [
        conv("x", "w", "a", "b"), node("Relu", ["a"], ["ar"]), conv("ar", "w2", "c"), node("Relu", ["c"], ["cr"]),
        conv("cr", "w3", "y"),
    ]  # fmt: skip
    found = Converted(net(nodes), tmp_path)
    assert found.kernels == {"QLinearConv": 3} and found.pairs == (1, 1)


def gemm(bias: bool, trans: int, *, output: str = "y", shape: tuple[int, int] = (32, 24)) -> onnx.ModelProto:
    weight = normal(*shape, seed=1)
    held = {"w": weight.T.copy() if trans else weight, "b": normal(shape[1], seed=2) * 5}
    nodes = [node("Gemm", ["x", "w", *(["b"] if bias else [])], [output], transB=trans)]
    if output != "y":
        nodes += [node("Relu", [output], ["r"]), node("Gemm", ["r", "v"], ["y"])]
        held["v"] = normal(shape[1], 16, seed=3)
    return net(nodes, inputs={"x": ["n", shape[0]]}, **held)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_gemm(tmp_path: Path, bias: bool, trans: int) -> None:
    found = Converted(gemm(bias, trans), tmp_path)
    assert found.kernels == {"QGemm": 1} and found.pairs == (1, 0)
    assert found.sqnr_db() > 35


@pytest.mark.parametrize("bias", [True, False])
def test_gemms_in_a_row_pass_codes_on(tmp_path: Path, bias: bool) -> None:
    found = Converted(gemm(bias, 1, output="h"), tmp_path)
    assert found.kernels == {"QGemm": 2} and found.pairs == (1, 0)
    assert found.sqnr_db() > 30


@pytest.mark.parametrize("shape", [(), (1,), (1, 24), (3, 24), (3, 1)])
def test_a_gemm_with_a_bias_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["y"])]
    held = {"w": normal(32, 24, seed=1), "b": np.asarray(normal(*shape, seed=2)), "v": normal(24, 16, seed=3)}
    nodes = [node("Gemm", ["x", "w", "b"], ["h"]), node("Gemm", ["h", "v"], ["y"])]
    found = Converted(net(nodes, inputs={"x": ["n", 32]}, **held), tmp_path)
    assert found.sqnr_db() > 30
    assert found.kernels["QGemm"] >= 1


def test_a_weight_without_zero_points_would_not_fuse(tmp_path: Path) -> None:
    """Why zeros are written: take them out, and the product is computed in floats."""
    found = Converted(gemm(True, 1), tmp_path)
    for each in found.graph.graph:
        if each.op_type == "DequantizeLinear" and each.inputs[0].name == "w_quantized":
            each.resize_inputs(2)
    save_graph(found.graph, found.path)
    assert "QGemm" not in prove(found.path).kernels


def test_matmul_of_matrices(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    found = Converted(net(nodes, inputs={"x": ["n", 32]}, w=normal(32, 24)), tmp_path)
    assert found.kernels == {"MatMulIntegerToFloat": 1} and found.pairs == (1, 0)
    assert found.sqnr_db() > 35


@pytest.mark.parametrize("bias", ["left", "right", None])
def test_matmul_of_sequences(tmp_path: Path, bias: str | None) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h" if bias else "y"])]
    if bias:
        nodes.append(node("Add", ["h", "b"] if bias == "right" else ["b", "h"], ["y"]))
    found = Converted(net(nodes, inputs={"x": ["n", "m", 32]}, w=normal(32, 24), b=normal(24)), tmp_path)
    assert found.kernels in ({"MatMulIntegerToFloat": 1, "Add": 1}, {"MatMulIntegerToFloat": 1})
    assert found.pairs == (1, 0)
    assert found.sqnr_db() > 35


def test_a_product_with_its_bias_in_two_dimensions_is_not_turned_into_a_float_gemm(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "b"], ["y"])]
    found = Converted(net(nodes, inputs={"x": ["n", 32]}, w=normal(32, 24), b=normal(24)), tmp_path)
    assert found.kernels == {"QGemm": 1} and found.pairs == (1, 0)


def test_a_two_dimensional_product_with_another_sum_stays_integer(tmp_path: Path) -> None:
    """A bias for each sample: onnxruntime turns product and sum into a Gemm, if we let it."""
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "b"], ["y"])]
    found = Converted(net(nodes, inputs={"x": [3, 32]}, w=normal(32, 24), b=normal(1, 24)), tmp_path)
    assert not found.proof.floating, found.kernels


def test_a_residual_sum_is_integer(tmp_path: Path) -> None:
    nodes = [conv("x", "w", "a"), conv("a", "w2", "c", "b"), node("Add", ["a", "c"], ["s"]), conv("s", "w3", "y")]
    found = Converted(net(nodes), tmp_path)
    assert found.kernels == {"QLinearConv": 3, "QLinearAdd": 1} and found.pairs == (1, 1)
    assert found.sqnr_db() > 22


def test_a_residual_block_with_its_activation_is_integer(tmp_path: Path) -> None:
    """As ResNet has it: the sum, then Relu, then the next block."""
    nodes = [
        conv("x", "w", "a", "b"), node("Relu", ["a"], ["ar"]),
        conv("ar", "w2", "c", "b"), node("Relu", ["c"], ["cr"]), conv("cr", "w3", "d"),
        node("Add", ["ar", "d"], ["s"]), node("Relu", ["s"], ["sr"]),
        conv("sr", "w4", "e"), node("Add", ["sr", "e"], ["t"]), node("Relu", ["t"], ["tr"]), conv("tr", "w", "y"),
    ]  # fmt: skip
    found = Converted(net(nodes), tmp_path)
    assert found.kernels == {"QLinearConv": 5, "QLinearAdd": 2} and found.pairs == (1, 1)
    assert found.sqnr_db() > 20


def test_a_concatenation_is_integer(tmp_path: Path) -> None:
    nodes = [
        conv("x", "w", "a"), conv("x", "w2", "c"), node("Concat", ["a", "c"], ["s"], axis=1), conv("s", "w5", "y"),
    ]  # fmt: skip
    found = Converted(net(nodes, w5=normal(8, 16, 3, 3)), tmp_path)
    assert found.kernels == {"QLinearConv": 3, "QLinearConcat": 1} and found.pairs == (1, 1)


def head(*middle: onnx.NodeProto, size: int, **constants: Any) -> onnx.ModelProto:
    """A convolution, something, and a Gemm with inputs of some size."""
    nodes = [conv("x", "w", "a", "b"), node("Relu", ["a"], ["ar"]), *middle, node("Gemm", ["f", "v", "c"], ["y"])]
    return net(nodes, v=normal(size, 40, seed=5), c=normal(40, seed=6), **constants)


SHAPE = np.array([0, -1])


@pytest.mark.parametrize(
    ("middle", "size", "kernel"),
    [
        ([node("GlobalAveragePool", ["ar"], ["p"]), node("Flatten", ["p"], ["f"])], 8, "QLinearGlobalAveragePool"),
        ([node("GlobalAveragePool", ["ar"], ["p"]), node("Reshape", ["p", "s"], ["f"])], 8, "QLinearGlobalAveragePool"),
        ([node("ReduceMean", ["ar"], ["f"], axes=[2, 3], keepdims=0)], 8, "QLinearGlobalAveragePool"),
        (
            [node("AveragePool", ["ar"], ["p"], kernel_shape=[2, 2], strides=[2, 2]), node("Flatten", ["p"], ["f"])],
            200,
            "QLinearAveragePool",
        ),
        (
            [node("MaxPool", ["ar"], ["p"], kernel_shape=[2, 2], strides=[2, 2]), node("Flatten", ["p"], ["f"])],
            200,
            "MaxPool",
        ),
        ([node("Transpose", ["ar"], ["p"], perm=[0, 2, 3, 1]), node("Flatten", ["p"], ["f"])], 800, "Transpose"),
        ([node("Reshape", ["ar", "s"], ["f"])], 800, None),
        (
            [
                node("GlobalAveragePool", ["ar"], ["p"]),
                node("Squeeze", ["p", "three"], ["q"]),
                node("Squeeze", ["q", "two"], ["f"]),
            ],
            8,
            "QLinearGlobalAveragePool",
        ),
    ],
)
def test_pools_and_shapes_between_layers_pass_codes_on(
    tmp_path: Path, middle: list[onnx.NodeProto], size: int, kernel: str | None
) -> None:
    proto = head(*middle, size=size, s=SHAPE, two=np.array([2]), three=np.array([3]))
    found = Converted(proto, tmp_path)
    moves = {"Reshape", "Flatten", "Squeeze", "Transpose", "MaxPool"}
    kernels = {name: count for name, count in found.kernels.items() if name not in moves}
    expected = {"QLinearConv": 1, "QGemm": 1} | ({kernel: 1} if kernel and kernel not in moves else {})
    assert kernels == expected and found.pairs == (1, 0)
    assert found.sqnr_db() > 28


@pytest.mark.parametrize("relu", [True, False])
def test_an_output_that_others_read_too(tmp_path: Path, relu: bool) -> None:
    nodes = [conv("x", "w", "h" if relu else "z", "b"), conv("z", "w2", "y")]
    if relu:
        nodes.insert(1, node("Relu", ["h"], ["z"]))
    found = Converted(net(nodes, outputs=("y", "z")), tmp_path)
    assert found.kernels == {"QLinearConv": 2} and found.pairs == (1, 2)
    assert found.sqnr_db("z") > 30 and found.sqnr_db("y") > 25
    assert [value.name for value in found.graph.graph.outputs] == ["y", "z"]


def test_an_input_that_several_nodes_read_is_quantized_once(tmp_path: Path) -> None:
    nodes = [conv("x", "w", "a"), conv("x", "w2", "c"), node("Sigmoid", ["x"], ["d"])]
    found = Converted(net(nodes, outputs=("a", "c", "d")), tmp_path)
    assert found.kernels == {"QLinearConv": 2, "Sigmoid": 1} and found.pairs == (1, 2)
    np.testing.assert_allclose(found.after["d"], found.before["d"], rtol=1e-5)


def test_layers_that_share_a_weight_share_its_codes(tmp_path: Path) -> None:
    nodes = [conv("x", "w", "a", "b"), conv("a", "w", "y", "b")]
    found = Converted(net(nodes), tmp_path)
    assert found.kernels == {"QLinearConv": 2}
    codes = [v for v in found.graph.graph.initializers.values() if v.dtype == ir.DataType.INT8 and len(v.shape) == 4]
    assert len(codes) == 1
    assert found.sqnr_db() > 25


@pytest.mark.parametrize("op", ["Tanh", "Softplus", "Elu", "Exp"])
def test_other_operators_stay_float(tmp_path: Path, op: str) -> None:
    nodes = [conv("x", "w", "a", "b"), node(op, ["a"], ["s"]), conv("s", "w2", "y")]
    found = Converted(net(nodes), tmp_path)
    assert found.kernels == {"QLinearConv": 2, op: 1} and found.pairs == (2, 2)
    assert found.sqnr_db() > 22


@pytest.mark.parametrize("op", ["LeakyRelu", "Sigmoid"])
def test_activations_between_convolutions(tmp_path: Path, op: str) -> None:
    nodes = [conv("x", "w", "a", "b"), node(op, ["a"], ["s"]), conv("s", "w2", "y")]
    found = Converted(net(nodes), tmp_path)
    assert found.kernels == {"QLinearConv": 2, f"QLinear{op}": 1} and found.pairs == (1, 1)
    assert found.sqnr_db() > 25


@pytest.mark.parametrize("axis", [1, 3])
def test_softmax_between_convolutions_stays_float(tmp_path: Path, axis: int) -> None:
    """The runtime would take its integer kernel unasked, which is slower and no more precise."""
    nodes = [conv("x", "w", "a", "b"), node("Softmax", ["a"], ["s"], axis=axis), conv("s", "w2", "y")]
    found = Converted(net(nodes), tmp_path)
    assert found.kernels == {"QLinearConv": 2, "Softmax": 1, "Sum": 1} and found.pairs == (2, 2)
    assert found.sqnr_db() > 25


def test_silu_is_integer_through_sums_splits_and_joins(tmp_path: Path) -> None:
    nodes = [
        conv("x", "w", "a", "b"), node("Sigmoid", ["a"], ["ga"]), node("Mul", ["a", "ga"], ["sa"]),
        node("Split", ["sa", "halves"], ["l", "r"], axis=1), node("Concat", ["r", "l"], ["j"], axis=1),
        node("Add", ["j", "sa"], ["t"]), node("Resize", ["t", "", "twice"], ["u"], mode="nearest"),
        conv("u", "w2", "c"), node("Sigmoid", ["c"], ["gc"]), node("Mul", ["gc", "c"], ["sc"]),
        node("Slice", ["sc", "from", "to", "axes"], ["d"]), conv("d", "w3", "y"),
    ]  # fmt: skip
    held = {"halves": np.array([4, 4]), "twice": np.array([1, 1, 2, 2], np.float32)}
    held |= {"from": np.array([2, 2]), "to": np.array([18, 18]), "axes": np.array([2, 3])}
    found = Converted(net(nodes, **held), tmp_path)
    assert found.kernels == {
        "QLinearConv": 3, "QLinearSigmoid": 2, "QLinearMul": 2, "QLinearAdd": 1, "QLinearConcat": 1, "Split": 1,
        "Resize": 1, "Slice": 1,
    }  # fmt: skip
    assert found.pairs == (1, 1) and found.sqnr_db() > 25


MOVES: dict[str, tuple[onnx.NodeProto, dict[str, np.ndarray]]] = {
    "Slice": (
        node("Slice", ["a", "from", "to"], ["m"]),
        {"from": np.array([0, 0, 1, 1]), "to": np.array([9, 8, 9, 9])},
    ),
    "Resize": (
        node("Resize", ["a", "", "s"], ["m"], mode="nearest", coordinate_transformation_mode="asymmetric"),
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "Gather": (node("Gather", ["a", "i"], ["m"], axis=1), {"i": np.array([7, 6, 5, 4, 3, 2, 1, 0])}),
    "Expand": (node("Expand", ["a", "e"], ["m"]), {"e": np.array([1, 8, 10, 10])}),
    "Tile": (node("Tile", ["a", "t"], ["m"]), {"t": np.array([1, 1, 1, 2])}),
}


@pytest.mark.parametrize("op", MOVES)
def test_what_moves_values_passes_codes(tmp_path: Path, op: str) -> None:
    move, held = MOVES[op]
    found = Converted(net([conv("x", "w", "a", "b"), move, conv("m", "w2", "y")], **held), tmp_path)
    assert found.kernels["QLinearConv"] == 2 and found.pairs == (1, 1)
    assert found.kernels.keys() <= {"QLinearConv", op} and found.sqnr_db() > 25
    by_name = {value.name: value for each in found.graph.graph for value in each.outputs}
    scales = [by_name[f"{name}_quantized"].producer().inputs[1] for name in ("a", "m")]  # type: ignore[union-attr]
    assert scales[0] is scales[1]


@pytest.mark.parametrize("op", ["DepthToSpace", "ReduceMax", "ReduceMin"])
def test_what_changes_channels_passes_codes(tmp_path: Path, op: str) -> None:
    attributes: dict[str, Any] = {"blocksize": 2} if op == "DepthToSpace" else {"axes": [1], "keepdims": 1}
    channels = 2 if op == "DepthToSpace" else 1
    nodes = [conv("x", "w", "a", "b"), node(op, ["a"], ["m"], **attributes), conv("m", "w2", "y")]
    found = Converted(net(nodes, w2=normal(8, channels, 3, 3, seed=2, scale=0.2)), tmp_path)
    assert found.kernels == {"QLinearConv": 2, op: 1} and found.pairs == (1, 1) and found.sqnr_db() > 25


def test_interpolation_and_outputs_that_nobody_reads_stay_float(tmp_path: Path) -> None:
    nodes = [conv("x", "w", "a"), node("Resize", ["a", "", "s"], ["m"], mode="linear"), conv("m", "w2", "y")]
    found = Converted(net(nodes, s=np.array([1, 1, 2, 2], np.float32)), tmp_path)
    assert found.pairs == (2, 2)
    nodes = [conv("x", "w", "a"), node("Split", ["a", "h"], ["m", "unread"], axis=1), conv("m", "w2", "y")]
    held = {"h": np.array([4, 4]), "w2": normal(8, 4, 3, 3, seed=2)}
    found = Converted(net(nodes, **held), tmp_path)
    assert found.kernels["QLinearConv"] == 2 and found.pairs == (2, 2)


def test_sizes_are_asked_of_codes(tmp_path: Path) -> None:
    nodes = [
        conv("x", "w", "a"), node("Shape", ["a"], ["old"]), node("Add", ["old", "more"], ["new"]),
        node("Resize", ["a", "", "", "new"], ["m"], mode="nearest"), conv("m", "w2", "y"),
    ]  # fmt: skip
    inputs = {"x": ["n", 8, "rows", "columns"]}
    feeds = {"x": normal(2, 8, 10, 12)}
    found = Converted(net(nodes, inputs=inputs, more=np.array([0, 0, 5, 5])), tmp_path, feeds)
    assert found.pairs == (1, 1) and found.kernels["QLinearConv"] == 2
    assert found.after["y"].shape == (2, 8, 15, 17) and found.sqnr_db() > 25


def test_a_sigmoid_that_ends_the_network_stays_float(tmp_path: Path) -> None:
    found = Converted(net([conv("x", "w", "a"), node("Sigmoid", ["a"], ["y"])]), tmp_path)
    assert found.kernels == {"QLinearConv": 1, "Sigmoid": 1} and found.pairs == (1, 1)


def test_a_sum_with_a_constant_stays_float(tmp_path: Path) -> None:
    nodes = [conv("x", "w", "a"), node("Add", ["a", "c"], ["s"]), conv("s", "w2", "y")]
    found = Converted(net(nodes, c=normal(10, 10)), tmp_path)
    assert found.kernels == {"QLinearConv": 2, "Add": 1} and found.pairs == (2, 2)


def test_a_sum_that_ends_the_network_stays_float(tmp_path: Path) -> None:
    nodes = [conv("x", "w", "a"), conv("x", "w2", "c"), node("Add", ["a", "c"], ["y"])]
    found = Converted(net(nodes), tmp_path)
    assert found.kernels in ({"QLinearConv": 2, "Add": 1}, {"QLinearConv": 2, "QLinearAdd": 1})


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", None])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_a_layer_left_float_between_integer_layers_is_computed_in_floats(
    tmp_path: Path, op: str, activation: str | None
) -> None:
    """The runtime would quantize its weight unasked, one scale for all of it."""
    nodes = [
        conv("x", "w", "a"), node(op, ["a", "w2", "b"], ["c" if activation else "d"]),
        *([node(activation, ["c"], ["d"])] if activation else []), conv("d", "w3", "y"),
    ]  # fmt: skip
    weight = normal(8, 8, 3, 3, seed=2, scale=0.2)
    weight[0, 0] = 50
    found = Converted(net(nodes, w2=weight), tmp_path, skip=["w2"])
    assert found.kernels["QLinearConv"] == 2 and sum(map(len, found.proof.floating.values())) == 1
    assert found.pairs == (2, 2)


def test_a_gemm_left_float_between_integer_layers_is_computed_in_floats(tmp_path: Path) -> None:
    nodes = [
        conv("x", "w", "a"), node("Flatten", ["a"], ["f"]), node("Gemm", ["f", "v", "c"], ["g"]),
        node("Relu", ["g"], ["r"]), node("Gemm", ["r", "u"], ["y"]),
    ]  # fmt: skip
    held = {"v": normal(800, 32, scale=0.05), "c": normal(32), "u": normal(32, 24)}
    found = Converted(net(nodes, **held), tmp_path, skip=["v"])
    assert found.kernels["QLinearConv"] == 1 and found.kernels["QGemm"] == 1
    assert sum(map(len, found.proof.floating.values())) == 1


def test_names_that_ours_would_collide_with(tmp_path: Path) -> None:
    """A model may have its own x_scale, a_quantized and w_scale."""
    nodes = [
        node("Mul", ["x", "x_scale"], ["x_quantized"]), conv("x", "w", "a", "b"),
        node("Tanh", ["a"], ["a_dequantized"]), node("Mul", ["a_dequantized", "w_scale"], ["w_quantized"]),
        node("Tanh", ["w_quantized"], ["a_quantized"]), node("Add", ["a_quantized", "x_quantized"], ["y"]),
    ]  # fmt: skip
    held = {"x_scale": normal(10, 10), "w_scale": normal(10, 10, seed=1), "a_zero_point": np.float32(1)}
    found = Converted(net(nodes, **held), tmp_path)
    assert found.kernels["QLinearConv"] == 1
    assert found.sqnr_db() > 30


@pytest.mark.parametrize("mixed", [("int8-dynamic", "int8-static"), ("int8-static", "int8-dynamic")])
def test_static_and_dynamic_layers_side_by_side(tmp_path: Path, mixed: tuple[str, str]) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "v"], ["g"]), node("MatMul", ["g", "u"], ["y"]),
    ]  # fmt: skip
    held = {"w": normal(32, 24), "v": normal(24, 16), "u": normal(16, 24)}
    rules = [{"match": "w", "scheme": mixed[0]}, {"match": "v", "scheme": mixed[1]}]
    found = Converted(net(nodes, inputs={"x": ["n", "m", 32]}, **held), tmp_path, rules=rules)
    integer = found.proof.integer
    assert sum(integer.values()) == 3 and not found.proof.floating
    assert found.sqnr_db() > 28


def test_a_value_that_is_zero_everywhere(tmp_path: Path) -> None:
    nodes = [conv("x", "w", "a"), node("Relu", ["a"], ["ar"]), conv("ar", "w2", "y", "b")]
    proto = net(nodes, w=-np.abs(W))
    feeds = {"x": np.abs(normal(2, 8, 10, 10))}
    found = Converted(proto, tmp_path, feeds)
    assert found.before["y"].std(axis=(0, 2, 3)).max() < 1e-6, "the bias alone"
    np.testing.assert_allclose(found.after["y"], found.before["y"], atol=0.01)


def test_a_half_precision_model_is_left_out_of_integer_arithmetic() -> None:
    """QuantizeLinear takes half precision from operator set 19 on only, DynamicQuantizeLinear never."""
    from onnx import TensorProto

    half = {"w": W.astype(np.float16), "v": normal(10, 32).astype(np.float16)}
    nodes = [conv("x", "w", "h"), node("MatMul", ["h", "v"], ["y"])]
    proto = model(nodes, IMAGE, {"y": None}, half, dtype=TensorProto.FLOAT16)
    for scheme in ("int8-static", "int8-dynamic"):
        plan = resolve_graph(validate({"scheme": scheme}, "test"), prepared(proto), Path("model.onnx"))
        assert not plan.of_mode("static", "dynamic")
        assert {each.mode for each in plan.nodes} == {"weights"}
        assert plan.nodes[1].note is not None and "half precision" in plan.nodes[1].note


def simulated_codes(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    return np.clip(np.rint(x.astype(np.float64) / scale) + zero, 0, 255)


@pytest.mark.parametrize("algorithm", ["rtn", "mse"])
@pytest.mark.parametrize(("shape", "group"), [((16, 8, 3, 3), 1), ((16, 4, 3, 3), 2), ((32, 1, 3, 3), 32)])
def test_the_integer_convolution_is_what_the_stored_numbers_say(
    tmp_path: Path, shape: tuple[int, ...], group: int, algorithm: str
) -> None:
    nodes = [conv("x", "w", "h", "b", group=group), node("Relu", ["h"], ["y"])]
    held = {"w": normal(*shape, seed=1), "b": normal(shape[0], seed=2)}
    inputs = {"x": ["n", shape[1] * group, 10, 10]}
    found = Converted(net(nodes, inputs=inputs, **held), tmp_path, algorithm=algorithm)
    held = {n: np.asarray(v.const_value.numpy(), dtype=np.float64) for n, v in found.graph.graph.initializers.items()}
    assert held["w_quantized"].shape == shape and held["w_scale"].shape == (shape[0],)
    assert held["x_scale"] == pytest.approx(np.ptp([0, *found.feeds["x"].ravel()]) / 255, rel=1e-6)
    zero = held["x_zero_point"]
    x = (simulated_codes(found.feeds["x"], held["x_scale"], zero) - zero) * held["x_scale"]
    weight = held["w_quantized"] * held["w_scale"].reshape(-1, 1, 1, 1)
    bias = held["b_quantized"] * held["b_scale"]
    np.testing.assert_allclose(held["b_scale"], held["x_scale"] * held["w_scale"], rtol=1e-6)
    wide = naive_conv(x, weight, group) + bias.reshape(-1, 1, 1)
    codes = simulated_codes(wide, held["y_scale"], held["y_zero_point"])
    got = found.after["y"] / held["y_scale"] + held["y_zero_point"]
    # Where a sum lies between two codes, float32 and float64 may round it to either.
    assert np.abs(got - codes).max() < 1.001 and (np.abs(got - codes) > 1e-3).mean() < 2e-3
    # The weights' own error is that of a step of at most twice the largest value over 127.
    step = np.abs(held["w_scale"])
    original = normal(*shape, seed=1)
    most = np.abs(original).reshape(shape[0], -1).max(1)
    assert (step <= 2.05 * most / 127).all()
    inside = np.abs(original) <= 127 * step.reshape(-1, 1, 1, 1)
    error = np.abs(weight - original) / step.reshape(-1, 1, 1, 1)
    assert error[inside].max() <= 0.5001


@pytest.mark.parametrize("trans", [0, 1])
def test_the_integer_gemm_is_what_the_stored_numbers_say(tmp_path: Path, trans: int) -> None:
    found = Converted(gemm(True, trans), tmp_path)
    held = {n: np.asarray(v.const_value.numpy(), dtype=np.float64) for n, v in found.graph.graph.initializers.items()}
    zero = held["x_zero_point"]
    x = (simulated_codes(found.feeds["x"], held["x_scale"], zero) - zero) * held["x_scale"]
    weight = held["w_quantized"].T if trans else held["w_quantized"]
    expected = x @ (weight * held["w_scale"]) + held["b_quantized"] * held["b_scale"]
    np.testing.assert_allclose(found.after["y"], expected, rtol=1e-4, atol=1e-4)


def test_the_float_model_is_met_within_the_noise_that_steps_promise(tmp_path: Path) -> None:
    """A step's error is uniform, so its power is a twelfth of the step's square; products add them up."""
    found = Converted(gemm(False, 0, shape=(256, 64)), tmp_path, {"x": normal(64, 256)})
    held = {n: np.asarray(v.const_value.numpy(), dtype=np.float64) for n, v in found.graph.graph.initializers.items()}
    weight, x = normal(256, 64, seed=1).astype(np.float64), found.feeds["x"].astype(np.float64)
    steps = held["x_scale"] ** 2 / 12, held["w_scale"] ** 2 / 12
    power = steps[0] * np.square(weight).sum(0) + steps[1] * np.square(x).sum(1).mean()
    noise = np.square(found.after["y"] - x @ weight).mean(0)
    assert 0.7 < noise.mean() / power.mean() < 1.3


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic", "int8", "fp16"])
def test_a_weight_that_a_branch_reads_too(tmp_path: Path, scheme: str) -> None:
    def branch(name: str) -> onnx.GraphProto:
        nodes = [node("MatMul", ["h", "w"], [f"{name}_p"]), node("Relu", [f"{name}_p"], [f"{name}_y"])]
        output = onnx.helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, None)
        return onnx.helper.make_graph(nodes, name, [], [output])

    nodes = [
        node("Gemm", ["x", "v", "b"], ["h"]), node("ReduceSum", ["x"], ["t"], keepdims=0),
        node("Greater", ["t", "zero"], ["yes"]),
        node("If", ["yes"], ["q"], then_branch=branch("then"), else_branch=branch("else")),
        node("MatMul", ["h", "w"], ["z"]), node("MatMul", ["q", "u"], ["y"]),
    ]  # fmt: skip
    held = {"v": normal(32, 32), "w": normal(32, 32, seed=1), "u": normal(32, 32, seed=2), "b": normal(32)}
    proto = net(nodes, ("y", "z"), {"x": ["n", 32]}, zero=np.float32(0), **held)
    found = Converted(proto, tmp_path, None, scheme)
    assert found.sqnr_db("y") > 30 and found.sqnr_db("z") > 30
    assert not found.plan.of_mode("float")


def test_a_resize_that_fills_places_outside_of_the_image(tmp_path: Path) -> None:
    """Between codes the runtime would write the filling as one of them."""
    resize = {"mode": "nearest", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
    nodes = [conv("x", "w", "h"), node("Resize", ["h", "roi", "", "sizes"], ["r"], **resize), conv("r", "w2", "y")]
    roi = np.float32([0, 0, -0.5, 0.2, 1, 1, 1.5, 0.8])
    proto = net(nodes, inputs={"x": [2, 8, 10, 10]}, roi=roi, sizes=np.array([2, 8, 12, 12]))
    assert Converted(proto, tmp_path, {"x": normal(2, 8, 10, 10)}).sqnr_db() > 25
