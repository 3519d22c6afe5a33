"""The arithmetic of quantization, against naive float64 oracles and against bitsandbytes."""

from __future__ import annotations

import math
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.core import nf4, numerics
from quantcli.core.scheme import NESTED_BLOCK, Granularity, NumberFormat
from quantcli.core.tensors import QuantizedTensor

GRANULARITIES = (Granularity("tensor"), Granularity("channel"), Granularity("group", 16))
INTEGER_FORMATS = [NumberFormat(*parts) for parts in product(("int8", "int4"), GRANULARITIES, (True, False))]
PER_ROW = [NumberFormat(*parts) for parts in product(("int8", "int4"), [Granularity("channel")], (True, False))]
NF4 = NumberFormat("nf4", Granularity("block", 64))
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full_range(groups: Tensor, number_format: NumberFormat) -> tuple[Tensor | None, Tensor]:
    if number_format.symmetric:
        return None, groups.abs().amax(-1)
    return groups.amin(-1), groups.amax(-1)


def quantized(
    weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Codes, scale, zero point and restored values, all in groups."""
    groups = numerics.in_groups(weight, number_format)
    scale, zero_point = numerics.choose_qparams(*full_range(groups, number_format), number_format, scale_dtype)
    codes = numerics.quantize(groups, scale, zero_point, number_format)
    return codes, scale, zero_point, numerics.dequantize(codes, scale, zero_point, number_format)


def naive_scale(values: list[float], bits: int, symmetric: bool) -> float:
    if symmetric:
        return max(abs(value) for value in values) / ((2**bits - 1) / 2)
    return (max(0.0, *values) - min(0.0, *values)) / (2**bits - 1)


def is_near_tie(quotient: float) -> bool:
    """Whether rounding the quotient to float32 first could change which integer is nearest."""
    return abs(quotient % 1 - 0.5) <= 2**-23 * max(1.0, abs(quotient))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("number_format", INTEGER_FORMATS, ids=str)
def test_integers_equal_a_naive_oracle(number_format: NumberFormat, scale_dtype: torch.dtype) -> None:
    weight = normal(6, 64) * torch.logspace(-3, 2, 6).unsqueeze(1) + 0.001
    codes, scale, zero_point, restored = quantized(weight, number_format, scale_dtype)
    groups = numerics.in_groups(weight, number_format)
    bits, lowest, highest = number_format.bits, -(2 ** (number_format.bits - 1)), 2 ** (number_format.bits - 1) - 1
    for index in np.ndindex(*scale.shape):
        values, step = groups[index].tolist(), scale[index].item()
        wanted = torch.tensor(naive_scale(values, bits, number_format.symmetric)).to(scale_dtype).item()
        assert step == pytest.approx(wanted, rel=2**-22)
        zero = 0
        if zero_point is not None:
            zero, exact_zero = int(zero_point[index]), lowest - min(0.0, *values) / step
            assert is_near_tie(exact_zero) or zero == min(max(round(exact_zero), lowest), highest)
        for value, code, back in zip(values, codes[index].tolist(), restored[index].tolist(), strict=True):
            nearest = min(max(round(value / step) + zero, lowest), highest)
            assert code == nearest or (is_near_tie(value / step) and abs(code - nearest) == 1)
            assert back == np.float32((code - zero) * step)


def test_symmetric_steps_use_the_full_range() -> None:
    weight = torch.tensor([[-7.5, 7.5, 0.4, 0.6]])
    codes, scale, zero_point, restored = quantized(weight, NumberFormat("int4", Granularity("channel")))
    assert zero_point is None
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[[-8, 7, 0, 1]]]
    assert restored.tolist() == [[[-8.0, 7.0, 0.0, 1.0]]]
    assert quantized(weight * 17, NumberFormat("int8"))[1].tolist() == [[1.0]]


@pytest.mark.parametrize(("zero_point", "wanted"), [(None, [-2, -2, 0, 0, 2, 2]), (3, [1, 1, 3, 3, 5, 5])])
def test_ties_go_to_even_before_the_zero_point_is_added(zero_point: int | None, wanted: list[int]) -> None:
    values = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    offset = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int8)
    assert numerics.quantize(values, torch.ones(1), offset, INTEGER_FORMATS[0]).tolist() == [wanted]


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("number_format", PER_ROW, ids=str)
def test_scales_are_rounded_to_how_they_are_stored(number_format: NumberFormat, scale_dtype: torch.dtype) -> None:
    weight = normal(8, 32) * torch.logspace(-4, 3, 8).unsqueeze(1)
    _, exact, *_ = quantized(weight, number_format)
    _, stored, *_ = quantized(weight, number_format, scale_dtype)
    assert torch.equal(stored, exact.to(scale_dtype).float())


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_asymmetric_ranges_hold_an_exact_zero(dtype: str, sign: int, scale_dtype: torch.dtype) -> None:
    number_format = NumberFormat(dtype, Granularity("channel"), symmetric=False)
    weight = sign * (3 + normal(4, 32).abs())
    _, scale, zero_point, restored = quantized(weight, number_format, scale_dtype)
    assert (restored.squeeze(1) - weight).abs().max() <= scale.max()
    zeros = torch.zeros(4, 1, 1)
    codes = numerics.quantize(zeros, scale, zero_point, number_format)
    assert torch.equal(numerics.dequantize(codes, scale, zero_point, number_format), zeros)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("number_format", [*PER_ROW, NF4], ids=str)
def test_all_zero_groups_stay_zero(number_format: NumberFormat, scale_dtype: torch.dtype) -> None:
    _, scale, _, restored = quantized(torch.zeros(2, 64), number_format, scale_dtype)
    assert scale.isfinite().all()
    assert number_format.dtype == "nf4" or (scale.to(scale_dtype) > 0).all()
    assert restored.count_nonzero() == 0


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 1.6e38])
@pytest.mark.parametrize("number_format", PER_ROW, ids=str)
def test_extreme_values_are_within_half_a_step(number_format: NumberFormat, magnitude: float) -> None:
    weight = torch.linspace(-1, 1, 33).unsqueeze(0) * magnitude
    _, scale, _, restored = quantized(weight, number_format)
    assert scale.isfinite().all()
    assert (restored[0] - weight).abs().max() <= scale.item() * 0.5001


rows_of_floats = st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=40)


@settings(deadline=None)
@given(rows_of_floats, st.sampled_from(PER_ROW))
def test_error_is_at_most_half_a_step(row: list[float], number_format: NumberFormat) -> None:
    codes, scale, _, restored = quantized(torch.tensor([row]), number_format)
    lowest, highest = numerics.code_range(number_format)
    assert lowest <= codes.min() and codes.max() <= highest
    # The quotient and the product are rounded to float32: a few ulps of at most 255 steps.
    assert (restored[0, 0] - torch.tensor(row)).abs().max().item() <= scale.item() * (0.5 + 255 * 2**-22)


@settings(deadline=None)
@given(rows_of_floats, st.sampled_from(PER_ROW), st.floats(2**-20, 2**20, width=32))
def test_values_outside_the_range_take_the_outermost_code(
    row: list[float], number_format: NumberFormat, high: float
) -> None:
    values, top = torch.tensor([row]), torch.tensor([high])
    scale, zero_point = numerics.choose_qparams(None if number_format.symmetric else -top, top, number_format)
    codes = numerics.quantize(values, scale, zero_point, number_format)
    lowest, highest = numerics.code_range(number_format)
    assert (codes[values > high + scale] == highest).all()
    assert (codes[values < -high - scale] == lowest).all()
    inside = values.abs() <= high
    error = (numerics.dequantize(codes, scale, zero_point, number_format) - values).abs()[inside]
    assert (error <= scale * (0.5 + 255 * 2**-22)).all()


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (Granularity("tensor"), (1, 1, 96)),
        (Granularity("channel"), (4, 1, 24)),
        (Granularity("group", 8), (4, 3, 8)),
        (Granularity("block", 32), (3, 32)),
    ],
    ids=str,
)
def test_groups_are_consecutive_values(granularity: Granularity, shape: tuple[int, ...]) -> None:
    weight = torch.arange(96.0).reshape(4, 24)
    groups = numerics.in_groups(weight, NumberFormat("int8", granularity))
    assert groups.shape == shape
    assert groups.data_ptr() == weight.data_ptr()
    assert groups.flatten().tolist() == list(range(96))


@pytest.mark.parametrize("granularity", [Granularity("group", 16), Granularity("block", 64)], ids=str)
def test_groups_must_divide(granularity: Granularity) -> None:
    with pytest.raises(ValueError, match="does not divide 4 x 24"):
        numerics.in_groups(torch.zeros(4, 24), NumberFormat("int8", granularity))


def test_codebooks_equal_bitsandbytes() -> None:
    assert torch.equal(nf4.nf4_codebook(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_codebook(), bnb.create_dynamic_map())


@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("magnitude", [1e-40, 1e-20, 1.0, 1e30])
def test_nf4_equals_bitsandbytes(block: int, magnitude: float) -> None:
    weight = normal(64, 512) * magnitude
    weight[:8] = 0
    codes, scale, _, restored = quantized(weight, NumberFormat("nf4", Granularity("block", block)))
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    assert torch.equal(scale, state.absmax)
    assert torch.equal(codes.flatten(), torch.stack([packed >> 4, packed & 15], dim=-1).flatten().to(torch.int8))
    assert torch.equal(restored.reshape(64, 512), bnb.dequantize_4bit(packed, state))


def test_nf4_breaks_ties_as_bitsandbytes() -> None:
    codebook = nf4.nf4_codebook()
    halfway = ((codebook[1:] + codebook[:-1]) / 2).repeat(2)
    largest = torch.cat([torch.tensor([1.0, 0.5, 2.0]), normal(2000).abs()]).unsqueeze(1)
    weight = torch.cat([largest, -largest, halfway * largest], dim=1)
    codes, *_ = quantized(weight, NumberFormat("nf4", Granularity("block", 32)))
    packed, _ = bnb.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    assert torch.equal(codes.flatten(), torch.stack([packed >> 4, packed & 15], dim=-1).flatten().to(torch.int8))


def test_nf4_takes_the_nearest_code() -> None:
    codes, scale, _, _ = quantized(normal(16, 64), NF4)
    for values, step, found in zip(normal(16, 64).tolist(), scale.tolist(), codes.tolist(), strict=True):
        distances = [[abs(value / step - level) for level in nf4.NF4_CODEBOOK] for value in values]
        assert all(row[code] <= min(row) + 1e-7 for row, code in zip(distances, found, strict=True))


@pytest.mark.parametrize("blocks", [2, 256, 10_245])
@pytest.mark.parametrize("magnitude", [1e-20, 0.02, 1e10])
def test_double_quantization_equals_bitsandbytes(blocks: int, magnitude: float) -> None:
    weight = normal(blocks, 64) * magnitude
    scale = weight.abs().amax(-1)
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, absmax, offset = nf4.quantize_scales(scale)
    assert torch.equal(absmax, state.state2.absmax)
    assert offset == state.offset.item()
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(nf4.dequantize_scales(state.absmax, absmax, offset), theirs)
    # bitsandbytes picks the farther of two codes now and then, where both are almost equally far; we never do.
    different = codes != state.absmax
    assert different.sum() <= 0.003 * blocks
    codebook = nf4.dynamic_codebook().double()
    scaled = (scale - offset).double() / absmax.double().repeat_interleave(NESTED_BLOCK)[:blocks]
    ours_off = (codebook[codes.int()] - scaled).abs()
    assert (ours_off <= (codebook - scaled.unsqueeze(1)).abs().amin(1) + 2e-7).all()
    assert ((codebook[state.absmax.int()] - scaled).abs() - ours_off).max() < 5e-5


def test_equal_scales_survive_double_quantization() -> None:
    scale = torch.full((300,), 0.7)
    codes, absmax, offset = nf4.quantize_scales(scale)
    assert torch.equal(nf4.dequantize_scales(codes, absmax, offset), scale)
    assert nf4.quantize_scales(torch.ones(3))[0].tolist() == [nf4.dynamic_codebook().tolist().index(0.0)] * 3


def test_double_quantized_scales_are_close() -> None:
    scale = normal(1000, 64).abs().amax(-1)
    restored = nf4.dequantize_scales(*nf4.quantize_scales(scale))
    # Half the widest gap of the codebook, 0.9 / 64, of the largest deviation from the mean.
    assert (restored - scale).abs().max() <= 0.9 / 128 * (scale - scale.mean()).abs().max() * 1.001


@pytest.mark.parametrize("number_format", [*INTEGER_FORMATS, NF4], ids=str)
def test_error_powers_equal_a_float64_sum(number_format: NumberFormat) -> None:
    weight = normal(64, 64) + 0.2
    codes, scale, zero_point, restored = quantized(weight, number_format)
    tensor = QuantizedTensor(codes.reshape(weight.shape), scale, zero_point, (64, 64), number_format)
    signal, noise = numerics.error_powers(numerics.in_groups(weight, number_format), tensor)
    errors = (restored.double() - numerics.in_groups(weight, number_format).double()).flatten().tolist()
    assert signal == pytest.approx(math.fsum(value**2 for value in weight.flatten().tolist()), rel=1e-5)
    assert noise == pytest.approx(math.fsum(value**2 for value in errors), rel=1e-5)


def test_powers_do_not_show_in_which_order_they_were_added() -> None:
    """Processors add up in orders of their own, and manifests tell of the sums."""
    values = normal(512, 512)
    orders = (values, values.flip(0), values.T.contiguous(), values[torch.randperm(512)])
    assert len({f"{numerics.decibels(numerics.power(order), 1.0):.10f}" for order in orders}) == 1


def test_decibels() -> None:
    assert numerics.decibels(1000.0, 1.0) == pytest.approx(30)
    assert numerics.decibels(1.0, 0.0) is None
    assert numerics.decibels(0.0, 1.0) is None


def test_checksum_is_crc32_of_the_bytes_in_order() -> None:
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8).reshape(3, 3)
    assert numerics.checksum(digits) == 0xCBF43926
    assert numerics.checksum(digits.T) == zlib.crc32(b"147258369")
    assert numerics.checksum(torch.ones(2, dtype=torch.bfloat16)) == zlib.crc32(b"\x80\x3f\x80\x3f")


def test_a_narrow_format_meets_the_largest_value_exactly() -> None:
    number_format = NumberFormat("int8", Granularity("channel"), narrow=True)
    assert numerics.code_range(number_format) == (-127, 127)
    weight = torch.tensor([[1.0, -0.3, 0.1], [-2.0, 0.5, 0.25]])
    scale, zero_point = numerics.choose_qparams(None, weight.abs().amax(-1, keepdim=True), number_format)
    codes = numerics.quantize(numerics.in_groups(weight, number_format), scale, zero_point, number_format)
    assert scale.flatten().tolist() == pytest.approx([1 / 127, 2 / 127])
    assert codes[0, 0, 0] == 127 and codes[1, 0, 0] == -127
    np.testing.assert_array_equal(codes.reshape(2, 3), np.rint(weight.numpy() / np.array([[1], [2]]) * 127))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_infinities_and_nans_are_found_and_large_sums_are_none(dtype: torch.dtype) -> None:
    values = torch.full((4, 1000), torch.finfo(dtype).max, dtype=dtype)
    assert numerics.all_finite(values) and numerics.all_finite(torch.zeros(0, dtype=dtype))
    for bad in (torch.inf, -torch.inf, torch.nan):
        damaged = values / 1e4
        damaged[2, 7] = bad
        assert not numerics.all_finite(damaged)
    opposite = values.clone()
    opposite[0, 0], opposite[0, 1] = torch.inf, -torch.inf
    assert not numerics.all_finite(opposite)


@pytest.mark.parametrize("columns", [8, 512])
def test_error_powers_of_numbers_whose_squares_float32_lacks(columns: int) -> None:
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    weight[1, 2] = 1e30
    number_format = NumberFormat("int8", Granularity("channel"))
    codes, scale, zero_point, _ = quantized(weight, number_format)
    tensor = QuantizedTensor(codes.reshape(weight.shape), scale, zero_point, (4, columns), number_format)
    signal, noise = numerics.error_powers(numerics.in_groups(weight, number_format), tensor)
    assert signal == pytest.approx(1e60, rel=1e-3) and 0 <= noise < 1e57
