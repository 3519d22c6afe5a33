"""NF4: its codebook, and the double quantization of its scales (arXiv:2305.14314)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantcli.core.scheme import NESTED_BLOCK

#: The 16 values of NF4, quantiles of a normal distribution (QLoRA, arXiv:2305.14314, appendix E).
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def nf4_codebook() -> Tensor:
    """The NF4 values, float32 ``[16]``, ascending."""
    return torch.tensor(NF4_CODEBOOK, dtype=torch.float32)


@cache
def nf4_bounds() -> Tensor:
    """Midpoints between neighbouring values of the codebook, float32 ``[15]``."""
    codebook = nf4_codebook()
    return (codebook[1:] + codebook[:-1]) / 2


@cache
def dynamic_codebook() -> Tensor:
    """The 256 values of the signed dynamic 8-bit data type, float32, ascending.

    Each power of ten from 1e-7 to 1 is divided linearly, the larger ones more finely; zero and one
    are added (8-bit optimizers via block-wise quantization, arXiv:2110.02861, section 1.3).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        magnitudes = 10 ** (exponent - 6) * means
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """Double quantization: 8-bit codes of the scales of one tensor (QLoRA, section 3).

    ``scale`` is float32 ``[blocks]``. Returns uint8 codes ``[blocks]``, the second-level absmax
    ``[ceil(blocks / 256)]`` and the offset (the mean) that was subtracted.
    """
    offset = scale.mean()
    padded = torch.nn.functional.pad(scale - offset, (0, -len(scale) % NESTED_BLOCK))
    blocks = padded.reshape(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(-1)
    codebook = dynamic_codebook()
    bounds = (codebook[1:] + codebook[:-1]) / 2
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1)
    codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return codes.reshape(-1)[: len(scale)], absmax, offset.item()


def dequantize_scales(codes: Tensor, absmax: Tensor, offset: float) -> Tensor:
    """Inverse of `quantize_scales`: float32 ``[blocks]``."""
    per_scale = absmax.repeat_interleave(NESTED_BLOCK)[: len(codes)]
    return dynamic_codebook()[codes.int()] * per_scale + offset
