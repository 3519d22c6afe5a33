"""Tables of cosines and sines, taken from transformers' own modules, so that they are what torch computes with."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def rotary_tables(folder: Path, kind: str | None, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 ``[positions, head_dim / 2]``; ``kind`` is that of blocks with tables of their own."""
    import torch

    from quantcli.models.hugging_face import rotary_module

    rotary = rotary_module(folder)
    options = {} if kind is None else {"layer_type": kind}
    with torch.inference_mode():
        found = rotary(torch.zeros(1), torch.arange(positions)[None], **options)
    cosines, sines = (table[0, :, : table.shape[-1] // 2].float().contiguous().numpy() for table in found)
    return cosines, sines
