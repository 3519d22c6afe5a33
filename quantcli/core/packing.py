"""Bit layouts: pairs of pack and unpack, each the exact inverse of the other.

Codes come in as int8. Layouts are little-endian, as every on-disk format here defines them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core import compiled


def _pad_columns(codes: Tensor, multiple: int, value: int) -> Tensor:
    missing = -codes.shape[-1] % multiple
    return torch.nn.functional.pad(codes, (0, missing), value=value) if missing else codes


def pack_int4_low_nibble_first(codes: Tensor) -> Tensor:
    """Signed 4-bit codes ``[rows, columns]`` -> int32 ``[rows, ceil(columns / 8)]``.

    Code i of a word sits at bits 4i, stored as ``code + 8``; a partial last word is filled with zero
    bits. This is compressed-tensors' ``pack-quantized`` layout.
    """
    padded = _pad_columns(codes, 8, value=-8)
    if loops := compiled.loops_for(padded):
        packed = torch.empty(padded.numel() // 2, dtype=torch.uint8)
        loops.pack_signed_low_first(padded.reshape(-1).numpy(), packed.numpy())
        return packed.view(torch.int32).reshape(len(codes), -1)
    unsigned = padded + 8
    # Two neighbouring bytes as one int16: low nibbles of both end up in the low byte.
    pairs = unsigned.reshape(-1).view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32).reshape(len(codes), -1)


def unpack_int4_low_nibble_first(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_int4_low_nibble_first`: int8 ``[rows, columns]``."""
    stored = packed.contiguous().view(torch.uint8)
    if loops := compiled.loops_for(stored):
        codes = torch.empty(2 * stored.numel(), dtype=torch.int8)
        loops.unpack_signed_low_first(stored.reshape(-1).numpy(), codes.numpy())
        return codes.reshape(len(packed), -1)[:, :columns]
    pairs = stored.to(torch.int16)
    unsigned = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.int8)
    return unsigned.sub_(8)[:, :columns]


def pack_int8_in_int32(codes: Tensor) -> Tensor:
    """Signed 8-bit codes ``[rows, columns]`` -> int32 ``[rows, ceil(columns / 4)]``.

    Code i of a word sits at bits 8i, stored as ``code + 128``; a partial last word is filled with
    zero bits. This is compressed-tensors' ``pack-quantized`` layout at 8 bits.
    """
    return (_pad_columns(codes, 4, value=-128) ^ -128).reshape(-1).view(torch.int32).reshape(len(codes), -1)


def unpack_int8_from_int32(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_int8_in_int32`: int8 ``[rows, columns]``."""
    return (packed.contiguous().view(torch.int8) ^ -128)[:, :columns]


def pack_nibbles_high_first(codes: Tensor) -> Tensor:
    """Unsigned 4-bit codes ``[n]`` -> uint8 ``[ceil(n / 2)]``, the even index in the high nibble.

    bitsandbytes' layout of the flattened weight.
    """
    padded = _pad_columns(codes, 2, value=0)
    if loops := compiled.loops_for(padded):
        packed = torch.empty(padded.numel() // 2, dtype=torch.uint8)
        loops.pack_high_first(padded.numpy(), packed.numpy())
        return packed
    pairs = padded.view(torch.int16)
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)


def unpack_nibbles_high_first(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_nibbles_high_first`: int8 ``[count]``."""
    if loops := compiled.loops_for(packed):
        codes = torch.empty(2 * packed.numel(), dtype=torch.int8)
        loops.unpack_high_first(packed.numpy(), codes.numpy())
        return codes[:count]
    pairs = packed.to(torch.int16)
    return ((pairs >> 4) | ((pairs & 0x0F) << 8)).view(torch.int8)[:count]


#: Which of eight consecutive codes lies at which nibble of a word, lowest bits first.
_EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_int4_even_first(codes: Tensor) -> Tensor:
    """Signed 4-bit codes ``[rows, columns]``, columns a multiple of 8 -> int32 ``[rows, columns / 8]``.

    Of each eight codes the even ones lie in the low half of the word, the odd ones in the high half, each stored as
    ``code + 8``: AWQ's ``gemm`` layout.
    """
    ordered = codes.reshape(len(codes), -1, 8)[:, :, _EVEN_FIRST].reshape(codes.shape)
    return pack_int4_low_nibble_first(ordered)


def unpack_int4_even_first(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4_even_first`: int8 ``[rows, columns]``."""
    codes = unpack_int4_low_nibble_first(packed, 8 * packed.shape[1])
    ordered = torch.empty_like(codes).view(len(codes), -1, 8)
    ordered[:, :, _EVEN_FIRST] = codes.reshape(ordered.shape)
    return ordered.view(codes.shape)
