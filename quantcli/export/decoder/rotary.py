"""Tables of cosines and sines, taken from transformers' own modules, so that they are what torch computes with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn


def rotary_tables(rotary: nn.Module, kind: str | None, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 ``[positions, head_dim / 2]``; ``kind`` is that of blocks with tables of their own."""
    import torch

    options = {} if kind is None else {"layer_type": kind}
    with torch.inference_mode():
        found = rotary(torch.zeros(1), torch.arange(positions)[None], **options)
    cosines, sines = (table[0, :, : table.shape[-1] // 2].float().contiguous().numpy() for table in found)
    return cosines, sines
