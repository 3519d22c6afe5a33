"""What can be asked of a checkpoint that is quantized already."""

from __future__ import annotations

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.errors import UsageError
from quantcli.planning.recipe import Recipe
from quantcli.planning.resolve import refuse_quantized

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
