"""Weight-only nodes: packing against a naive loop and onnxruntime's own quantizer, meaning against the runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from support import graphs
from support.nbits_graphs import constant, free, matmul, model_of, normal, one_node, run, tied

from quantcli import convert
from quantcli.core.scheme import PRESETS, Granularity, NumberFormat, Scheme
from quantcli.errors import InputError
from quantcli.models.session import Session
from quantcli.onnx.execution.nbits_decode import decode
from quantcli.onnx.plan.nbits import effective, oldest_runtime, supports
from quantcli.onnx.rewrite.nbits import quantize_node

INT8, NF4 = PRESETS["int8"], PRESETS["nf4"]
#: What the kernels' own float32 arithmetic may differ by from float64.
EXACT = {"rtol": 2e-6, "atol": 1e-6}


def int4(size: int = 32, *, symmetric: bool = True) -> Scheme:
    return Scheme(NumberFormat("int4", Granularity("group", size), symmetric))


def int8(*, symmetric: bool) -> Scheme:
    return Scheme(replace(INT8.weights, symmetric=symmetric))


def gather(table: np.ndarray) -> ir.Model:
    dtype = ir.DataType.FLOAT16 if table.dtype == np.float16 else ir.DataType.FLOAT
    model = one_node("Gather", [constant("w", table), free("ids", ["batch", "length"], ir.DataType.INT64)])
    model.graph.outputs[0].type = ir.TensorType(dtype)
    return model


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    (found,) = [node for node in model.graph if node.op_type == op_type]
    return found


def quantized(model: ir.Model, scheme: Scheme, algorithm: str = "rtn", **options: Any) -> ir.Model:
    """The same model with every node quantized that can be."""
    for node in list(model.graph):
        if supports(node, scheme) is None:
            quantize_node(model, node, scheme, algorithm, **options)
    return model


def stored(node: ir.Node, index: int) -> np.ndarray:
    return node.inputs[index].const_value.numpy()


SHAPES = [(64, 24), (100, 7), (33, 5), (16, 1), (130, 3)]
SCHEMES = {
    "int4": int4(),
    "int4 blocks of 16": int4(16),
    "int4 asymmetric": int4(symmetric=False),
    "int8": INT8,
    "int8 asymmetric": int8(symmetric=False),
    "nf4": NF4,
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_runtime_multiplies_by_what_is_decoded(shape: tuple[int, int], scheme: Scheme) -> None:
    weight = normal(*shape)
    model = quantized(matmul(weight), scheme, accuracy_level=0)
    (node,) = model.graph
    meant = decode(node)
    assert meant.shape == shape[::-1] and meant.dtype == np.float32
    (got,) = run(model, x=np.eye(shape[0], dtype=np.float32))
    np.testing.assert_allclose(got, meant.T, **EXACT)
    x = normal(5, shape[0], seed=1)
    np.testing.assert_allclose(run(model, x=x)[0], x.astype(np.float64) @ meant.T, rtol=1e-4, atol=1e-4)
    noise = np.linalg.norm(meant - weight.T) / np.linalg.norm(weight)
    assert noise < (0.01 if scheme.weights.bits == 8 else 0.15)


@pytest.mark.parametrize("scheme", [scheme for name, scheme in SCHEMES.items() if name != "nf4"])
@pytest.mark.parametrize("shape", [(50, 64), (9, 100), (7, 30)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_runtime_looks_up_what_is_decoded(shape: tuple[int, int], scheme: Scheme, dtype: type) -> None:
    table = normal(*shape).astype(dtype)
    model = quantized(gather(table), scheme)
    (node,) = model.graph
    assert node.op_type == "GatherBlockQuantized"
    meant = decode(node)
    ids = np.array([[0, 3, shape[0] - 1], [-1, 2, 2]])
    (got,) = run(model, ids=ids)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, meant.astype(dtype)[ids], rtol=1e-3 if dtype == np.float16 else 2e-6)
    assert np.linalg.norm(meant - table) / np.linalg.norm(table) < (0.01 if scheme.weights.bits == 8 else 0.15)


def naive_pack(weight: np.ndarray, size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes and scales of ``[K, N]``, one value at a time, as the operator's documentation has them."""
    columns, rows = weight.shape
    blocks, half = -(-columns // size), 1 << (bits - 1)
    data = np.full((rows, blocks, size * bits // 8), 0, np.uint8)
    scales = np.zeros((rows, blocks), np.float32)
    for n in range(rows):
        for b in range(blocks):
            part = weight[b * size : (b + 1) * size, n]
            scales[n, b] = np.abs(part).max() / np.float32((2 * half - 1) / 2)
            for i in range(size):
                value = part[i] / scales[n, b] if i < len(part) else np.float32(0)
                code = int(np.clip(np.round(value), -half, half - 1)) + half
                if bits == 8:
                    data[n, b, i] = code
                else:
                    data[n, b, i // 2] |= code << (4 * (i % 2))
    return data, scales


@pytest.mark.parametrize(("scheme", "size"), [(int4(16), 16), (int4(64), 64), (INT8, 128)])
def test_packing_is_that_of_a_naive_loop(scheme: Scheme, size: int) -> None:
    weight = normal(2 * size - 3, 3)
    (node,) = quantized(matmul(weight), scheme).graph
    data, scales = naive_pack(weight, size, scheme.weights.bits)
    assert {name: node.attributes[name].value for name in ("K", "N", "bits", "block_size", "accuracy_level")} == {
        "K": 2 * size - 3, "N": 3, "bits": scheme.weights.bits, "block_size": size, "accuracy_level": 4,
    }  # fmt: skip
    assert len(node.inputs) == 3
    np.testing.assert_array_equal(stored(node, 1), data)
    np.testing.assert_allclose(stored(node, 2), scales, rtol=1e-6)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_asymmetric_codes_are_those_of_onnxruntimes_own_quantizer(size: int) -> None:
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    columns, rows = 2 * size - 6, 10
    weight = normal(columns, rows) + 0.3
    (node,) = quantized(matmul(weight), int4(size, symmetric=False)).graph
    data = np.zeros((rows, 2, size // 2), np.uint8)
    scales, zero_points = np.zeros((rows * 2,), np.float32), np.zeros((rows * 1,), np.uint8)
    quantize_matmul_4bits(data, weight, scales, zero_points, size, rows, columns, False)
    np.testing.assert_allclose(stored(node, 2).reshape(-1), scales, rtol=1e-6)
    np.testing.assert_array_equal(stored(node, 3).reshape(-1), zero_points)
    # They round halves away from zero, and fill the last block with other codes, which nobody reads.
    ours, theirs = stored(node, 1).reshape(rows, -1)[:, : columns // 2], data.reshape(rows, -1)[:, : columns // 2]
    assert np.mean(ours == theirs) > 0.99


@pytest.mark.parametrize("size", [16, 64])
def test_nf4_is_that_of_bitsandbytes(size: int) -> None:
    import torch
    from bitsandbytes import functional as bnb

    weight = normal(48, 20)
    scheme = Scheme(NumberFormat("nf4", Granularity("block", size)))
    (node,) = quantized(matmul(weight), scheme).graph
    if size == 64:  # bitsandbytes knows no smaller blocks on every device
        codes, state = bnb.quantize_4bit(torch.from_numpy(weight.T.copy()), blocksize=64, quant_type="nf4")
        np.testing.assert_array_equal(stored(node, 1), codes.numpy().reshape(-1))
        np.testing.assert_array_equal(stored(node, 2), state.absmax.numpy())
    assert node.attributes["block_size"].value == size
    np.testing.assert_allclose(run(ir_model(node), x=np.eye(48, dtype=np.float32))[0], decode(node).T, **EXACT)


def ir_model(node: ir.Node) -> ir.Model:
    assert node.graph is not None
    return ir.Model(node.graph, ir_version=8)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(100, 50)
    for scheme in (int4(), INT8, NF4):
        whole = decode(next(iter(quantized(matmul(weight), scheme).graph)))
        with monkeypatch.context() as patch:
            patch.setattr("quantcli.onnx.weights.blocks._SLAB_ELEMENTS", 700)
            np.testing.assert_array_equal(decode(next(iter(quantized(matmul(weight), scheme).graph))), whole)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("attributes", "bias"),
    [
        ({}, (24,)),
        ({"alpha": 0.5, "beta": 2.0}, (24,)),
        ({"beta": 0.0}, (24,)),
        ({"transA": 1}, (6, 24)),
        ({"alpha": -2.0}, ()),
        ({}, None),
        ({"transA": 1, "beta": 0.25}, (1, 24)),
    ],
)
@pytest.mark.parametrize("scheme", [int4(), NF4], ids=["int4", "nf4"])
def test_gemm(attributes: dict[str, Any], bias: tuple[int, ...] | None, transposed: bool, scheme: Scheme) -> None:
    weight, x = normal(100, 24), normal(6, 100, seed=1)
    left = x.T.copy() if attributes.get("transA") else x
    inputs = [free("x", list(left.shape)), constant("w", weight.T.copy() if transposed else weight)]
    added = np.zeros((), np.float32) if bias is None else normal(*bias, seed=2)
    if bias is not None:
        inputs.append(constant("b", np.asarray(added)))
    model = quantized(one_node("Gemm", inputs, attributes | {"transB": int(transposed)}), scheme, accuracy_level=0)
    (product,) = [node for node in model.graph if node.domain == "com.microsoft"]
    meant = decode(product).astype(np.float64)
    expected = x @ meant.T + attributes.get("beta", 1.0) * added
    np.testing.assert_allclose(run(model, x=left)[0], expected, rtol=1e-4, atol=1e-4)
    alpha = attributes.get("alpha", 1.0)
    assert np.linalg.norm(meant / alpha - weight.T) / np.linalg.norm(weight) < 0.15
    assert model.graph.outputs[0].name == "y" and model.opset_imports["com.microsoft"] == 1
    assert "w" not in model.graph.initializers
    adds = bias is not None and attributes.get("beta") != 0.0
    assert [node.op_type for node in model.graph].count("Add") == adds


def test_readers_with_factors_of_their_own_get_forms_of_their_own() -> None:
    x, weight = free("x", [3, 64]), constant("w", normal(64, 64))
    first = ir.node("Gemm", [x, weight], {"alpha": 1.0}, name="first")
    second = ir.node("Gemm", [first.outputs[0], weight], {"alpha": 0.125}, name="second")
    second.outputs[0].name = "y"
    model = quantized(model_of([x], [first, second], [weight], [second.outputs[0]]), int4())
    one, eighth = (decode(node) for node in model.graph)
    np.testing.assert_allclose(eighth, one / 8, rtol=1e-6)


def test_float16_models_get_float16_scales() -> None:
    model = quantized(matmul(normal(64, 24).astype(np.float16)), int4(), accuracy_level=0)
    (node,) = model.graph
    assert stored(node, 2).dtype == np.float16
    (got,) = run(model, x=np.eye(64, dtype=np.float16))
    np.testing.assert_allclose(got, decode(node).T.astype(np.float16), rtol=2e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_level_4_only_rounds_the_inputs(bits: int) -> None:
    weight, x = normal(384, 96), normal(9, 384, seed=1)
    model = quantized(matmul(weight), int4() if bits == 4 else INT8)
    meant = x.astype(np.float64) @ decode(next(iter(model.graph))).T
    noise = run(model, x=x)[0] - meant
    assert 20 * np.log10(np.linalg.norm(meant) / np.linalg.norm(noise)) > 38


@pytest.mark.parametrize(
    ("columns", "asked", "chosen"), [(576, 128, 64), (100, 128, 128), (128, 128, 128), (48, 256, 64), (1000, 64, 64)]
)
def test_blocks_are_at_most_as_asked_and_cost_the_fewest_bytes(columns: int, asked: int, chosen: int) -> None:
    model = matmul(normal(columns, 8))
    outcome = quantize_node(model, node_of(model, "MatMul"), int4(asked), "rtn")
    node = node_of(model, "MatMulNBits")
    assert node.attributes["block_size"].value == chosen
    sizes = {size: -(-columns // size) * (size // 2 + 4) for size in (16, 32, 64, 128, 256) if size <= asked}
    assert outcome.nbytes == 8 * min(sizes.values()) == stored(node, 1).nbytes + stored(node, 2).nbytes
    assert (outcome.note is None) == (chosen == asked)


def test_outcome_counts_bytes_and_error() -> None:
    weight = normal(64, 24)
    model = matmul(weight)
    outcome = quantize_node(model, node_of(model, "MatMul"), int4(), "mse")
    assert outcome.nbytes == 24 * (32 + 2 * 4)
    error = decode(node_of(model, "MatMulNBits")).T.astype(np.float64) - weight
    assert outcome.rounding.sqnr_db == pytest.approx(
        10 * np.log10(np.sum(weight.astype(np.float64) ** 2) / np.sum(error**2))
    )
    model = matmul(weight)
    assert "per channel" in str(quantize_node(model, node_of(model, "MatMul"), INT8, "rtn").note)


@pytest.mark.parametrize("head", ["Transpose", "Gemm"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("scheme", [int4(), INT8, int4(symmetric=False), NF4], ids=["int4", "int8", "asym", "nf4"])
def test_a_tied_table_leaves_the_file_and_is_stored_once(head: str, order: int, scheme: Scheme) -> None:
    model = tied(head=head)
    ids = np.arange(40)
    before = run(model, ids=ids)[0]
    first, last = [node for node in model.graph if node.op_type != "Transpose"][::order]
    outcomes = [quantize_node(model, first, scheme, "rtn", accuracy_level=0)]
    assert "table" in model.graph.initializers, "its other reader needs it still"
    outcomes.append(quantize_node(model, last, scheme, "rtn", accuracy_level=0))
    assert "table" not in model.graph.initializers and "turn" not in [node.name for node in model.graph]
    values = [value.const_value for value in model.graph.initializers.values()]
    shapes = 24 if order == 1 else 16
    shared = scheme is not NF4
    assert sum(value.nbytes for value in values) == sum(each.nbytes for each in outcomes) + shared * shapes
    assert (outcomes[1].nbytes == 0) == shared
    lookup = node_of(model, "GatherBlockQuantized")
    product = node_of(model, "MatMulBnb4" if scheme is NF4 else "MatMulNBits")
    if shared:
        np.testing.assert_array_equal(decode(lookup), decode(product))
    else:
        assert "int4" in str(outcomes[0 if order == 1 else 1].note)
    (after,) = run(model, ids=ids)
    np.testing.assert_allclose(after, decode(lookup).astype(np.float64) @ decode(product).T, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 0.2


def test_the_runtime_folds_the_shape_of_shared_codes(tmp_path: Path) -> None:
    model = quantized(tied(), int4(64))
    assert "Reshape" in [node.op_type for node in model.graph]
    Session(ir.to_proto(model).SerializeToString(), threads=1, dump=tmp_path / "optimized.onnx")
    optimized = ir.load(tmp_path / "optimized.onnx").graph
    assert sorted(node.op_type for node in optimized) == ["GatherBlockQuantized", "MatMulNBits"]


def test_padded_blocks_are_not_shared() -> None:
    table, ids = constant("table", normal(40, 72)), free("ids", ["n"], ir.DataType.INT64)
    look_up = ir.node("Gather", [table, ids], name="embed")
    head = ir.node("Gemm", [look_up.outputs[0], table], {"transB": 1}, name="head")
    head.outputs[0].name, head.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    model = quantized(model_of([ids], [look_up, head], [table], [head.outputs[0]]), int4(64), accuracy_level=0)
    lookup, product = (node_of(model, name) for name in ("GatherBlockQuantized", "MatMulNBits"))
    assert stored(lookup, 0).shape == (40, 36) and stored(product, 1).shape[0] == 40
    np.testing.assert_array_equal(decode(lookup), decode(product))
    (got,) = run(model, ids=np.arange(40))
    np.testing.assert_allclose(got, decode(lookup).astype(np.float64) @ decode(product).T, rtol=1e-4, atol=1e-4)


def test_a_weight_that_must_stay_is_not_stored_twice() -> None:
    model = tied(shared_by_add=True)
    for node in model.graph:
        if node.op_type in ("Gather", "MatMul"):
            assert supports(node, int4()) == "its weight also serves other, which needs it as it is"


def test_tables_get_int4_where_nf4_is_asked_for() -> None:
    model = gather(normal(30, 64))
    outcome = quantize_node(model, node_of(model, "Gather"), NF4, "rtn")
    assert outcome.note == "int4 in blocks of 64: onnxruntime has no lookup in nf4"
    assert decode(node_of(model, "GatherBlockQuantized")).shape == (30, 64)
    embed, head = node_of(tied(), "Gather"), node_of(tied(), "MatMul")
    assert effective(embed, NF4) == int4(64) and effective(head, NF4) == NF4 and effective(embed, INT8) == INT8
    assert oldest_runtime(embed, NF4) == "1.23"


def test_equal_readers_share_one_form() -> None:
    x, weight = free("x", ["n", 64]), constant("w", normal(64, 64))
    first = ir.node("MatMul", [x, weight], name="first")
    second = ir.node("MatMul", [first.outputs[0], weight], name="second")
    second.outputs[0].name = "y"
    model = model_of([x], [first, second], [weight], [second.outputs[0]])
    outcomes = [quantize_node(model, node, int4(), "rtn") for node in list(model.graph)]
    assert [outcome.nbytes for outcome in outcomes] == [64 * (32 + 8), 0]
    assert len(model.graph.initializers) == 2
    run(model, x=normal(3, 64))


def test_nodes_of_a_subgraph() -> None:
    condition, x = free("condition", [], ir.DataType.BOOL), free("x", ["n", 64])
    branches = {}
    for name, seed in (("then_branch", 0), ("else_branch", 1)):
        weight = constant(f"w_{name}", normal(64, 32, seed=seed))
        node = ir.node("MatMul", [x, weight], name=name)
        node.outputs[0].name, node.outputs[0].type = f"out_{name}", ir.TensorType(ir.DataType.FLOAT)
        branches[name] = ir.Graph([], node.outputs, nodes=[node], initializers=[weight], name=name)
    choice = ir.node("If", [condition], branches, name="choice")
    choice.outputs[0].name = "y"
    model = model_of([condition, x], [choice], [], [choice.outputs[0]])
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    feeds = {"condition": np.array(True), "x": normal(3, 64)}
    before = run(model, **feeds)[0]
    for graph in branches.values():
        (node,) = graph
        assert supports(node, INT8) is None
        quantize_node(model, node, INT8, "rtn")
    assert all([node.op_type for node in graph] == ["MatMulNBits"] for graph in branches.values())
    np.testing.assert_allclose(run(model, **feeds)[0], before, atol=0.5)


@pytest.mark.parametrize(
    ("model", "scheme", "reason"),
    [
        (one_node("Conv", [free("x", [1, 3, 8, 8]), constant("w", normal(4, 3, 3, 3))]), INT8, "form of Conv exists"),
        (one_node("MatMul", [free("x", [2, 8]), free("w", [8, 8])]), INT8, "it has no constant weight"),
        (one_node("MatMul", [constant("w", normal(8, 8)), free("x", [8, 2])]), INT8, "the left factor"),
        (one_node("MatMul", [free("x", [2, 8]), constant("w", normal(8, 8).astype(float))]), INT8, "is double"),
        (one_node("MatMul", [free("x", [2, 8, 8]), constant("w", normal(2, 8, 8))]), INT8, "a matrix is needed"),
        (one_node("MatMul", [free("x", [8]), constant("w", normal(8, 8))]), INT8, "is a vector"),
        (one_node("Gather", [constant("w", normal(8, 8)), free("i", [2], ir.DataType.INT64)], {"axis": 1}), INT8, "1;"),
        (gather(normal(8, 9)), int4(), "odd length"),
        (matmul(normal(64, 8)), int4(24), "power of two, 16 or more; asked are 24"),
        (matmul(normal(64, 8)), int4(8), "power of two, 16 or more; asked are 8"),
        (matmul(normal(64, 8)), PRESETS["nf4-double"], "no double quantization"),
        (matmul(normal(64, 8)), PRESETS["int8-dynamic"], "weights alone"),
        (matmul(normal(64, 8)), PRESETS["fp16"], "weights alone"),
        (matmul(normal(64, 8)), Scheme(NumberFormat("int8")), "no int8 weights by tensor"),
    ],
)
def test_reasons(model: ir.Model, scheme: Scheme, reason: str) -> None:
    (node,) = model.graph
    assert reason in str(supports(node, scheme))
    with pytest.raises(ValueError, match=r"layer: "):
        quantize_node(model, node, scheme, "rtn")


def test_weights_that_a_caller_can_override_stay() -> None:
    weight = constant("w", normal(8, 8))
    model = one_node("MatMul", [free("x", [2, 8]), weight])
    model.graph.inputs.append(weight)
    assert supports(node_of(model, "MatMul"), INT8) == "it has no constant weight"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", [int4(), NF4], ids=["int4", "nf4"])
def test_weights_that_are_not_finite_are_refused(value: float, scheme: Scheme) -> None:
    weight = normal(64, 8)
    weight[3, 5] = value
    model = matmul(weight)
    with pytest.raises(InputError, match="w holds NaN or infinite values"):
        quantize_node(model, node_of(model, "MatMul"), scheme, "rtn")


def test_the_oldest_runtime_is_known_for_every_form() -> None:
    product, lookup = node_of(matmul(normal(8, 8)), "MatMul"), node_of(gather(normal(8, 8)), "Gather")
    assert [oldest_runtime(product, scheme) for scheme in (int4(), INT8, NF4)] == ["1.18", "1.22", "1.18"]
    assert {oldest_runtime(lookup, scheme) for scheme in (int4(), INT8)} == {"1.23"}


def test_decoding_refuses_what_is_not_ours() -> None:
    with pytest.raises(ValueError, match="not an n-bit operator"):
        decode(node_of(matmul(normal(8, 8)), "MatMul"))


def test_equal_work_gives_equal_bytes() -> None:
    proto = [ir.to_proto(quantized(tied(), int4(), "mse")).SerializeToString(deterministic=True) for _ in range(2)]
    assert proto[0] == proto[1]
    assert onnxruntime.__version__.encode() not in proto[0]


def test_energies_that_a_logarithm_is_taken_of_do_not_fall_below_zero(tmp_path: Path) -> None:
    """As in the front ends of speech models: with its inputs rounded, the product of filters is below zero at times."""
    centres, bins = np.linspace(0, 256, 80)[None, :], np.arange(257)[:, None]
    filters = np.maximum(0, 1 - np.abs(bins - centres) / 4).astype(np.float32) / 100
    nodes = [graphs.node("Mul", ["x", "x"], ["power"]), graphs.node("MatMul", ["power", "filters"], ["mel"])]
    nodes += [graphs.node("Add", ["mel", "guard"], ["guarded"]), graphs.node("Log", ["guarded"], ["log"])]
    nodes += [graphs.node("Transpose", ["log"], ["y"], perm=[0, 2, 1])]
    constants = {"filters": filters, "guard": np.float32(6e-8)}
    proto = graphs.model(nodes, {"x": [1, "frames", 257]}, {"y": None}, constants)
    onnx.save(proto, tmp_path / "m.onnx")

    convert(tmp_path / "m.onnx", tmp_path / "q.onnx", scheme="int8", allow_larger=True)

    x = np.linspace(30, 0, 257, dtype=np.float32) * normal(1, 200, 257)
    x[..., 128:] *= 1e-4
    assert "MatMulNBits" in [each.op_type for each in onnx.load(tmp_path / "q.onnx").graph.node]
    got = onnxruntime.InferenceSession(tmp_path / "q.onnx").run(None, {"x": x})[0]
    assert np.isfinite(got).all()
