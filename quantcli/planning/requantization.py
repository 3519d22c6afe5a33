"""What can be asked of a checkpoint that is quantized already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.roles import quantization_of
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError, UsageError
from quantcli.planning.recipe import Recipe

#: What a recipe may say of a container change, beside the format.
_KEPT_WISHES = {"format", "target", "max_shard_size"}


def refuse_wishes(checkpoint: Checkpoint, recipe: Recipe, *, data: bool) -> None:
    """Refuse what would choose codes anew.

    Raises:
        UsageError: a wish that says how to quantize, or data to calibrate on.
        InputError: a scheme, or no format either.
    """
    if recipe.scheme is not None or recipe.format is None:
        refuse_quantized(checkpoint.infos(), checkpoint.config)
    stray = sorted(recipe.model_dump(exclude_defaults=True).keys() - _KEPT_WISHES)
    if data or stray:
        what = repr(stray[0]) if stray else "calibration data"
        raise UsageError(
            f"The model is quantized already, and {what} would quantize it anew.",
            "A change of --format carries its codes over as they are; for anything else start from the original.",
        )


def refuse_quantized(infos: Iterable[TensorInfo], config: Mapping[str, Any] | None) -> None:
    """Raise InputError where weights are quantized already: quantizing twice only adds error."""
    found = quantization_of(infos, config)
    if found:
        raise InputError(
            f"The model is already quantized ({found}).",
            "Convert the original weights instead. As it is, --format alone changes its container, and --scheme bf16 "
            "turns its codes into values.",
        )
