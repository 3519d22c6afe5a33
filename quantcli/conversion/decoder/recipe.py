"""A recipe as decoders mean it: its container, and how wide the output head is where nobody says."""

from __future__ import annotations

from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.quantized import is_quantized
from quantcli.checkpoint.roles import classify
from quantcli.export.decoder.architecture import Decoder
from quantcli.planning.recipe import Recipe, Rule, build_scheme
from quantcli.planning.rules import rule_matches

#: What an output head gets where the rest gets fewer bits: at four bits it costs more than all other layers together.
HEAD_SCHEME = "int8"
#: The group of such a head at the most, where groups are asked for. Of one row times 49152 x 576 on one thread,
#: MatMulNBits took 2.9 ms in groups of 32, 2.6 in 64 and 2.4 in 128, and 2.5 with four bits in groups of 32.
_HEAD_GROUP = 128


def decoder_recipe(recipe: Recipe, checkpoint: Checkpoint, decoder: Decoder) -> Recipe:
    """The recipe with the container of decoders, and with a rule for the output head unless it has one."""
    wishes: dict[str, Any] = {"format": "onnx", "target": recipe.target or "onnxruntime"}
    if recipe.scheme is None and is_quantized(checkpoint):
        return recipe.model_copy(update=wishes)
    if recipe.rest == "auto":
        wishes["rest"] = "keep"
    name = head_name(checkpoint, decoder)
    scheme = build_scheme(recipe.scheme) if recipe.scheme is not None else None
    named = any(rule_matches(rule, [name]) for rule in (*recipe.rules, *(Rule(match=glob) for glob in recipe.skip)))
    if scheme is not None and not scheme.weights.is_cast and scheme.inputs is None and not named:
        group = recipe.group_size and _head_group(recipe.group_size, decoder.hidden)
        wishes["rules"] = [*recipe.rules, Rule(match=name, scheme=HEAD_SCHEME, group_size=group)]
    return recipe.model_copy(update=wishes)


def _head_group(asked: int, columns: int) -> int:
    """Columns of a head with one scale: more than are asked for where a longer power of two divides them."""
    return max(asked, min(columns & -columns, _HEAD_GROUP))


def head_name(checkpoint: Checkpoint, decoder: Decoder) -> str:
    """The tensor that logits are made with: the head's own, or the table of words."""
    roles = classify(checkpoint.infos(), checkpoint.config)
    role = "embedding" if decoder.tied else "head"
    return next((name for name, each in roles.items() if each == role), "lm_head.weight")
