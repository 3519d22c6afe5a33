"""Which layers calibration data tells something of, and in which order: the plan that follows from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from quantcli.blocks.reach import reached_lists
from quantcli.blocks.skeleton import Skeleton
from quantcli.blocks.structure import WHOLE, BlockList, NotSequentialError, find_blocks, tower_of
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.planning.plan import Plan
from quantcli.planning.resolve import resolve


def ordered_blocks(
    plan: Plan, skeleton: Skeleton, linear: Collection[str], batch: Mapping[str, Tensor]
) -> tuple[Plan, list[BlockList], list[BlockList]]:
    """Lists of blocks that the data reaches, in order, and all others; the model itself where there is no such order.

    The plan is the same, with a warning where it is the model itself.

    Raises:
        NotSequentialError: there is no order of blocks, and an algorithm of the plan needs one.
    """
    try:
        blocks = find_blocks(skeleton.module, linear, plan.recipe.blocks)
        return plan, *reached_lists(skeleton, blocks, batch)
    except NotSequentialError as error:
        if "original" in plan.steps.needs or plan.steps.final:
            raise NotSequentialError(
                f"{error.message} {plan.steps} learns from one block after the other.",
                hint="Use gptq or awq, which look at all layers at once, or an algorithm without data, such as mse.",
            ) from error
        warning = f"{error} So all layers are quantized at once, from what the unquantized model gives them."
        return replace(plan, warnings=(*plan.warnings, warning)), [WHOLE], []


def names_inside(skeleton: Skeleton, blocks: Sequence[BlockList]) -> set[str]:
    """Tensors that belong to blocks."""
    paths = (path for block_list in blocks for path in block_list.blocks)
    return {info.name for path in paths for info in skeleton.parameters(path).values()}


def without_unreached(
    plan: Plan,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    reached: Sequence[BlockList],
    unreached: Sequence[BlockList],
) -> tuple[Plan, dict[str, str]]:
    """The plan itself, or one that leaves the towers whose blocks the data does not reach, which a warning tells.

    The second is why each of their tensors is left.
    """
    paths = [block_list.path for block_list in reached]
    towers = dict.fromkeys(tower_of(block_list.path, paths) for block_list in unreached)
    if not towers:
        return plan, {}
    leave = {
        info.name: f"in {tower}, which the calibration data does not reach"
        for tower in towers
        for info in skeleton.parameters(tower).values()
    }
    warning = (
        f"The calibration data does not reach {' and '.join(towers)}, which is left unquantized. Calibrate on data "
        "that does, or use an algorithm without data, such as mse."
    )
    found = resolve(plan.recipe, checkpoint.infos(), checkpoint.config, data=True, leave=leave, loader=plan.loader)
    return replace(found, warnings=(*found.warnings, warning)), leave


def without_unobserved(
    plan: Plan,
    checkpoint: Checkpoint,
    inside: Collection[str],
    observed: Collection[str],
    left: Mapping[str, str],
) -> Plan:
    """The plan itself, or one that leaves layers whose inputs have a static range and are not ``observed``.

    ``left`` are those that are left already.
    """
    static = [layer.info.name for layer in plan.quantized if layer.scheme and layer.scheme.is_static]
    places = {name: "in no layer of its own" if name in inside else "outside the blocks" for name in static}
    leave = {
        name: f"{place}, where the range of inputs is not observed"
        for name, place in places.items()
        if name not in observed
    }
    if not leave:
        return plan
    every = {**left, **leave}
    found = resolve(plan.recipe, checkpoint.infos(), checkpoint.config, data=True, leave=every, loader=plan.loader)
    return replace(found, warnings=tuple(dict.fromkeys((*found.warnings, *plan.warnings))))
