"""Compiled loops give what torch's operations give, to the bit: codes, ranges, packed bytes; sums nearly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from quantcli.core import compiled, numerics, packing
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.core.tensors import QuantizedTensor

pytest.importorskip("numba", reason="the extra 'fast' is not installed")

FORMATS = [
    NumberFormat("int4", Granularity("group", 32)),
    NumberFormat("int4", Granularity("group", 128), symmetric=False),
    NumberFormat("int8", Granularity("channel")),
    NumberFormat("int8", Granularity("channel"), symmetric=False, raised=True),
    NumberFormat("int8", Granularity("tensor"), narrow=True),
    NumberFormat("nf4", Granularity("block", 64)),
]


@pytest.fixture
def loops() -> Iterator[Callable[[Callable[[], object]], tuple[object, object]]]:
    """Calls something without the loops, and with them."""

    def both(call: Callable[[], object]) -> tuple[object, object]:
        compiled.stop()
        without = call()
        compiled.use()
        return without, call()

    yield both
    compiled.stop()


def weights(seed: int) -> Tensor:
    """Rows of many sizes, with ties, zeros, outliers, and rows that are all zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(24, 512, generator=generator) * 10.0 ** torch.randint(-30, 30, (24, 1), generator=generator)
    values[1] = (torch.randn(512, generator=generator) * 8).round() / 2
    values[2] = 0
    values[3, ::3] = -0.0
    values[4] = -values[4].abs()
    values[5, 7] *= 1e4
    return values


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_codes_and_ranges_are_the_same(loops: Callable, number_format: NumberFormat, seed: int) -> None:
    groups = numerics.in_groups(weights(seed), number_format)

    def run() -> tuple[Tensor | None, ...]:
        low, high = numerics.group_range(groups, number_format)
        scale, zero_point = numerics.choose_qparams(low, high, number_format, torch.bfloat16)
        return low, high, scale, zero_point, numerics.quantize(groups, scale, zero_point, number_format)

    without, with_loops = loops(run)
    for expected, got in zip(without, with_loops, strict=True):
        assert (expected is None) == (got is None)
        assert expected is None or (torch.equal(expected, got) and expected.shape == got.shape)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_sums_of_squares_agree(loops: Callable, number_format: NumberFormat) -> None:
    weight = torch.randn(24, 512, generator=torch.Generator().manual_seed(0))
    groups = numerics.in_groups(weight, number_format)
    low, high = numerics.group_range(groups, number_format)
    scale, zero_point = numerics.choose_qparams(low, high, number_format)
    codes = numerics.quantize(groups, scale, zero_point, number_format).reshape(weight.shape)
    tensor = QuantizedTensor(codes, scale, zero_point, (24, 512), number_format)
    exact = numerics.dequantize(numerics.in_groups(codes, number_format), scale, zero_point, number_format).double()
    oracle = groups.double().square().sum().item(), (exact - groups.double()).square().sum().item()
    without, with_loops = loops(lambda: numerics.error_powers(groups, tensor))
    assert without == pytest.approx(oracle, rel=1e-6)
    assert with_loops == pytest.approx(without, rel=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_no_number_reaches_the_range(loops: Callable, bad: float, symmetric: bool) -> None:
    number_format = NumberFormat("int4", Granularity("group", 32), symmetric=symmetric)
    weight = torch.randn(16, 128)
    weight[3, 40] = bad
    for low, high in loops(lambda: numerics.group_range(numerics.in_groups(weight, number_format), number_format)):
        finite = torch.isfinite(high) & (torch.isfinite(low) if low is not None else True)
        assert finite.logical_not().nonzero().tolist() == [[3, 1]]


@pytest.mark.parametrize("columns", [64, 77, 128])
def test_packed_bytes_are_the_same(loops: Callable, columns: int) -> None:
    codes = torch.randint(-8, 8, (40, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(columns))
    without, packed = loops(lambda: packing.pack_int4_low_nibble_first(codes))
    assert torch.equal(without, packed)
    for unpacked in loops(lambda: packing.unpack_int4_low_nibble_first(packed, columns)):
        assert torch.equal(unpacked, codes)
    flat = (codes + 8).reshape(-1)
    without, packed = loops(lambda: packing.pack_nibbles_high_first(flat))
    assert torch.equal(without, packed)
    for unpacked in loops(lambda: packing.unpack_nibbles_high_first(packed, len(flat))):
        assert torch.equal(unpacked, flat)


def test_values_that_the_loops_cannot_take_go_to_torch(loops: Callable) -> None:
    number_format = NumberFormat("int8", Granularity("channel"))
    for weight in (torch.randn(64, 96).T, torch.randn(96, 4), torch.randn(96, 64).requires_grad_()):
        groups = weight.unsqueeze(1)
        scale = groups.detach().abs().amax(-1) / 127.5
        without, with_loops = loops(lambda: numerics.quantize(groups, scale, None, number_format))  # noqa: B023
        assert torch.equal(without, with_loops)


def test_small_models_do_without() -> None:
    few, many = compiled.WORTHWHILE_NF4 - 1, compiled.WORTHWHILE_INTEGERS
    assert not compiled.pays(nf4=few, integers=many - 1)
    assert compiled.pays(nf4=few + 1, integers=0) and compiled.pays(nf4=0, integers=many)
    compiled.stop()
    assert compiled.loops_for(torch.randn(1 << 12)) is None
