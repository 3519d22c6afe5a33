"""How much memory blocks take, foreseen from the shapes of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantcli.blocks.batches import BATCH_TOKENS
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import BlockList
from quantcli.core.tensors import TensorInfo
from quantcli.planning.plan import Plan
from quantcli.system.ranks import world

#: Of a float32, and a tenth for what the C library holds back of freed memory.
_FLOAT_BYTES = 4.4
#: Copies of a block's weights: those that run, and new ones with their codes; where rounding is learned, the
#: original, the offsets, the gradients and what the optimizer makes of them as well.
_COPIES, _COPIES_LEARNED = 2, 6
#: Of the outputs of a block's layers, how many are held at a time; all of them where gradients are wanted.
_OUTPUTS_HELD = 4


@dataclass(frozen=True)
class Demand:
    """What the heaviest block takes, in bytes, beside the process itself and the hidden states between blocks."""

    block: str
    nbytes: int


def foresee(
    skeleton: Skeleton, plan: Plan, lists: Sequence[BlockList], batches: Sequence[Mapping[str, Tensor]]
) -> Demand:
    """The most that any block takes: its weights in float32, what is observed of its inputs, and one batch.

    Layers that share an input share its Hessian, which shapes do not tell: this is what they take if none do.
    """
    tokens = max((_tokens(batch) for batch in batches), default=BATCH_TOKENS)
    inside = {path: skeleton.parameters(path) for block_list in lists for path in block_list.blocks}
    names = {name for parameters in inside.values() for name in parameters}
    # Around the blocks: the largest tensor, which mostly is the embedding, is held while the first block is run.
    around = max((info.numel for name, info in skeleton.parameters().items() if name not in names), default=0)
    # Sums of one run of batches are made beside those of all before, and another rank's arrive beside both.
    held_sums = min(2, len(batches)) + (world() > 1)
    demands = [_block(path, parameters, plan, tokens, around, held_sums) for path, parameters in inside.items()]
    return max(demands, key=lambda demand: demand.nbytes)


def _block(
    path: str, parameters: Mapping[str, TensorInfo], plan: Plan, tokens: int, around: int, held_sums: int
) -> Demand:
    needs = plan.steps.needs
    shapes = {layer.info.name: layer.matrix_shape for layer in plan.layers if layer.has_codes}
    size = sum(info.numel for info in parameters.values())
    linears = [shapes[info.name] for info in parameters.values() if info.name in shapes]
    grams = [columns**2 for _, columns in linears] if "gram" in needs else []
    outputs = sorted((rows for rows, _ in linears), reverse=True)
    learned = "original" in needs
    held = sum(outputs if learned else outputs[:_OUTPUTS_HELD]) * tokens
    # One Hessian is factored at a time, in a copy.
    own = sum(grams) + max((held_sums - 1) * sum(grams), max(grams, default=0))
    quantized = (_COPIES_LEARNED if learned else _COPIES) * size + own + held
    return Demand(path or "the whole model", round(_FLOAT_BYTES * max(quantized, size + around + held)))


def _tokens(batch: Mapping[str, Tensor]) -> int:
    ids = batch.get("input_ids")
    return BATCH_TOKENS if ids is None else ids.numel()
