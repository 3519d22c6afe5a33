"""Preparing and upgrading: every disguise is taken off, and the function stays the same in onnxruntime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.graphs import codes_of, model, node, normal, opened, operators, prepared, run, same_function

from quantcli import convert
from quantcli.errors import InputError
from quantcli.models.session import Session
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.opset import upgrade
from quantcli.onnx.graph.prepare import prepare
from quantcli.onnx.plan.plan import graph_quantization

X = {"x": normal(3, 4, 8, 8, seed=11)}
IMAGE = {"x": ["n", 4, 8, 8]}


def test_functions_are_inlined() -> None:
    body = [node("Conv", ["a", "k"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["d"])]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "Block", ["a", "k"], ["d"], body, opsets)
    nodes = [node("Block", ["x", "w1"], ["h"], domain="local"), node("Block", ["h", "w2"], ["y"], domain="local")]
    constants = {"w1": normal(4, 4, 3, 3, seed=1), "w2": normal(6, 4, 3, 3, seed=2)}
    proto = model(nodes, IMAGE, {"y": None}, constants, functions=[function], domains={"local": 1})
    after = prepared(proto)
    assert operators(after) == {"Conv": 2, "Relu": 2}
    assert not after.functions and len({each.name for each in after.graph}) == 4
    same_function(proto, X, after)


def test_a_constant_of_a_function_called_twice_is_one() -> None:
    body = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(normal(4, 4, 3, 3, seed=1))),
        node("Conv", ["a", "w"], ["d"], pads=[1, 1, 1, 1]),
    ]
    function = helper.make_function("local", "Block", ["a"], ["d"], body, [helper.make_opsetid("", 17)])
    nodes = [node("Block", ["x"], ["h"], domain="local"), node("Block", ["h"], ["y"], domain="local")]
    proto = model(nodes, IMAGE, {"y": None}, functions=[function], domains={"local": 1})
    after = prepared(proto)
    assert operators(after) == {"Conv": 2} and len(after.graph.initializers) == 1
    same_function(proto, X, after)


def test_two_products_of_one_weight_that_is_turned() -> None:
    nodes = [node("Einsum", ["x", "w"], [name], equation="btd,hd->bth") for name in ("y", "z")]
    proto = model([*nodes, node("Relu", ["w"], ["r"])], {"x": [2, 3, 8]}, {"y": None, "z": None, "r": None},
                  {"w": normal(5, 8)})  # fmt: skip
    after = prepared(proto)
    assert operators(after) == {"MatMul": 2}
    same_function(proto, {"x": normal(2, 3, 8)}, after)


def test_initializers_that_are_inputs_are_constants() -> None:
    """As every model before IR version 4 had them."""
    nodes = [node("Conv", ["x", "w"], ["h"]), node("BatchNormalization", ["h", "g", "g", "g", "g"], ["y"])]
    inputs = {**IMAGE, "w": (6, 4, 3, 3), "g": (6,)}
    constants = {"w": normal(6, 4, 3, 3), "g": np.abs(normal(6)) + 1}
    proto = model(nodes, inputs, {"y": None}, constants, opset=11, ir_version=3)
    assert [port.name for port in opened(proto).inputs] == ["x"]
    after = prepared(proto)
    assert [value.name for value in after.graph.inputs] == ["x"] and operators(after) == {"Conv": 1}
    same_function(proto, X, after)


def test_constant_nodes_become_initializers() -> None:
    weight, factor = normal(6, 4, 3, 3), normal(6, 1, 1, seed=1)
    nodes = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
        node("Constant", [], ["c"], value=numpy_helper.from_array(factor)),
        node("Constant", [], ["s"], value_float=2.0),
        node("Identity", ["w"], ["w2"]),
        node("Conv", ["x", "w2"], ["h"]), node("Mul", ["h", "c"], ["h2"]), node("Mul", ["s", "h2"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, IMAGE, {"y": None})
    after = prepared(proto)
    assert operators(after) == {"Conv": 1}
    same_function(proto, X, after)


def test_what_only_constants_lead_to_is_computed_once() -> None:
    nodes = [
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("Mul", ["t", "c"], ["wc"]),
        node("MatMul", ["x", "wc"], ["h"]),
        node("Shape", ["h"], ["shape"]),
        node("Reshape", ["h", "shape"], ["y"]),
    ]
    proto = model(nodes, {"x": ["n", 5]}, {"y": None}, {"w": normal(7, 5), "c": normal(5, 7, seed=1)})
    after = prepared(proto)
    assert "Transpose" not in operators(after) and "Mul" not in operators(after)
    same_function(proto, {"x": normal(3, 5)}, after)


def test_dead_nodes_and_constants_go() -> None:
    nodes = [node("Relu", ["x"], ["dead"]), node("Add", ["dead", "c"], ["deader"]), node("Abs", ["x"], ["y"])]
    after = prepared(model(nodes, IMAGE, {"y": None}, {"c": normal(1), "unused": normal(4)}))
    assert operators(after) == {"Abs": 1} and not after.graph.initializers


def test_names_of_inputs_outputs_and_values_survive_and_the_model_is_left_as_it_was() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["h"], name="first"),
        node("BatchNormalization", ["h", "g", "g", "g", "g"], ["normed"]),
        node("Relu", ["normed"], ["activated"]),
        node("Conv", ["activated", "w2"], ["y"], name="second"),
    ]
    constants = {"w": normal(6, 4, 3, 3), "g": np.abs(normal(6)) + 1, "w2": normal(2, 6, 1, 1)}
    proto = model(nodes, IMAGE, {"y": None}, constants)
    source = opened(proto)
    before = ir.to_proto(source.ir).SerializeToString(deterministic=True)
    after = prepare(source)
    assert ir.to_proto(source.ir).SerializeToString(deterministic=True) == before
    assert [value.name for each in after.graph for value in each.outputs] == ["normed", "activated", "y"]
    assert [each.name for each in after.graph if each.op_type == "Conv"] == ["first", "second"]
    assert {"w", "w2"} <= set(after.graph.initializers)
    same_function(proto, X, after)


def mean(opset: int, axes: list[int] | None, keepdims: int | None, shape: tuple[int, ...] = (3, 4, 8, 8),
         dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:  # fmt: skip
    attributes = {} if keepdims is None else {"keepdims": keepdims}
    inputs, constants = ["x"], {}
    if opset >= 18 and axes is not None:
        inputs, constants = ["x", "axes"], {"axes": np.array(axes, dtype=np.int64)}
    elif axes is not None:
        attributes["axes"] = axes  # type: ignore[assignment]
    nodes = [node("ReduceMean", inputs, ["y"], **attributes)]
    return model(nodes, {"x": ["n", *shape[1:]]}, {"y": None}, constants, opset=opset, dtype=dtype)


@pytest.mark.parametrize("keepdims", [None, 0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [-2, -1]])
@pytest.mark.parametrize("opset", [11, 13, 17, 18])
def test_a_mean_over_space_is_a_pool(opset: int, axes: list[int], keepdims: int | None) -> None:
    proto = mean(opset, axes, keepdims)
    after = prepared(proto)
    assert operators(after) == {"GlobalAveragePool": 1} | ({"Reshape": 1} if keepdims == 0 else {})
    for batch in (1, 3):
        same_function(proto, {"x": normal(batch, 4, 8, 8)}, after)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ([1, 2], (3, 4, 8, 8)), ([2], (3, 4, 8, 8)), ([1, 2, 3], (3, 4, 8, 8)), ([0, 3], (3, 4, 8, 8)),
        ([1, 2], (3, 4, 8)), ([2, 3], (3, 4, 8, 8, 8)), (None, (3, 4, 8, 8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opset", [17, 18])
def test_other_means_stay(opset: int, axes: list[int] | None, shape: tuple[int, ...]) -> None:
    proto = mean(opset, axes, 1, shape)
    after = prepared(proto)
    assert operators(after) == {"ReduceMean": 1}
    same_function(proto, {"x": normal(*shape)}, after)


@pytest.mark.parametrize(("dtype", "numpy"), [(TensorProto.INT32, np.int32), (TensorProto.DOUBLE, np.float64)])
def test_a_mean_of_other_numbers_stays(dtype: int, numpy: type) -> None:
    """There is no pool of integers, and onnxruntime has none of doubles."""
    proto = mean(17, [2, 3], 0, dtype=dtype)
    same_function(proto, {"x": (normal(3, 4, 8, 8) * 100).astype(numpy)}, prepared(proto))


def product(*followers: onnx.NodeProto, shape: list[int | str], bias: tuple[int, ...] = (7,),
            outputs: dict[str, None] | None = None, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:  # fmt: skip
    nodes = [node("MatMul", ["x", "w"], ["h"], name="product"), *followers]
    numpy = helper.tensor_dtype_to_np_dtype(dtype)
    constants = {"w": (normal(5, 7) * 9).astype(numpy), "b": np.asarray(normal(*bias, seed=1) * 9).astype(numpy)}
    return model(nodes, {"x": shape}, outputs or {"y": None}, constants, dtype=dtype)


@pytest.mark.parametrize("inputs", [["h", "b"], ["b", "h"]])
def test_a_product_of_matrices_with_its_bias_is_one_gemm(inputs: list[str]) -> None:
    proto = product(node("Add", inputs, ["y"]), shape=["n", 5])
    after = prepared(proto)
    assert operators(after) == {"Gemm": 1} and after.graph[0].name == "product"
    same_function(proto, {"x": normal(3, 5)}, after)


@pytest.mark.parametrize(
    ("shape", "bias"),
    [
        (["n", "m", 5], (7,)), ([5], (7,)), (["n", 5], (3, 7)), (["n", 5], (1, 1, 7)), (["n", 5], (3, 1)),
        (["n", 5], ()), (["n", 5], (1,)),
    ],
)  # fmt: skip
def test_other_products_stay(shape: list[int | str], bias: tuple[int, ...]) -> None:
    proto = product(node("Add", ["h", "b"], ["y"]), shape=shape, bias=bias)
    after = prepared(proto)
    sizes = [each if isinstance(each, int) else 3 for each in shape]
    same_function(proto, {"x": normal(*sizes)}, after)
    assert operators(after) == {"MatMul": 1, "Add": 1}


def test_a_product_that_others_see_stays() -> None:
    add = node("Add", ["h", "b"], ["y"])
    for proto in (
        product(add, shape=["n", 5], outputs={"y": None, "h": None}),
        product(add, node("Relu", ["h"], ["z"]), shape=["n", 5], outputs={"y": None, "z": None}),
        product(node("Add", ["h", "h"], ["y"]), shape=["n", 5]),
    ):
        after = prepared(proto)
        same_function(proto, {"x": normal(3, 5)}, after)
        assert operators(after)["MatMul"] == 1


def test_a_product_of_integers_stays() -> None:
    """Gemm is not written for them in onnxruntime."""
    proto = product(node("Add", ["h", "b"], ["y"]), shape=["n", 5], dtype=TensorProto.INT32)
    after = prepared(proto)
    same_function(proto, {"x": np.arange(15, dtype=np.int32).reshape(3, 5)}, after)


def test_a_batch_norm_after_a_product_with_bias_is_folded() -> None:
    norm = node("BatchNormalization", ["a", "g", "b", "b", "g"], ["y"])
    proto = product(node("Add", ["h", "b"], ["a"]), norm, shape=["n", 5])
    proto.graph.initializer.append(numpy_helper.from_array(np.abs(normal(7)) + 1, "g"))
    after = prepared(proto)
    same_function(proto, {"x": normal(3, 5)}, after)
    assert operators(after) == {"Gemm": 1}


def branches(opset: int = 17) -> onnx.ModelProto:
    """An If with a layer and a Squeeze in each branch, that reads values and a weight from outside."""

    def branch(name: str, factor: float) -> onnx.GraphProto:
        nodes = [
            node("MatMul", ["h", "w"], [f"{name}_p"]),
            node("Constant", [], [f"{name}_c"], value=numpy_helper.from_array(np.float32(factor))),
            node("Mul", [f"{name}_p", f"{name}_c"], [f"{name}_m"]),
        ]
        if opset < 13:
            nodes.append(node("Unsqueeze", [f"{name}_m"], [f"{name}_y"], axes=[0]))
        else:
            nodes.append(node("Constant", [], [f"{name}_a"], value_ints=[0]))
            nodes.append(node("Unsqueeze", [f"{name}_m", f"{name}_a"], [f"{name}_y"]))
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [out])

    nodes = [
        node("Gemm", ["x", "w0", "b0"], ["g"]), node("Mul", ["g", "c"], ["h"]),
        node("ReduceSum", ["x"], ["total"], keepdims=0), node("Greater", ["total", "zero"], ["yes"]),
        node("If", ["yes"], ["y"], then_branch=branch("then", 2.0), else_branch=branch("else", -3.0)),
    ]  # fmt: skip
    constants = {"w0": normal(5, 6), "b0": normal(6), "c": normal(6, seed=3), "w": normal(6, 7, seed=4)}
    constants["zero"] = np.asarray(np.float32(0))
    return model(nodes, {"x": ["n", 5]}, {"y": None}, constants, opset=opset)


def loop() -> onnx.ModelProto:
    """h <- relu(h @ w) three times over."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("MatMul", ["h", "w"], ["p"]), node("Relu", ["p"], ["next"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("h", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, None)],
    )
    nodes = [node("Loop", ["three", "", "x"], ["y"], body=body)]
    constants = {"three": np.asarray(np.int64(3)), "w": normal(5, 5, scale=0.5)}
    return model(nodes, {"x": ["n", 5]}, {"y": None}, constants)


