"""Algorithms: rtn against compressed-tensors' own arithmetic, mse against a brute-force float64 search."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from quantcli.algorithms import mse, rtn
from quantcli.core import numerics
from quantcli.core.scheme import PRESETS, Granularity, NumberFormat
from quantcli.core.tensors import QuantizedTensor

GROUP, CHANNEL, TENSOR = Granularity("group", 32), Granularity("channel"), Granularity("tensor")
FORMATS = [
    NumberFormat("int4", GROUP),
    NumberFormat("int8", CHANNEL),
    NumberFormat("int8", TENSOR),
    NumberFormat("int4", GROUP, symmetric=False),
    NumberFormat("int8", CHANNEL, symmetric=False),
]
NF4 = NumberFormat("nf4", Granularity("block", 32))


def heavy_tailed(rows: int = 16, columns: int = 128) -> Tensor:
    """Normal values with outliers, all of one sign in the first rows: where clipping pays and zero points move."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.02] *= 6
    weight[:2] = weight[:2].abs() + 0.5
    return weight


def power_of(number_format: NumberFormat) -> int:
    """Of groups of four bits that share a signed scale the squared error is least, of all others the cubed one."""
    signed = number_format.symmetric and number_format.bits == 4 and number_format.granularity.kind == "group"
    return 2 if signed else 3


def group_errors(weight: Tensor, tensor: QuantizedTensor) -> np.ndarray:
    """The error of each group that is made least, summed in float64."""
    codes = numerics.in_groups(tensor.codes, tensor.number_format).double()
    zero_point = 0 if tensor.zero_point is None else tensor.zero_point.double().unsqueeze(-1)
    restored = (codes - zero_point) * tensor.scale.double().unsqueeze(-1)
    return (
        (restored - numerics.in_groups(weight, tensor.number_format).double())
        .abs()
        .pow(power_of(tensor.number_format))
        .sum(-1)
        .numpy()
    )


def sign_of_scale(values: np.ndarray, number_format: NumberFormat) -> int:
    """Groups of four bits reach one step further down than up: there goes the weight of the largest magnitude."""
    signed = number_format.symmetric and number_format.bits == 4 and number_format.granularity.kind == "group"
    return -1 if signed and values.max() > -values.min() else 1


def least_error(
    values: np.ndarray, number_format: NumberFormat, scale_dtype: torch.dtype, sign: int | None = None
) -> float:
    """The least error of any range on the grid, in float64; ``sign`` is that of the scale, None for the better one."""
    sign = sign or sign_of_scale(values, number_format)
    steps, lowest = 2**number_format.bits - 1, -(2 ** (number_format.bits - 1))
    errors = []
    power = power_of(number_format)
    for fraction in mse.SIGNED_FRACTIONS if power == 2 else mse.RANGE_FRACTIONS:
        low, high = min(0.0, values.min()) * fraction, max(0.0, values.max()) * fraction
        if number_format.symmetric:
            high = np.abs(values).max() * fraction * sign
            low = -high
        scale = torch.tensor((high - low) / steps).to(scale_dtype).item()
        zero = 0 if number_format.symmetric else np.clip(np.round(lowest - low / scale), lowest, lowest + steps)
        codes = np.clip(np.round(values / scale) + zero, lowest, lowest + steps)
        errors.append(np.sum(np.abs((codes - zero) * scale - values) ** power))
    return float(min(errors))


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_rtn_equals_compressed_tensors(number_format: NumberFormat) -> None:
    weight = heavy_tailed()
    granularity = number_format.granularity
    arguments = QuantizationArgs(
        num_bits=number_format.bits,
        strategy=granularity.kind,
        group_size=granularity.size,
        symmetric=number_format.symmetric,
    )
    low, high = torch.aminmax(numerics.in_groups(weight, number_format), dim=-1)
    scale, zero_point = calculate_qparams(low, high, arguments)
    tensor = rtn.run(weight, number_format, torch.float32)
    assert torch.equal(tensor.scale, scale)
    assert tensor.zero_point is None if number_format.symmetric else torch.equal(tensor.zero_point, zero_point)
    # compressed-tensors adds the zero point before it rounds; the codes agree as long as no quotient is a tie.
    assert torch.equal(tensor.codes, quantize(weight, scale, zero_point, arguments, dtype=torch.int8))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_mse_finds_the_least_error_on_its_grid(number_format: NumberFormat, scale_dtype: torch.dtype) -> None:
    weight = heavy_tailed()
    groups = numerics.in_groups(weight, number_format).double().numpy()
    wanted = [least_error(groups[index], number_format, scale_dtype) for index in np.ndindex(groups.shape[:-1])]
    errors = group_errors(weight, mse.run(weight, number_format, scale_dtype))
    assert errors.flatten() == pytest.approx(wanted, rel=5e-5)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_mse_is_never_worse_than_rtn(number_format: NumberFormat, scale_dtype: torch.dtype) -> None:
    weight = heavy_tailed() * torch.logspace(-30 if scale_dtype != torch.float16 else -6, 3, 16).unsqueeze(1)
    weight[5] = 0
    nearest = group_errors(weight, rtn.run(weight, number_format, scale_dtype))
    searched = group_errors(weight, mse.run(weight, number_format, scale_dtype))
    assert (searched <= nearest * (1 + 1e-6)).all()
    assert number_format.bits == 8 or searched.sum() < 0.95 * nearest.sum()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_groups_of_four_bits_take_the_sign_that_the_largest_weight_gains_by(scale_dtype: torch.dtype) -> None:
    weight, number_format = heavy_tailed(), FORMATS[0]
    tensor = mse.run(weight, number_format, scale_dtype)
    groups = numerics.in_groups(weight, number_format).numpy()
    signs = [sign_of_scale(groups[index], number_format) for index in np.ndindex(groups.shape[:-1])]
    assert tensor.scale.sign().flatten().tolist() == signs
    assert 10 < signs.count(-1) < len(signs) - 10
    # The other sign, on the same grid, does worse in most groups and in all of them together.
    mirrored = mse.run(-weight, number_format, scale_dtype)
    assert torch.equal(mirrored.scale, -tensor.scale) and torch.equal(mirrored.codes, tensor.codes)
    unsigned = [least_error(groups[i], number_format, scale_dtype, sign=1) for i in np.ndindex(groups.shape[:-1])]
    assert group_errors(weight, tensor).sum() < 0.93 * sum(unsigned)


