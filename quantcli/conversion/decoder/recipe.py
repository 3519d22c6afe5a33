"""A recipe as decoders mean it: its container, and how wide the output head is where nobody says."""

from __future__ import annotations

from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.quantized import is_quantized
from quantcli.checkpoint.roles import classify
from quantcli.export.decoder.architecture import Decoder
from quantcli.export.decoder.weights import filled_block
from quantcli.planning.recipe import NumberFormatSpec, Recipe, Rule, SchemeSpec, build_scheme
from quantcli.planning.rules import rule_matches

#: What an output head gets where the rest gets fewer bits: at four bits it costs more than all other layers together.
HEAD_SCHEME = "int8"
#: The same with one scale for a row, whose blocks may be filled up.
_BY_ROW = SchemeSpec(weights=NumberFormatSpec(dtype="int8", granularity="channel"))
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
        rule = _head_rule(name, recipe.group_size, decoder.hidden, fill=fills_head(recipe))
        wishes["rules"] = [*recipe.rules, rule]
    return recipe.model_copy(update=wishes)


def fills_head(recipe: Recipe) -> bool:
    """Whether rows of a head may end within a block. In kernels of browsers that was not tried."""
    return recipe.runtime[0] != "transformers.js"


def _head_rule(name: str, asked: int | None, columns: int, *, fill: bool) -> Rule:
    """What a head becomes where groups of ``asked`` columns are asked for, or none, in blocks as long as can be."""
    if fill and (asked or 0) < _HEAD_GROUP and filled_block(columns):
        return Rule(match=name, scheme=_BY_ROW)
    return Rule(match=name, scheme=HEAD_SCHEME, group_size=asked and max(asked, min(columns & -columns, _HEAD_GROUP)))


def head_name(checkpoint: Checkpoint, decoder: Decoder) -> str:
    """The tensor that logits are made with: the head's own, or the table of words."""
    roles = classify(checkpoint.infos(), checkpoint.config)
    role = "embedding" if decoder.tied else "head"
    return next((name for name, each in roles.items() if each == role), "lm_head.weight")