@pytest.mark.parametrize("sign", [1, -1])
def test_branches_survive(sign: int) -> None:
    proto, feeds = branches(), {"x": sign * np.abs(normal(3, 5))}
    after = prepared(proto)
    same_function(proto, feeds, after)
    assert operators(after)["If"] == 1 and operators(after)["MatMul"] == 2
    assert "Mul" not in {each.op_type for each in after.graph}


def test_loops_survive() -> None:
    proto = loop()
    after = prepared(proto)
    same_function(proto, {"x": normal(3, 5)}, after)
    assert operators(after)["Loop"] == 1


def older() -> onnx.ModelProto:
    """Operators that say in opset 11 what they say otherwise in 13."""
    nodes = [
        node("Conv", ["x", "w"], ["h"], name="conv"), node("Relu", ["h"], ["r"]),
        node("ReduceMean", ["r"], ["m"], axes=[2, 3], keepdims=1),
        node("Squeeze", ["m"], ["s"], axes=[2, 3]),
        node("Gemm", ["s", "w2", "b2"], ["g"]),
        node("Softmax", ["g"], ["p"], axis=1),
        node("Unsqueeze", ["p"], ["u"], axes=[1]),
        node("Split", ["u"], ["y", "z"], axis=2, split=[2, 3]),
    ]  # fmt: skip
    constants = {"w": normal(64, 4, 3, 3), "w2": normal(64, 5), "b2": normal(5)}
    return model(nodes, IMAGE, {"y": None, "z": None}, constants, opset=11, ir_version=6)


