"""Bit layouts: golden bytes, and bit equality with the libraries that read them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from quantcli.core import packing

Pack = Callable[[Tensor], Tensor]
Unpack = Callable[[Tensor, int], Tensor]

INT32_LAYOUTS: dict[int, tuple[Pack, Unpack]] = {
    4: (packing.pack_int4_low_nibble_first, packing.unpack_int4_low_nibble_first),
    8: (packing.pack_int8_in_int32, packing.unpack_int8_from_int32),
}


def int8(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int8)


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(columns)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)


def hexadecimal(packed: Tensor) -> str:
    return packed.numpy().tobytes().hex()


@pytest.mark.parametrize(
    ("bits", "codes", "golden"),
    [
        (4, [[-8, -7, -6, -5, -4, -3, -2, -1]], "10325476"),
        (4, [[0, 1, 2, 3, 4, 5, 6, 7]], "98badcfe"),
        (4, [[-7, 7, 0], [1, 2, 3]], "f1080000" "a90b0000"),
        (4, [[0, 0, 0, 0, 0, 0, 0, 0, 7]], "88888888" "0f000000"),
        (8, [[-128, -127, -1, 0]], "00017f80"),
        (8, [[127, 1, 0, -128, 2], [0, 0, 0, 0, -126]], "ff818000" "82000000" "80808080" "02000000"),
    ],
)  # fmt: skip
def test_int32_golden_bytes(bits: int, codes: list[list[int]], golden: str) -> None:
    pack, unpack = INT32_LAYOUTS[bits]
    packed = pack(int8(codes))
    assert packed.dtype == torch.int32
    assert hexadecimal(packed) == golden
    assert unpack(packed, len(codes[0])).tolist() == codes


@pytest.mark.parametrize(
    ("codes", "golden"),
    [([1, 2, 15, 0], "12f0"), ([0, 15, 8, 7], "0f87"), ([9, 10, 11], "9ab0")],
)
def test_nibbles_golden_bytes(codes: list[int], golden: str) -> None:
    packed = packing.pack_nibbles_high_first(int8(codes))
    assert packed.dtype == torch.uint8
    assert hexadecimal(packed) == golden
    assert packing.unpack_nibbles_high_first(packed, len(codes)).tolist() == codes


@pytest.mark.parametrize(
    ("codes", "golden"),
    [
        # Written by hand: the word 0x75316420 holds the unsigned codes 0 to 7.
        ([[-8, -7, -6, -5, -4, -3, -2, -1]], "20643175"),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], "a8ecb9fd"),
        ([[7, -8, -8, -8, -8, -8, -8, 6] * 2, [-8] * 16], "0f0000e0" "0f0000e0" "00000000" "00000000"),
    ],
)  # fmt: skip
def test_awq_golden_bytes(codes: list[list[int]], golden: str) -> None:
    packed = packing.pack_int4_even_first(int8(codes))
    assert packed.dtype == torch.int32
    assert hexadecimal(packed) == golden
    assert packing.unpack_int4_even_first(packed).tolist() == codes


@pytest.mark.parametrize("columns", [8, 16, 64])
def test_awq_words_equal_a_naive_packer(columns: int) -> None:
    codes = random_codes(5, columns, 4)
    wanted = []
    for row in codes.tolist():
        for start in range(0, columns, 8):
            word = sum((row[start + column] + 8) << 4 * i for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
            wanted.append(word.to_bytes(4, "little").hex())
    assert hexadecimal(packing.pack_int4_even_first(codes)) == "".join(wanted)


@pytest.mark.parametrize("columns", [*range(1, 18), 31, 32, 33, 128])
@pytest.mark.parametrize("bits", INT32_LAYOUTS)
def test_int32_layouts_equal_compressed_tensors(bits: int, columns: int) -> None:
    pack, unpack = INT32_LAYOUTS[bits]
    codes = random_codes(5, columns, bits)
    packed = pack(codes)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
    assert torch.equal(unpack(pack_to_int32(codes, bits), columns), codes)


@pytest.mark.parametrize("bits", INT32_LAYOUTS)
def test_unpacking_takes_words_that_are_not_contiguous(bits: int) -> None:
    pack, unpack = INT32_LAYOUTS[bits]
    codes = random_codes(5, 13, bits)
    assert torch.equal(unpack(pack(codes).T.contiguous().T, 13), codes)


@pytest.mark.parametrize("bits", INT32_LAYOUTS)
def test_packing_takes_a_column_turned_into_a_row(bits: int) -> None:
    pack, _ = INT32_LAYOUTS[bits]
    codes = random_codes(16, 1, bits)
    # Its strides are those of the column, though torch calls it contiguous.
    assert torch.equal(pack(codes.T.contiguous()), pack_to_int32(codes.reshape(1, 16), bits))


def test_nibbles_equal_bitsandbytes() -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(values, quant_type="nf4")
    levels = bnb.dequantize_4bit(packed, state).reshape(-1, 64) / state.absmax.unsqueeze(1)
    codes = (levels.reshape(-1, 1) - bnb.get_4bit_type("nf4", device="cpu")).abs().argmin(1).to(torch.int8)
    assert torch.equal(packing.pack_nibbles_high_first(codes), packed.flatten())
    assert torch.equal(packing.unpack_nibbles_high_first(packed.flatten(), codes.numel()), codes)


matrices = array_shapes(min_dims=2, max_dims=2, max_side=40)


@settings(deadline=None)
@given(arrays(np.int8, matrices, elements=st.integers(-8, 7)))
def test_int4_round_trip(array: np.ndarray) -> None:
    codes = torch.from_numpy(array)
    packed = packing.pack_int4_low_nibble_first(codes)
    assert packed.shape == (len(array), -(-array.shape[1] // 8))
    assert torch.equal(packing.unpack_int4_low_nibble_first(packed, array.shape[1]), codes)


@settings(deadline=None)
@given(
    arrays(np.int8, st.tuples(st.integers(1, 9), st.integers(1, 9).map(lambda n: 8 * n)), elements=st.integers(-8, 7))
)
def test_awq_round_trip(array: np.ndarray) -> None:
    codes = torch.from_numpy(array)
    packed = packing.pack_int4_even_first(codes)
    assert packed.shape == (len(array), array.shape[1] // 8)
    assert torch.equal(packing.unpack_int4_even_first(packed), codes)


@settings(deadline=None)
@given(arrays(np.int8, matrices, elements=st.integers(-128, 127)))
def test_int8_round_trip(array: np.ndarray) -> None:
    codes = torch.from_numpy(array)
    packed = packing.pack_int8_in_int32(codes)
    assert packed.shape == (len(array), -(-array.shape[1] // 4))
    assert torch.equal(packing.unpack_int8_from_int32(packed, array.shape[1]), codes)


@settings(deadline=None)
@given(arrays(np.int8, st.integers(1, 300), elements=st.integers(0, 15)))
def test_nibbles_round_trip(array: np.ndarray) -> None:
    codes = torch.from_numpy(array)
    packed = packing.pack_nibbles_high_first(codes)
    assert packed.shape == (-(-len(array) // 2),)
    assert torch.equal(packing.unpack_nibbles_high_first(packed, len(array)), codes)
