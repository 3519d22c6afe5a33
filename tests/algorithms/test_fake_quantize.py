"""Fake quantization in training: gradients against naive ones and finite differences, and what is learned as stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from support.graphs import model, node
from support.oracles import pair_sum
from torch import Tensor

from quantcli.algorithms import mse, qat, rtn
from quantcli.algorithms.fake_quantize import LearnedRange, LearnedValues, LearnedWeight, dynamic_range, fake_quantize
from quantcli.core import numerics
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.core.tensors import QuantizedTensor
from quantcli.onnx.weights.integer import Origin
from quantcli.training.optimization import FACTOR_RANGE, clamp_factors

GROUP, CHANNEL = Granularity("group", 16), Granularity("channel")
SIGNED = NumberFormat("int4", GROUP)
FORMATS = [
    SIGNED,
    NumberFormat("int4", GROUP, symmetric=False),
    NumberFormat("int4", CHANNEL, narrow=True),
    NumberFormat("int8", GROUP),
    NumberFormat("int8", CHANNEL, symmetric=False),
    NumberFormat("int8", CHANNEL, narrow=True),
    NumberFormat("int8"),
]
SCALE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS, COLUMNS = 6, 32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(number_format: NumberFormat, dtype: torch.dtype = torch.float32) -> tuple[Tensor, QuantizedTensor]:
    """A weight and its codes, chosen with a clipped range so that some values are cut off."""
    weight = random(ROWS, COLUMNS)
    tensor = (mse if number_format.bits == 4 else rtn).run(weight, number_format, dtype)
    tensor.scale = (tensor.scale * 0.7).to(dtype).float()
    groups = numerics.in_groups(weight, number_format)
    codes = numerics.quantize(groups, tensor.scale, tensor.zero_point, number_format)
    tensor.codes = codes.reshape(weight.shape)
    return weight, tensor


def doubles(values: Tensor) -> np.ndarray:
    return np.asarray(values.detach().double().numpy())


class Naive:
    """One grid in float64: what is rounded where, and what is cut off, with nothing but numpy."""

    def __init__(self, values: Tensor, scale: Tensor, zero_point: Tensor | None, number_format: NumberFormat) -> None:
        self.values, self.scale = doubles(values), doubles(scale)[..., None]
        zero = 0.0 if zero_point is None else doubles(zero_point)[..., None]
        bits = number_format.bits
        low, high = -(2 ** (bits - 1)) + number_format.narrow, 2 ** (bits - 1) - 1
        exact = self.values / self.scale
        self.steps = np.clip(np.round(exact) + zero, low, high) - zero
        self.inside = np.abs(exact - self.steps) <= 0.5
        self.residual = np.round(exact) - exact

    def rounded(self) -> np.ndarray:
        return np.asarray(self.steps * self.scale)

    def by_scale(self) -> np.ndarray:
        """LSQ, equation 3, of each value."""
        return np.where(self.inside, self.residual, self.steps)

    def surrogate(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """What gradients are taken of: what rounding adds, counted in steps, is fixed; so is the code cut off to."""
        return np.where(self.inside, values + self.residual * scale, self.steps * scale)


def fake(tensor: QuantizedTensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, scale, the weighted sum of the rounded values, and the weights of that sum."""
    values = numerics.in_groups(weight, tensor.number_format).clone().requires_grad_()
    scale = tensor.scale.clone().requires_grad_()
    rounded = fake_quantize(values, scale, tensor.number_format, zero_point=tensor.zero_point)
    weights = random(*values.shape, seed=5)
    return values, scale, rounded, weights


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_gradients_are_those_of_learned_step_sizes(number_format: NumberFormat) -> None:
    weight, tensor = quantized(number_format)
    values, scale, rounded, weights = fake(tensor, weight)
    (rounded * weights).sum().backward()  # type: ignore[no-untyped-call]
    naive = Naive(values, scale, tensor.zero_point, number_format)
    assert 0.3 < naive.inside.mean() < 1
    np.testing.assert_allclose(doubles(rounded), naive.rounded(), rtol=1e-6)
    assert values.grad is not None and scale.grad is not None
    np.testing.assert_array_equal(doubles(values.grad), doubles(weights) * naive.inside)
    np.testing.assert_allclose(doubles(scale.grad), (doubles(weights) * naive.by_scale()).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_gradients_equal_finite_differences(number_format: NumberFormat) -> None:
    weight, tensor = quantized(number_format)
    values, scale, rounded, weights = fake(tensor, weight)
    (rounded * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None and scale.grad is not None
    naive, small = Naive(values, scale, tensor.zero_point, number_format), 1e-4
    np.testing.assert_allclose(doubles(rounded), naive.surrogate(naive.values, naive.scale), rtol=1e-6, atol=1e-7)

    def slopes(up: np.ndarray, down: np.ndarray) -> np.ndarray:
        return np.asarray(doubles(weights) * (up - down) / (2 * small))

    by_scale = slopes(*(naive.surrogate(naive.values, naive.scale + change) for change in (small, -small)))
    by_value = slopes(*(naive.surrogate(naive.values + change, naive.scale) for change in (small, -small)))
    np.testing.assert_allclose(doubles(scale.grad), by_scale.sum(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(doubles(values.grad), by_value, rtol=1e-4, atol=1e-6)


def test_groups_have_scales_of_both_signs_and_the_gradients_follow() -> None:
    weight, tensor = quantized(SIGNED)
    assert bool((tensor.scale < 0).any()) and bool((tensor.scale > 0).any())
    # Mirrored weights and scales have the same codes, the same slopes by values, and slopes by scales as they were.
    values, scale, rounded, weights = fake(tensor, weight)
    (rounded * weights).sum().backward()  # type: ignore[no-untyped-call]
    mirrored, negated = (-values.detach()).requires_grad_(), (-scale.detach()).requires_grad_()
    again = fake_quantize(mirrored, negated, SIGNED)
    assert torch.equal(again, -rounded)
    (again * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(mirrored.grad, values.grad)  # type: ignore[arg-type]
    assert torch.equal(negated.grad, scale.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_what_is_in_steps_is_carried_by_its_scale(number_format: NumberFormat) -> None:
    """Codes do not depend on the scale then, and so its slope is exactly theirs: finite differences in float64."""
    weight, tensor = quantized(number_format)
    weights = numerics.in_groups(random(ROWS, COLUMNS, seed=5), number_format)
    low, high = numerics.code_range(number_format)
    zero = 0.0 if tensor.zero_point is None else tensor.zero_point.double().unsqueeze(-1)
    # Some beyond the codes there are.
    values = (1.3 * numerics.in_groups(weight, number_format) / tensor.scale.unsqueeze(-1)).requires_grad_()
    scale = tensor.scale.clone().requires_grad_()
    rounded = fake_quantize(values, scale, number_format, zero_point=tensor.zero_point, in_steps=True)
    (rounded * weights).sum().backward()  # type: ignore[no-untyped-call]

    def loss(scales: Tensor) -> Tensor:
        steps = (values.detach().double().round() + zero).clamp(low, high) - zero
        return (steps * scales.unsqueeze(-1) * weights.double()).sum(-1)

    exact = tensor.scale.double()
    torch.testing.assert_close((rounded * weights).sum(-1).double(), loss(exact), rtol=1e-4, atol=1e-4)
    slope = (loss(exact * 1.001) - loss(exact * 0.999)) / (exact * 0.002)
    assert scale.grad is not None and values.grad is not None
    torch.testing.assert_close(scale.grad.double(), slope, rtol=1e-4, atol=1e-3)
    codes = values.detach().double().round() + zero
    inside = (codes >= low) & (codes <= high)
    assert not bool(inside.all())
    torch.testing.assert_close(
        values.grad.double(), weights.double() * exact.unsqueeze(-1) * inside, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_training_starts_in_the_middle_of_each_codes_cell(
    number_format: NumberFormat, scale_dtype: torch.dtype
) -> None:
    _, tensor = quantized(number_format, scale_dtype)
    # Codes that are not the nearest ones, as gptq chooses them.
    low, high = numerics.code_range(number_format)
    moved = torch.randint(-1, 2, tensor.codes.shape, generator=torch.Generator().manual_seed(3))
    tensor.codes = (tensor.codes + moved).clamp(low, high).to(torch.int8)
    learned = LearnedWeight(tensor, scale_dtype)
    assert torch.equal(learned.tensor().codes, tensor.codes)
    assert torch.equal(learned.tensor().scale, tensor.scale)
    assert torch.equal(learned.values(), numerics.decoded(tensor))
    steps = numerics.in_groups(numerics.decoded(tensor), number_format) / tensor.scale.unsqueeze(-1)
    torch.testing.assert_close(learned.units.detach(), steps, rtol=1e-5, atol=1e-5)


def disturb(learned: LearnedWeight, seed: int) -> None:
    """Move weights and scales far and at random, as training may."""
    with torch.no_grad():
        learned.units += 3 * random(*learned.units.shape, seed=seed)
        factor = learned.scales.factor
        factor *= torch.exp(0.4 * random(*factor.shape, seed=seed + 1))
        clamp_factors([factor])


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_values_are_always_what_codes_and_scales_stand_for(
    number_format: NumberFormat, scale_dtype: torch.dtype
) -> None:
    _, tensor = quantized(number_format, scale_dtype)
    learned = LearnedWeight(tensor, scale_dtype)
    for seed in range(20):
        disturb(learned, seed)
        found = learned.tensor()
        assert torch.equal(learned.values(), numerics.decoded(found))
        assert torch.equal(found.scale, found.scale.to(scale_dtype).float())
        low, high = numerics.code_range(number_format)
        assert low <= int(found.codes.min()) and int(found.codes.max()) <= high
    assert not torch.equal(found.codes, tensor.codes) and not torch.equal(found.scale, tensor.scale)
    assert torch.equal(found.scale.sign(), tensor.scale.sign())
    assert found.zero_point is tensor.zero_point or torch.equal(found.zero_point, tensor.zero_point)  # type: ignore[arg-type]


def test_factors_do_not_run_away() -> None:
    factor = torch.tensor([-3.0, 0.1, 1.0, 9.0])
    clamp_factors([factor])
    assert factor.tolist() == [FACTOR_RANGE[0], FACTOR_RANGE[0], 1.0, FACTOR_RANGE[1]]


@pytest.mark.parametrize(("pairs", "shape"), [("matrix", (6, 9)), ("filter", (4, 3, 3, 3))])
def test_codes_that_a_kernel_could_not_multiply_exactly_are_never_chosen(pairs: str, shape: tuple[int, ...]) -> None:
    number_format = NumberFormat("int8", CHANNEL, narrow=True)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    weight = random(rows, columns).abs()
    origin = Origin("w", number_format, 0, shape, pairs)
    tensor = rtn.run(weight, number_format, torch.float32)
    tensor.scale *= 2
    tensor.codes = numerics.quantize(weight[:, None], tensor.scale, None, number_format)[:, 0]
    learned = LearnedWeight(tensor, torch.float32, origin.restricted)
    assert torch.equal(learned.tensor().codes, tensor.codes)
    loose = LearnedWeight(tensor, torch.float32)
    for seed in range(4):
        for each in (learned, loose):
            with torch.no_grad():
                each.units += 40 * random(*each.units.shape, seed=seed).abs()
        assert torch.equal(learned.values(), numerics.decoded(learned.tensor()))
        assert pair_sum(learned.tensor(), pairs, shape) <= 128
    assert pair_sum(loose.tensor(), pairs, shape) > 200
    # A code that was drawn in counts as cut off: its weight has no slope, its scale that of the code.
    learned.values().sum().backward()  # type: ignore[no-untyped-call]
    gradient, codes = learned.units.grad, learned.tensor().codes
    assert gradient is not None
    drawn_in = (learned.units.detach().reshape(rows, columns).round() - codes).abs() > 0
    assert bool(drawn_in.any())
    assert torch.equal(gradient.reshape(rows, columns) == 0, drawn_in)


def session(nodes: list, inputs: dict, outputs: list[str], constants: dict[str, np.ndarray]) -> Callable[..., list]:
    """Run some ONNX nodes on one input ``x``."""
    proto = model(nodes, inputs, {}, constants)
    kinds = {"y": TensorProto.FLOAT, "q": TensorProto.UINT8, "s": TensorProto.FLOAT, "z": TensorProto.UINT8}
    proto.graph.output.extend(helper.make_tensor_value_info(name, kinds[name], None) for name in outputs)
    run = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: run.run(outputs, {"x": x})  # type: ignore[no-any-return]


ACTIVATION = NumberFormat("int8", symmetric=False)


@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
@pytest.mark.parametrize("scale", [0.013, 1.0])
def test_a_learned_range_rounds_as_onnx_does(zero_point: int, scale: float) -> None:
    parts = {"s": np.array(scale, np.float32), "z": np.array(zero_point, np.uint8)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    theirs = session(nodes, {"x": [None, None]}, ["y"], parts)
    shifted = torch.tensor(zero_point - 128, dtype=torch.int8)
    learned = LearnedRange(torch.tensor(scale), shifted, ACTIVATION, torch.float32)
    values = torch.cat([random(40, 30) * scale * 150, torch.arange(-60.0, 60.0, 0.5).reshape(8, 30) * scale])
    assert torch.equal(learned(values), torch.from_numpy(theirs(values.numpy())[0]))
    assert learned(values.reshape(2, 24, 30)).shape == (2, 24, 30)
    learned(values).sum().backward()  # type: ignore[no-untyped-call]
    naive = Naive(values.reshape(1, 1, -1), torch.tensor([[scale]]), shifted.reshape(1, 1), ACTIVATION)
    wanted = float(naive.by_scale().sum()) * scale
    assert float(learned.scale.factor.grad) == pytest.approx(wanted, rel=1e-3, abs=0.1)  # type: ignore[arg-type]


def test_a_symmetric_range_has_no_zero_point() -> None:
    learned = LearnedRange(torch.tensor(0.5), None, replace(ACTIVATION, symmetric=True), torch.bfloat16)
    values = torch.tensor([[-100.0, -64.1, -0.2, 0.3, 63.4, 70.0]])
    assert learned(values).tolist() == [[-64.0, -64.0, 0.0, 0.5, 63.5, 63.5]]


@pytest.mark.parametrize("shift", [-5.0, 0.0, 0.3, 5.0])
def test_a_range_found_at_inference_is_onnx_own(shift: float) -> None:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    theirs = session(nodes, {"x": [None, None, None]}, ["y"], {})
    for seed in range(10):
        values = (random(2, 7, 24, seed=seed) + shift).requires_grad_()
        found = dynamic_range(values, ACTIVATION)
        wanted = torch.from_numpy(theirs(values.detach().numpy())[0])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        found.sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(values.grad, torch.ones_like(values))  # type: ignore[arg-type]
    zeros = torch.zeros(1, 3, 4)
    assert torch.equal(dynamic_range(zeros, ACTIVATION), zeros)


def test_ranges_per_token_are_those_of_each_row() -> None:
    per_token = NumberFormat("int8", Granularity("token"), dynamic=True)
    values = random(2, 5, 16) * torch.logspace(-2, 2, 5).unsqueeze(-1)
    scale = values.abs().amax(-1, keepdim=True) / 127.5
    wanted = (values / scale).round().clamp(-128, 127) * scale
    torch.testing.assert_close(dynamic_range(values, per_token), wanted, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(SCALE_DTYPES), st.floats(1e-4, 1e3), st.integers(0, 1000))
def test_other_values_are_as_they_are_stored(dtype: torch.dtype, size: float, seed: int) -> None:
    start = (random(24, seed=seed) * size).to(dtype).float()
    learned = LearnedValues(start, dtype)
    assert torch.equal(learned.values(), start)
    with torch.no_grad():
        learned.change += random(24, seed=seed + 1)
    found = learned.values()
    assert torch.equal(found, found.to(dtype).float())
    # A change counts in units of the values' own size, and of a hundredth where they are all smaller.
    unit = max(float(start.square().mean().sqrt()), 1e-2)
    torch.testing.assert_close(found, start + unit * learned.change, rtol=2**-8, atol=2**-8 * unit)
    found.sum().backward()
    assert learned.change.grad is not None
    torch.testing.assert_close(learned.change.grad, torch.full((24,), unit))


def test_only_even_grids_are_supported() -> None:
    assert qat.supports(SIGNED) is None and "nf4" in (qat.supports(NumberFormat("nf4", Granularity("block", 64))) or "")
