"""Codes carried into n-bit nodes: equal by a naive reader of the nodes, and what nodes cannot hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from support.artifacts import codes_of, decoded, logits
from support.quantized_models import Artifacts, changed, groups
from torch import Tensor

from quantcli import convert, evaluate
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.quantized import open_quantized
from quantcli.conversion.onnx.repack import CheckpointCodes
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError, QuantcliError, UsageError, VerificationError
from quantcli.models import hugging_face
from quantcli.models.session import Session
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.prepare import prepare
from quantcli.onnx.graph.save import save_graph
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.rewrite.transform import transform
from quantcli.planning.recipe import Recipe, validate

pytestmark = pytest.mark.usefixtures("no_runtime_check")

ONNX = Recipe(format="onnx")
CHANNEL4 = {"weights": {"dtype": "int4", "granularity": "channel"}}


def stored(node: ir.Node, index: int) -> np.ndarray:
    return node.inputs[index].const_value.numpy()


def read(node: ir.Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes ``[N, K]``, and each one's zero point and scale, as onnxruntime's documentation has them."""
    rows, columns, bits, size = (node.attributes[name].value for name in ("N", "K", "bits", "block_size"))
    blocks = -(-columns // size)

    def unpacked(raw: np.ndarray) -> np.ndarray:
        if bits == 8:
            return raw
        return np.stack([raw & 15, raw >> 4], -1).reshape(rows, -1)

    def each(values: np.ndarray) -> np.ndarray:
        return values[:, :blocks].repeat(size, 1)[:, :columns]

    zeros = np.full((rows, blocks), 1 << (bits - 1))
    if len(node.inputs) > 3:
        zeros = unpacked(stored(node, 3).reshape(rows, -1))
    assert stored(node, 2).dtype == np.float32
    codes = unpacked(stored(node, 1).reshape(rows, -1))[:, :columns]
    return codes, each(zeros), each(stored(node, 2).reshape(rows, blocks))


def require_codes(node: ir.Node, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
    found = read(node)
    size = codes.shape[1] // zeros.shape[1]
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], zeros.expand(len(codes), -1).repeat_interleave(size, 1))
    np.testing.assert_array_equal(found[2], scales.expand(len(codes), -1).repeat_interleave(size, 1))