def test_an_upgraded_graph_computes_the_same_and_keeps_its_weights() -> None:
    proto = older()
    before = prepared(proto)
    weights = {name: value.const_value for name, value in before.graph.initializers.items()}
    names = [value.name for each in before.graph for value in each.outputs]
    after = upgrade(before, 13)
    assert after.opset_imports[""] == 13
    onnx.checker.check_model(ir.to_proto(after))
    same_function(proto, X, after, 1e-4)
    assert [each.name for each in after.graph if each.op_type == "Conv"] == ["conv"]
    kept = [value.name for each in after.graph for value in each.outputs]
    assert set(names) <= set(kept), "calibration knows these names"
    # The very tensor, not a copy: large weights never pass through the converter.
    assert after.graph.initializers["w"].const_value is weights["w"]
    assert before.graph.initializers["w"].const_value is weights["w"]
    np.testing.assert_array_equal(codes_of(after, "b2"), codes_of(before, "b2"))


def test_an_upgrade_keeps_metadata_and_producer() -> None:
    proto = older()
    proto.metadata_props.add(key="classes", value="cat,dog")
    proto.producer_name = "someone"
    after = upgrade(prepared(proto), 13)
    assert after.metadata_props["classes"] == "cat,dog" and after.producer_name == "someone"


def test_external_weights_are_not_read_by_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(older(), path, save_as_external_data=True, location="weights", size_threshold=0)
    graph = upgrade(prepare(open_onnx(path)), 13)
    tensor = graph.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == tmp_path / "weights"


