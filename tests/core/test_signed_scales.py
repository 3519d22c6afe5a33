"""Groups of four bits whose scale is negative: in arithmetic, in every container, and in what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.artifacts import codes_of, decoded, loaded, tensors_of
from support.graphs import model, node, normal, with_accuracy_level
from torch import Tensor

from quantcli import convert
from quantcli.algorithms import awq, gptq, mse, rtn
from quantcli.core import numerics
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.core.tensors import QuantizedTensor
from quantcli.models.session import Session
from quantcli.planning.recipe import validate

SIGNED = NumberFormat("int4", Granularity("group", 32))
SCALE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("no_runtime_check")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
def test_storage_rounds_magnitudes_and_keeps_signs(dtype: torch.dtype) -> None:
    scale = torch.tensor([1e-3, -1e-3, 0.3333333, -0.3333333, 1e-12, -1e-12, 1e-45, -1e-45])
    stored = numerics.stored_scale(scale, dtype)
    assert torch.equal(stored.sign(), scale.sign())
    assert torch.equal(stored.abs()[::2], stored.abs()[1::2])
    assert torch.equal(stored, stored.to(dtype).float()) and bool((stored != 0).all())
    big = scale.abs() > 1e-5
    assert torch.equal(stored[big], scale[big].to(dtype).float())


@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
def test_a_negative_range_turns_the_codes_round(dtype: torch.dtype) -> None:
    values = random(16, 1, 32)
    high = values.abs().amax(-1)
    plain, _ = numerics.choose_qparams(None, high, SIGNED, dtype)
    turned, zero_point = numerics.choose_qparams(None, -high, SIGNED, dtype)
    assert zero_point is None and torch.equal(turned, -plain)
    codes = numerics.quantize(values, turned, None, SIGNED)
    for value, code, step in zip(values.flatten(0, 1), codes.flatten(0, 1), turned.flatten(), strict=True):
        exact = value.double() / step.double()
        nearest = exact.round().clamp(-8, 7)
        # float32's quotient may fall on the other side of the middle.
        assert bool(((code == nearest) | ((exact - exact.floor() - 0.5).abs() < 1e-5)).all())
    restored = numerics.dequantize(codes, turned, None, SIGNED)
    torch.testing.assert_close(restored, codes.float() * turned.unsqueeze(-1), rtol=0, atol=0)
    assert bool(((restored - values).abs() <= 0.56 * high.unsqueeze(-1) / 7.5).all())


def squared(weight: Tensor, tensor: QuantizedTensor) -> Tensor:
    difference = numerics.decoded(tensor).double() - weight.double()
    return numerics.in_groups(difference, SIGNED).abs().pow(2).sum(-1)


@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
def test_no_group_does_worse_than_rounded_to_nearest(dtype: torch.dtype) -> None:
    weight = random(64, 256)
    nearest, searched = (module.run(weight, SIGNED, dtype) for module in (rtn, mse))
    assert bool((squared(weight, searched) <= squared(weight, nearest) * (1 + 1e-6)).all())
    assert 0.3 < float((searched.scale < 0).float().mean()) < 0.7 and bool((nearest.scale > 0).all())


def test_awq_and_gptq_take_signed_scales() -> None:
    weight, inputs = random(32, 64), random(200, 64, seed=1) @ (torch.eye(64) + 0.3 * random(64, 64, seed=2))
    gram = inputs.T @ inputs

    def output_error(tensor: QuantizedTensor) -> float:
        return float(((numerics.decoded(tensor) - weight) @ inputs.T).double().square().sum())

    plain = output_error(rtn.run(weight, SIGNED, torch.float16))
    clipped = awq.run(weight, SIGNED, torch.float16, gram=gram)
    solved = gptq.run(weight, SIGNED, torch.float16, hessian=gram).tensor
    groups = numerics.in_groups(weight, SIGNED)
    signs = torch.where(groups.amax(-1) > -groups.amin(-1), -1.0, 1.0)
    for tensor in (clipped, solved):
        assert torch.equal(tensor.scale.sign(), signs)
        assert torch.equal(tensor.scale, tensor.scale.half().float())
        assert output_error(tensor) < plain


CONTAINERS = [
    (None, torch.float32, "keep"), (None, torch.bfloat16, "bf16"), (None, torch.float16, "fp16"),
    ("gptq", torch.float16, None), ("awq", torch.float16, None),
]  # fmt: skip


@pytest.mark.parametrize(("container", "dtype", "rest"), CONTAINERS)
def test_every_container_keeps_the_sign(
    models: Path, tmp_path: Path, container: str | None, dtype: torch.dtype, rest: str | None
) -> None:
    wishes: dict[str, Any] = {"scheme": "int4", "group_size": 32, "algorithm": "mse", "format": container}
    recipe = validate({key: value for key, value in (wishes | {"rest": rest}).items() if value}, "test")
    convert(models / "llama", tmp_path / "out", recipe=recipe)
    originals, restored = tensors_of(models / "llama"), decoded(tmp_path / "out")
    found = codes_of(tmp_path / "out")
    assert len(found) == 14
    negative = 0
    for name, (codes, zeros, scales) in found.items():
        meant = mse.run(originals[f"{name}.weight"], SIGNED, dtype)
        assert torch.equal(scales, meant.scale)
        assert torch.equal(codes - zeros.repeat_interleave(32, 1), meant.codes.float())
        # And so the library of that container reads it.
        wanted = numerics.decoded(meant)
        assert torch.equal(restored[f"{name}.weight"].float(), wanted.to(restored[f"{name}.weight"].dtype).float())
        negative += int((scales < 0).sum())
    assert negative > 1000


def test_transformers_computes_with_them(models: Path, tmp_path: Path) -> None:
    recipe = validate({"scheme": "int4", "group_size": 32, "algorithm": "mse", "rest": "keep"}, "test")
    convert(models / "llama", tmp_path / "out", recipe=recipe)
    plain = loaded(models / "llama", "llama", dtype=torch.float32)
    plain.load_state_dict(decoded(tmp_path / "out"), strict=False)
    ids = torch.arange(48).reshape(4, 12)
    with torch.no_grad():
        wanted, found = plain(ids)[0], loaded(tmp_path / "out", "llama", dtype=torch.float32)(ids)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_onnxruntime_computes_with_them(tmp_path: Path, half: bool) -> None:
    """MatMulNBits and GatherBlockQuantized both multiply by the scale as it is."""
    kind = np.float16 if half else np.float32
    weight, table = normal(64, 96).astype(kind), normal(200, 64, seed=1).astype(kind)
    nodes = [node("Gather", ["table", "ids"], ["e"]), node("MatMul", ["e", "w"], ["y"], name="product")]
    proto = model(nodes, {}, {}, {"w": weight, "table": table})
    number = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    proto.graph.input.append(onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("y", number, ["n", 96]))
    onnx.save(proto, tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int4", group_size=32, algorithm="mse")
    written = onnx.load(tmp_path / "o.onnx")
    scales = [numpy_helper.to_array(each) for each in written.graph.initializer if each.name.endswith("_scales")]
    assert len(scales) == 2 and all((each < 0).any() and (each > 0).any() for each in scales)
    with_accuracy_level(written, 1)
    dtype = torch.float16 if half else torch.float32
    matrix, rows = (
        numerics.decoded(mse.run(torch.from_numpy(each.astype(np.float32)), SIGNED, dtype)).numpy()
        for each in (np.ascontiguousarray(weight.T), table)
    )
    ids = np.arange(0, 200, 7)
    (found,) = Session(written.SerializeToString(), threads=1).run({"ids": ids}).values()
    np.testing.assert_allclose(found, rows[ids] @ matrix.T, rtol=0, atol=0.05 if half else 1e-4)
