"""A whole model in place of a block, where its blocks cannot be gone through one after the other.

Layers that the model calls several times, as where layers share their weights (ALBERT), and blocks that lie in several
lists called in turn (XLM) are no chain in which each sees what the ones before it return. Statistics of all their
calls are then gathered in one pass of the unquantized model and added up, as is usual for GPTQ's Hessians where errors
are not handed on, and every layer is quantized at the end of it. In memory are all weights, and all statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.whole import ModelCall
from quantcli.planning.plan import Plan
from quantcli.ptq.block import BlockOutcome, BlockQuantizer, Tick
from quantcli.system.hardware import release_freed


def quantize_whole(
    skeleton: Skeleton, plan: Plan, batches: Sequence[Mapping[str, Tensor]], *, device: str, seed: int, tick: Tick
) -> BlockOutcome:
    """Quantize every layer of a model at once.

    Args:
        skeleton: the model.
        plan: what its layers become; none of its steps learns from what the original returns.
        batches: calibration inputs.
        device: where it runs.
        seed: what is drawn at random is drawn by it.
        tick: told the fraction that is done.

    Raises:
        InputError: the model fails on a batch, or what it computes is not finite.
    """
    skeleton.load_buffers()
    model = skeleton.load("").to(device)
    calls = [ModelCall.of(model, batch).to(torch.device(device)) for batch in batches]
    outcome = BlockQuantizer(skeleton, plan).run("", model, calls, None, seed, tick)
    model.to("cpu")
    skeleton.drop()
    release_freed()
    tick(1.0)
    return outcome