def test_branches_are_upgraded_too() -> None:
    proto, feeds = branches(11), {"x": np.abs(normal(3, 5))}
    after = upgrade(prepared(proto), 13)
    same_function(proto, feeds, after)


def test_a_newer_graph_is_left() -> None:
    graph = prepared(branches())
    assert upgrade(graph, 13) is graph


def test_an_operator_of_another_domain_is_refused_by_an_upgrade_with_a_reason_or_kept() -> None:
    nodes = [node("Gelu", ["x"], ["h"], domain="com.microsoft"), node("Softmax", ["h"], ["y"], axis=1)]
    proto = model(nodes, {"x": ["n", 5]}, {"y": None}, opset=11, ir_version=6, domains={"com.microsoft": 1})
    try:
        after = upgrade(prepared(proto), 13)
    except InputError as error:
        assert "operator set 11 cannot be upgraded to 13" in str(error)
    else:
        same_function(proto, {"x": normal(3, 5)}, after)


@pytest.mark.parametrize("build", [older, branches, loop])
def test_equal_models_are_prepared_to_equal_bytes(build: object) -> None:
    def once() -> bytes:
        return ir.to_proto(upgrade(prepared(build()), 13)).SerializeToString(deterministic=True)  # type: ignore[operator]

    assert once() == once()


