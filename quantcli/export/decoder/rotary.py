"""Tables of cosines and sines, taken from transformers' own modules, so that they are what torch computes with.

longrope has two: one for texts up to the length that a model was trained on first, one for all positions of longer
texts. They lie in one matrix one after the other, and tokens are told their rows in it. (onnxruntime-genai's own
builder chooses between two by If, which copies the chosen one for every token.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.export.decoder.nodes import Nodes

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn


def rotary_tables(rotary: nn.Module, kind: str | None, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 ``[positions, turned / 2]``, of the elements of a head that are turned.

    ``kind`` is that of blocks with tables of their own.
    """
    import torch

    options = {} if kind is None else {"layer_type": kind}
    with torch.inference_mode():
        found = rotary(torch.zeros(1), torch.arange(positions)[None], **options)
    cosines, sines = (table[0, :, : table.shape[-1] // 2].float().contiguous().numpy() for table in found)
    return cosines, sines


def table_rows(nodes: Nodes, ids: ir.Value, last: ir.Value, total: ir.Value, short_context: int) -> ir.Value:
    """Of each token, the row of the joined tables that it is turned by: its position, moved in a long text.

    Args:
        nodes: the graph.
        ids: the tokens, ``[batch, tokens]``.
        last: of each row of the batch, its length with the cache less one, int32.
        total: the longest of these lengths, int32.
        short_context: rows of the first table, and the length of texts that it is for.

    Returns:
        int64 ``[batch, tokens]``.
    """
    import onnx_ir as ir

    wide = ir.DataType.INT64.value
    zero, one, short = (
        nodes.constant(f"positions.{name}", np.array(value, np.int64))
        for name, value in (("zero", 0), ("one", 1), ("short", short_context))
    )
    tokens = nodes.add("Gather", [nodes.add("Shape", [ids], "positions.shape"), one], "positions.tokens", axis=0)
    # As GroupQueryAttention counts: from the end of what is cached, and from 0 in a prompt that is padded on the right.
    end = nodes.add("Add", [nodes.add("Cast", [last], "positions.last", to=wide), one], "positions.end")
    start = nodes.add("Max", [nodes.add("Sub", [end, tokens], "positions.before"), zero], "positions.start")
    count = nodes.add("Range", [zero, tokens, one], "positions.count")
    axis = nodes.constant("positions.axis", np.array([1], np.int64))
    own = nodes.add("Add", [nodes.add("Unsqueeze", [start, axis], "positions.rows"), count], "positions.own")
    length = nodes.add("Cast", [total], "positions.total", to=wide)
    is_long = nodes.add("Greater", [length, short], "positions.is_long")
    moved = nodes.add("Where", [is_long, short, zero], "positions.moved")
    return nodes.add("Add", [own, moved], "positions")