@pytest.mark.parametrize("number_format", [form for form in FORMATS[1:] if form.symmetric], ids=str)
def test_other_scales_are_positive(number_format: NumberFormat) -> None:
    for module in (rtn, mse):
        assert bool((module.run(heavy_tailed(), number_format, torch.float32).scale > 0).all())
    narrow = NumberFormat("int4", CHANNEL, narrow=True)
    assert bool((mse.run(heavy_tailed(), narrow, torch.float32).scale > 0).all())


@pytest.mark.parametrize("module", [rtn, mse])
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_results_have_the_promised_form(module: ModuleType, number_format: NumberFormat) -> None:
    tensor = module.run(heavy_tailed(), number_format, torch.bfloat16)
    scales = {"tensor": (1, 1), "channel": (16, 1), "group": (16, 4)}[number_format.granularity.kind]
    assert (tensor.codes.shape, tensor.codes.dtype) == ((16, 128), torch.int8)
    assert (tensor.scale.shape, tensor.scale.dtype) == (scales, torch.float32)
    assert torch.equal(tensor.scale, tensor.scale.bfloat16().float())
    assert (tensor.shape, tensor.number_format) == ((16, 128), number_format)
    if number_format.symmetric:
        assert tensor.zero_point is None
    else:
        assert (tensor.zero_point.shape, tensor.zero_point.dtype) == (scales, torch.int8)


@pytest.mark.parametrize("module", [rtn, mse])
@pytest.mark.parametrize("number_format", [form for form in FORMATS if form.granularity != TENSOR], ids=str)
def test_rows_are_quantized_independently(module: ModuleType, number_format: NumberFormat) -> None:
    weight = heavy_tailed()
    before = weight.clone()
    whole = module.run(weight, number_format, torch.float32)
    parts = [module.run(rows, number_format, torch.float32) for rows in weight.split(5)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))
    assert torch.equal(weight, before)


def test_rtn_takes_the_absmax_of_nf4_blocks() -> None:
    weight = heavy_tailed()
    tensor = rtn.run(weight, NF4, torch.bfloat16)
    assert torch.equal(tensor.scale, weight.reshape(-1, 32).abs().amax(1))
    assert (tensor.codes.shape, tensor.zero_point) == (weight.shape, None)


def test_supports() -> None:
    coded = [scheme.weights for scheme in PRESETS.values() if not scheme.weights.is_cast]
    assert [number_format for number_format in coded if rtn.supports(number_format)] == []
    assert {number_format.dtype for number_format in coded if mse.supports(number_format)} == {"nf4"}
    assert "use rtn" in (mse.supports(NF4) or "")