def test_half_precision_survives() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["h"]), node("BatchNormalization", ["h", "g", "g", "g", "g"], ["n"]),
        node("ReduceMean", ["n"], ["y"], axes=[2, 3], keepdims=0),
    ]  # fmt: skip
    constants = {"w": normal(6, 4, 3, 3).astype(np.float16), "g": (np.abs(normal(6)) + 1).astype(np.float16)}
    proto = model(nodes, IMAGE, {"y": None}, constants, dtype=TensorProto.FLOAT16)
    after = prepared(proto)
    same_function(proto, {"x": X["x"].astype(np.float16)}, after, 1e-2)
    assert "BatchNormalization" not in operators(after)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_a_quantized_weight_is_not_expanded(dtype: type) -> None:
    """Else the model would no longer be seen to be quantized."""
    nodes = [node("DequantizeLinear", ["q", "s"], ["w"]), node("MatMul", ["x", "w"], ["y"])]
    constants = {"q": np.arange(35, dtype=dtype).reshape(5, 7), "s": np.float32(0.1)}
    proto = model(nodes, {"x": ["n", 5]}, {"y": None}, constants)
    assert graph_quantization(prepared(proto)) == "QDQ"


def test_nodes_in_another_order_are_sorted(tmp_path: Path) -> None:
    """onnxruntime runs such a graph, and its converter to float16 writes one."""
    nodes = [node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"]), node("MatMul", ["x", "w"], ["h"])]
    held = {"w": normal(64, 96), "v": normal(96, 32)}
    onnx.save(model(nodes, {"x": [2, 64]}, {"y": None}, held), tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8")
    x = {"x": normal(2, 64, seed=3)}
    expected, got = (Session(tmp_path / name).run(x)["y"] for name in ("m.onnx", "o.onnx"))
    assert np.square(expected - got).sum() / np.square(expected).sum() < 1e-3


def test_an_inconsistent_graph_is_refused() -> None:
    nodes = [node("Conv", ["x", "w"], ["h"]), node("Add", ["h", "nowhere"], ["y"])]
    proto = model(nodes, IMAGE, {"y": None}, {"w": normal(6, 4, 3, 3)})
    with pytest.raises(InputError):
        run(prepared(proto), X)


FOUND = find_spec("rapidocr_onnxruntime")
OCR = Path(FOUND.origin).parent / "models" if FOUND and FOUND.origin else None


@pytest.mark.skipif(OCR is None, reason="rapidocr-onnxruntime is not installed")
@pytest.mark.parametrize("part", ["det", "rec", "cls"])
def test_real_models_stay_the_same(part: str) -> None:
    assert OCR is not None
    path = next(OCR.glob(f"*{part}*.onnx"))
    after = prepare(open_onnx(path))
    assert "BatchNormalization" not in operators(after) and "Constant" not in operators(after)
    width = {"det": 96, "rec": 160, "cls": 192}[part]
    feeds = {"x": normal(1, 3, 48 if part != "det" else 96, width, scale=0.5)}
    same_function(onnx.load(path), feeds, after, 2e-3)
    if after.opset_imports[""] < 13:
        same_function(onnx.load(path), feeds, upgrade(after, 13), 2e-3)
