"""Half-precision weights: what is stored, what is left, and that the runtime computes the same."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import model as graph
from support.graphs import node
from support.nbits_graphs import constant, free, matmul, model_of, normal, run, tied

from quantcli import convert
from quantcli.errors import InputError
from quantcli.onnx.rewrite.cast import cast_weights

NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def mlp() -> ir.Model:
    """Two layers, the first with a large bias and a small one."""
    x = free("x", ["n", 64])
    constants = [constant("w1", normal(64, 20000)), constant("b1", normal(20000, seed=1))]
    constants += [constant("w2", normal(20000, 5, seed=2)), constant("b2", normal(5, seed=3))]
    values = {value.name: value for value in constants}
    first = ir.node("Gemm", [x, values["w1"], values["b1"]], name="first")
    second = ir.node("Gemm", [first.outputs[0], values["w2"], values["b2"]], name="second")
    second.outputs[0].name = "y"
    return model_of([x], [first, second], constants, [second.outputs[0]])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_large_tensors_are_stored_at_half_size_and_mean_their_rounded_values(dtype: str) -> None:
    model, x = mlp(), normal(3, 64, seed=4)
    originals = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    outcomes = {outcome.value.name: outcome for outcome in cast_weights(model, dtype)}
    assert outcomes.keys() == {"w1", "b1", "w2"}
    assert model.graph.initializers.keys() == {"b2", *(f"{name}_{dtype}" for name in outcomes)}
    rounded = {name: value.astype(np.float64) for name, value in originals.items()}
    for name, outcome in outcomes.items():
        tensor = model.graph.initializers[f"{name}_{dtype}"].const_value
        assert tensor.numpy().dtype == NUMPY[dtype] and len(tensor.tobytes()) == outcome.nbytes
        assert originals[name].nbytes == 2 * outcome.nbytes and outcome.stays is None
        np.testing.assert_array_equal(tensor.numpy(), originals[name].astype(NUMPY[dtype]))
        rounded[name] = originals[name].astype(NUMPY[dtype]).astype(np.float64)
        error = rounded[name] - originals[name]
        assert outcome.rounding is not None and outcome.rounding.sqnr_db == pytest.approx(
            10 * np.log10(np.sum(originals[name].astype(np.float64) ** 2) / np.sum(error**2)), rel=1e-6
        )
    expected = (x @ rounded["w1"] + rounded["b1"]) @ rounded["w2"] + rounded["b2"]
    (got,) = run(model, x=x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=0.05)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-6


def test_values_that_overflow_keep_their_tensor_in_float32() -> None:
    weight = normal(64, 64)
    weight[1, 2] = -70000.0
    model = matmul(weight)
    (outcome,) = cast_weights(model, "fp16")
    assert outcome.nbytes == weight.nbytes and outcome.rounding is None
    assert outcome.stays == "stays fp32: 1 values lie beyond 65504, the largest fp16 number"
    assert [node.op_type for node in model.graph] == ["MatMul"]
    (outcome,) = cast_weights(model, "bf16")
    assert outcome.stays is None
    # An infinity is one before and after: masks hold them on purpose.
    weight[1, 2] = -np.inf
    (outcome,) = cast_weights(matmul(weight), "fp16")
    assert outcome.stays is None and outcome.rounding is not None and outcome.rounding.sqnr_db is not None


def test_values_under_the_smallest_half_keep_their_tensor_in_float32() -> None:
    (outcome,) = cast_weights(matmul(normal(64, 64) * np.float32(1e-9)), "fp16")
    assert outcome.stays == "stays fp32: its values are too small for fp16, which rounds most of them to zero"
    (outcome,) = cast_weights(matmul(normal(64, 64) * np.float32(1e-9)), "bf16")
    assert outcome.stays is None


def test_doubles_stay_doubles() -> None:
    weight, x = normal(64, 32).astype(np.float64), normal(3, 64, seed=1).astype(np.float64)
    wide, value = (
        ir.Value(name="x", shape=ir.Shape(["n", 64]), type=ir.TensorType(ir.DataType.DOUBLE)),
        constant("w", weight),
    )
    product = ir.node("MatMul", [wide, value])
    product.outputs[0].name, product.outputs[0].type = "y", ir.TensorType(ir.DataType.DOUBLE)
    model = model_of([wide], [product], [value], product.outputs)
    (outcome,) = cast_weights(model, "fp16")
    assert outcome.nbytes == weight.size * 2
    (got,) = run(model, x=x)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, x @ weight.astype(np.float16).astype(np.float64), rtol=1e-12)


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_what_the_file_holds_in_halves_is_left(tmp_path: Path, scheme: str) -> None:
    nodes = [node("Cast", ["w"], ["wide"], to=onnx.TensorProto.FLOAT), node("MatMul", ["x", "wide"], ["y"])]
    onnx.save(
        graph(nodes, {"x": ["n", 64]}, {"y": None}, {"w": normal(64, 64).astype(np.float16)}), tmp_path / "m.onnx"
    )
    with pytest.raises(InputError, match=r"applies to nothing in .*: already in half precision"):
        convert(tmp_path / "m.onnx", tmp_path / "out.onnx", scheme=scheme)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = cast_weights(matmul(normal(64, 64)), "fp16")
    monkeypatch.setattr("quantcli.onnx.rewrite.cast._CHUNK", 100)
    (chunked,) = cast_weights(matmul(normal(64, 64)), "fp16")
    assert chunked.rounding is not None and whole.rounding is not None
    assert chunked.rounding.sqnr_db == pytest.approx(whole.rounding.sqnr_db, rel=1e-9)


def test_a_shared_weight_is_cast_once_and_subgraphs_keep_their_own() -> None:
    model = tied()
    before = run(model, ids=np.arange(40))[0]
    assert [outcome.value.name for outcome in cast_weights(model, "fp16")] == ["table"]
    assert [node.op_type for node in model.graph].count("Cast") == 1
    np.testing.assert_allclose(run(model, ids=np.arange(40))[0], before, rtol=1e-2, atol=0.05)

    condition, x = free("condition", [], ir.DataType.BOOL), free("x", ["n", 64])
    branches = {}
    for number, name in enumerate(("then_branch", "else_branch")):
        weight = constant(f"w{number}", normal(64, 32, seed=number))
        node = ir.node("MatMul", [x, weight], name=name)
        node.outputs[0].name, node.outputs[0].type = f"out{number}", ir.TensorType(ir.DataType.FLOAT)
        branches[name] = ir.Graph([], node.outputs, nodes=[node], initializers=[weight], name=name)
    choice = ir.node("If", [condition], branches, name="choice")
    choice.outputs[0].name = "y"
    model = model_of([condition, x], [choice], [], [choice.outputs[0]])
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert len(cast_weights(model, "fp16")) == 2
    half = normal(64, 32, seed=1).astype(np.float16).astype(np.float32)
    (got,) = run(model, condition=np.array(False), x=normal(3, 64))
    np.testing.assert_allclose(got, normal(3, 64) @ half, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for() -> None:
    model = mlp()
    assert [each.value.name for each in cast_weights(model, "bf16", {model.graph.initializers["w2"]})] == ["w2"]
    assert {"w1", "b1", "w2_bf16", "b2"} == model.graph.initializers.keys()


def test_nothing_to_cast_is_refused() -> None:
    with pytest.raises(InputError, match=r"weights are fp16 already; there is nothing to cast to bf16"):
        cast_weights(matmul(normal(64, 64).astype(np.float16)), "bf16")
    with pytest.raises(InputError, match="holds no float32 weights to cast to fp16"):
        cast_weights(matmul(normal(4, 4)), "fp16")
    model = matmul(normal(64, 64))
    model.opset_imports[""] = 12
    with pytest.raises(InputError, match="operator set 12, which has no bf16"):
        cast_weights(model, "bf16")
    assert len(cast_weights(model, "fp16")) == 1