def layers(place: Path, recipe: dict[str, Any], columns: int, **weights: Tensor) -> Path:
    """A folder of two quantized layers, which no library knows as a model."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(24, columns, generator=generator) for name in ("first", "second")}
    place.mkdir()
    save_file({f"{name}.weight": part for name, part in (tensors | weights).items()}, place / "model.safetensors")
    (place / "config.json").write_text("{}")
    convert(place, place.with_name("artifact"), recipe=validate(recipe, "recipe"))
    return place.with_name("artifact")


def given(folder: Path, recipe: Recipe = ONNX) -> CheckpointCodes:
    checkpoint = open_checkpoint(folder)
    return CheckpointCodes(checkpoint, open_quantized(checkpoint), recipe)


def graph(weights: dict[str, np.ndarray], *, gemm: bool = False) -> ir.Model:
    """A product with each matrix ``[outputs, inputs]``, stored under its name the way a MatMul, or a Gemm, has it."""
    columns = next(iter(weights.values())).shape[1]
    x = ir.Value(name="x", shape=ir.Shape(["rows", columns]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, constants = [], []
    for name, values in weights.items():
        held = values if gemm else np.ascontiguousarray(values.T)
        weight = ir.Value(
            name=name, shape=ir.Shape(held.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(held)
        )
        attributes = {"transB": 1} if gemm else {}
        nodes.append(ir.node("Gemm" if gemm else "MatMul", [x, weight], attributes, name=f"{name}/product"))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = f"{name}/out", ir.TensorType(ir.DataType.FLOAT)
        constants.append(weight)
    outputs = [node.outputs[0] for node in nodes]
    held_by = ir.Graph([x], outputs, nodes=nodes, initializers=constants, opset_imports={"": 17}, name="graph")
    return ir.Model(held_by, ir_version=8)


def values_of(folder: Path) -> dict[str, np.ndarray]:
    """Decoded weights by name, float32."""
    found = {}
    for module, (codes, zeros, scales) in codes_of(folder).items():
        size = codes.shape[1] // zeros.shape[1]
        step = scales.repeat_interleave(size, 1)
        found[f"{module}.weight"] = ((codes - zeros.repeat_interleave(size, 1)) * step).numpy()
    return found


@pytest.mark.parametrize("gemm", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize(
    ("recipe", "columns", "block"),
    [
        ({"scheme": groups("int4", 16)}, 96, 16),
        ({"scheme": groups("int4", 32, symmetric=False)}, 96, 32),
        ({"scheme": groups("int8", 64, symmetric=False)}, 192, 64),
        ({"scheme": groups("int4", 96)}, 192, 32),
        ({"scheme": groups("int4", 512, symmetric=False)}, 1024, 256),
        ({"scheme": "int8"}, 256, 128),
        ({"scheme": "int8"}, 100, 128),
        ({"scheme": CHANNEL4}, 40, 64),
        ({"scheme": {"weights": {"dtype": "int8"}}}, 64, 64),
        ({"scheme": groups("int4", 32), "format": "gptq"}, 96, 32),
        ({"scheme": groups("int4", 32, symmetric=False), "format": "gptq"}, 96, 32),
        ({"scheme": "int8", "format": "gptq"}, 128, 128),
        ({"scheme": groups("int4", 32, symmetric=False), "format": "awq"}, 96, 32),
    ],
    ids=str,
)
def test_nodes_hold_equal_codes_and_scales(
    tmp_path: Path, recipe: dict[str, Any], columns: int, block: int, gemm: bool
) -> None:
    folder = layers(tmp_path / "layers", recipe, columns)
    codes, model = given(folder), graph(values_of(folder), gemm=gemm)
    plan = codes.plan(model, tmp_path)
    outcomes = transform(model, plan, Evidence(codes=codes))
    assert [outcome.sqnr_db for outcome in outcomes] == [None, None]
    nodes = {node.name.split(".")[0]: node for node in model.graph}
    assert {node.op_type for node in model.graph} == {"MatMulNBits"} and nodes.keys() == {"first", "second"}
    for module, parts in codes_of(folder).items():
        assert nodes[module].attributes["block_size"].value == block
        require_codes(nodes[module], *parts)
    repeated = block < columns // next(iter(codes_of(folder).values()))[1].shape[1]
    assert bool(plan.warnings) == repeated and all("repeated" in warning for warning in plan.warnings)
    x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    session = Session(ir.to_proto(model).SerializeToString(), threads=1)
    for found, weight in zip(session.run({"x": x}).values(), values_of(folder).values(), strict=True):
        wanted = x.astype(np.float64) @ weight.T
        # The kernel rounds the inputs to eight bits.
        assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


def test_other_names_and_other_constants(tmp_path: Path) -> None:
    """What belongs together is told by values; what was not quantized stays."""
    folder = layers(tmp_path / "layers", {"scheme": groups("int4", 32)}, 64)
    weights = values_of(folder)
    other = np.ones((24, 64), np.float32)
    model = graph(
        {"encoder.first.weight": weights["first.weight"], "renamed": weights["second.weight"], "other": other}
    )
    codes = given(folder)
    plan = codes.plan(model, tmp_path)
    assert [node.mode for node in plan.nodes] == ["weights", "weights", "float"]
    assert plan.nodes[2].reason == "not quantized before either"
    transform(model, plan, Evidence(codes=codes))
    require_codes(model.graph.node("renamed/product"), *codes_of(folder)["second"])
    np.testing.assert_array_equal(stored(model.graph.node("other/product"), 1), other.T)


def test_what_follows_a_product_is_not_folded_into_its_matrix(tmp_path: Path) -> None:
    folder = layers(tmp_path / "layers", {"scheme": groups("int4", 32)}, 64)
    model = graph(values_of(folder), gemm=True)
    factor = ir.Value(name="factor", const_value=ir.tensor(np.array(0.3, np.float32)))
    model.graph.register_initializer(factor)
    scaled = ir.node("Mul", [model.graph.outputs[0], factor], name="scaled")
    scaled.outputs[0].name, scaled.outputs[0].type = "scaled", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(scaled)
    model.graph.outputs[0] = scaled.outputs[0]
    save_graph(model, tmp_path / "model.onnx")
    codes, prepared = given(folder), prepare(open_onnx(tmp_path / "model.onnx"), fold=False)
    assert [node.mode for node in codes.plan(prepared, tmp_path).nodes] == ["weights", "weights"]
    with pytest.raises(UsageError, match="its export holds other values"):
        given(folder).plan(prepare(open_onnx(tmp_path / "model.onnx")), tmp_path)


def test_a_weight_that_is_not_exported_is_told(tmp_path: Path) -> None:
    folder = layers(tmp_path / "layers", {"scheme": groups("int4", 32)}, 64)
    plan = given(folder).plan(graph({"first.weight": values_of(folder)["first.weight"]}), tmp_path)
    assert plan.warnings == ("Quantized, but no part of the export: second.weight.",)


def test_other_values_under_the_same_name(tmp_path: Path) -> None:
    folder = layers(tmp_path / "layers", {"scheme": groups("int4", 32)}, 64)
    weights = values_of(folder)
    weights["second.weight"][3, 5] *= 1.0001
    with pytest.raises(UsageError, match=r"second\.weight cannot go to ONNX with equal codes: its export holds other"):
        given(folder).plan(graph(weights), tmp_path)


def test_codes_are_compared_with_the_matrix_they_replace(tmp_path: Path) -> None:
    folder = layers(tmp_path / "layers", {"scheme": groups("int4", 32)}, 64)
    weights = values_of(folder)
    codes, model = given(folder), graph(weights)
    plan = codes.plan(model, tmp_path)
    swapped = [replace(node, info=other.info) for node, other in zip(plan.nodes, reversed(plan.nodes), strict=True)]
    with pytest.raises(VerificationError, match=r"codes of second\.weight do not stand for"):
        transform(model, replace(plan, nodes=tuple(swapped)), Evidence(codes=codes))
    assert isinstance(plan.nodes[0].info, TensorInfo)


def test_a_weight_that_others_need_as_it_is(tmp_path: Path) -> None:
    folder = layers(tmp_path / "layers", {"scheme": groups("int4", 32)}, 64)
    model = graph(values_of(folder))
    held = model.graph.initializers["first.weight"]
    model.graph.append(ir.node("Neg", [held], name="other"))
    with pytest.raises(UsageError, match="its weight also serves other, which needs it as it is"):
        given(folder).plan(model, tmp_path)


@pytest.mark.parametrize(
    ("kind", "model", "more", "reason"),
    [
        ("int8-dynamic", "llama", {}, "its inputs are quantized as well"),
        ("nf4", "llama", {}, "it is nf4, and MatMulNBits holds integers"),
        ("int4", "llama", {"scheme": groups("int4", 8)}, "no block of 16 columns or more divides its groups of 8"),
        ("int4", "mixtral", {}, "experts are fused when transformers loads them"),
    ],
)
def test_what_nodes_cannot_hold_is_refused_by_name(
    artifact: Artifacts, tmp_path: Path, kind: str, model: str, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=f"weight cannot go to ONNX with equal codes: {reason}"):
        convert(artifact(kind, model, **more), tmp_path / "out.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wish", "error", "reason"),
    [
        ({"scheme": "int8"}, InputError, "already quantized"),
        ({"scheme": "int8-static"}, InputError, "already quantized"),
        ({"algorithm": "gptq"}, UsageError, "'algorithm' would quantize it anew"),
        ({"rest": "fp16"}, UsageError, "'rest' would"),
        ({"target": "vllm"}, UsageError, "vllm does not load ONNX"),
    ],
)
def test_wishes_that_would_quantize_anew(
    artifact: Artifacts, tmp_path: Path, wish: dict[str, Any], error: type[QuantcliError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        convert(artifact("gptq"), tmp_path / "out.onnx", format="onnx", **wish)
    assert not list(tmp_path.iterdir())


def test_damage_is_found_before_the_export(artifact: Artifacts, tmp_path: Path) -> None:
    source = changed(artifact("gptq"), tmp_path / "s", lambda parts: parts.pop("model.layers.0.mlp.up_proj.scales"))
    with pytest.raises(InputError, match=r"up_proj\.qweight lacks its qzeros or scales"):
        convert(source, tmp_path / "out.onnx", format="onnx")


def require_carried(folder: Path, path: Path) -> None:
    """Every coded weight but the pooler's, which is not exported, is in one node."""
    carried = {module: parts for module, parts in codes_of(folder).items() if "pooler" not in module}
    nodes = {node.name.split("/")[0]: node for node in open_onnx(path).ir.graph if node.op_type == "MatMulNBits"}
    assert nodes.keys() == carried.keys() and len(nodes) >= 12
    for module, parts in carried.items():
        require_codes(nodes[module], *parts)


