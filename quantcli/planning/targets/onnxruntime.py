"""What onnxruntime loads. What its versions run is decided node by node: see `quantcli.onnx.plan.runtime_version`.

Decoders with a key-value cache, which onnxruntime-genai generates with, are checked by being run.
"""

from __future__ import annotations

from collections.abc import Callable

from quantcli.core.scheme import Scheme
from quantcli.planning.recipe import Recipe
from quantcli.planning.targets.base import ExportedDecoder, GraphRequest, OnnxLayout, Refusal, no_checkpoint

CHECKED = {"onnxruntime": "onnxruntime 1.32", "onnxruntime-genai": "onnxruntime-genai 0.18"}
LOADS_ONNX = True
#: The runtime that a checkpoint becomes ONNX for without being told so, as it loads nothing else.
_OF_DECODERS = "onnxruntime-genai"

RULES = (no_checkpoint,)
GRAPH_RULES: tuple[Callable[[GraphRequest], Refusal | None], ...] = ()


def one_cache_size(decoder: ExportedDecoder) -> Refusal | None:
    """A rule of onnxruntime-genai, whose genai_config.json tells one size of keys and values for all layers."""
    if decoder.uniform or decoder.target.runtime != _OF_DECODERS:
        return None
    return Refusal(
        f"keys and values of {decoder.model_type} have several sizes, and {decoder.target.name} takes one",
        "Use --target onnxruntime, which takes the decoder as it is.",
    )


DECODER_RULES = (one_cache_size,)


def completed(recipe: Recipe) -> Recipe:
    """The recipe with the format of decoders; for onnxruntime itself, a checkpoint becomes ONNX where users say so."""
    if recipe.runtime[0] != _OF_DECODERS or recipe.format:
        return recipe
    return recipe.model_copy(update={"format": "onnx"})


def onnx_layout(recipe: Recipe, scheme: Scheme) -> OnnxLayout:
    """``model.onnx`` in the folder."""
    return OnnxLayout()


def onnxruntime_version(version: str) -> str:
    """The version itself."""
    return version