def test_a_checkpoint_becomes_an_onnx_file(artifact: Artifacts, tmp_path: Path) -> None:
    source = artifact("int4 asymmetric", "bert")
    report = convert(source, tmp_path / "out.onnx", format="onnx")
    require_carried(source, tmp_path / "out.onnx")
    found = open_onnx(tmp_path / "out.onnx").manifest.to_json()
    assert found["source"]["format"] == "compressed-tensors"
    assert found["source"]["sha256"] == open_checkpoint(source).sha256()
    assert found["layers"]["encoder.layer.0.attention.self.query.weight"]["algorithm"] == "mse"
    assert report.models[1].scheme == "int4"
    assert report.warnings == ["Quantized, but no part of the export: pooler.dense.weight."]
    again = convert(tmp_path / "out.onnx", tmp_path / "again.onnx", scheme="int8")
    assert "quantized in part already (n-bit); what is quantized stays" in again.warnings[0]
    require_carried(source, tmp_path / "again.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "tied"])
@pytest.mark.parametrize("kind", ["int4", "int8", "int8 asymmetric", "gptq asymmetric", "awq"])
def test_language_models(artifact: Artifacts, tmp_path: Path, kind: str, model: str) -> None:
    source = artifact(kind, model)
    ids = np.arange(48).reshape(4, 12)
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    report = convert(source, tmp_path / "out.onnx", format="onnx", data=tmp_path / "data.npz")
    require_carried(source, tmp_path / "out.onnx")
    assert report.models[1].metrics["output_sqnr_db"] > 30
    session = Session(tmp_path / "out.onnx", threads=1)
    (found,) = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)}).values()
    wanted = logits(hugging_face.load_model(source, causal=True, decoded=True)).numpy()
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    evaluated = evaluate(source, [tmp_path / "out.onnx"], data=tmp_path / "data.npz", task="fidelity")
    assert evaluated.models[1].metrics["sqnr_db"] > 25


@pytest.mark.slow
def test_values_to_onnx(artifact: Artifacts, tmp_path: Path) -> None:
    source = artifact("gptq asymmetric")
    convert(source, tmp_path / "out.onnx", format="onnx", scheme="fp16")
    graph = open_onnx(tmp_path / "out.onnx")
    (name,) = [name for name in graph.ir.graph.initializers if "layers.0.mlp.up_proj" in name]
    held = graph.ir.graph.initializers[name].const_value.numpy()
    wanted = decoded(source)["model.layers.0.mlp.up_proj.weight"].half().numpy()
    np.testing.assert_array_equal(held, wanted.T if held.shape != wanted.shape else wanted)
    assert json.loads(graph.ir.metadata_props["quantcli"])["source"]["format"] == "gptq"
