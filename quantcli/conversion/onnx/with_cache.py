"""What a conversion adds for a decoder that torch exported: its head's scheme, its proof, how runtimes open it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.conversion.decoder.exported import prove_exported
from quantcli.conversion.decoder.recipe import HEAD_SCHEME
from quantcli.conversion.onnx.explained import Honest
from quantcli.conversion.onnx.source import Source
from quantcli.export.cache_shape import read_cache_shape
from quantcli.export.decoder.architecture import why_not_built
from quantcli.export.decoder.genai import Dimensions, genai_config
from quantcli.models.decoder import GENAI_CONFIG, LOGITS
from quantcli.models.hugging_face import load_config
from quantcli.models.positions import longest_sequence
from quantcli.onnx.graph.operands import Operand, operand_of
from quantcli.onnx.graph.save import save_graph
from quantcli.planning.recipe import Recipe, Rule, build_scheme
from quantcli.planning.rules import rule_matches
from quantcli.planning.targets.base import OnnxLayout
from quantcli.system.files import write_json

if TYPE_CHECKING:
    import onnx_ir as ir

#: What onnxruntime-genai calls any decoder that has the usual inputs and outputs.
_ANY_DECODER = "decoder"


def with_head_scheme(recipe: Recipe, graph: ir.Model) -> Recipe:
    """The recipe with a rule for the head of a decoder, unless it has one, as decoders that are built have it."""
    if recipe.scheme is None or (head := _head(graph)) is None:
        return recipe
    operand, scheme = operand_of(head), build_scheme(recipe.scheme)
    if not isinstance(operand, Operand) or scheme.inputs is not None or scheme.weights.is_cast:
        return recipe
    names = [name for name in (operand.value.name, head.name) if name]
    if any(rule_matches(rule, names) for rule in (*recipe.rules, *(Rule(match=glob) for glob in recipe.skip))):
        return recipe
    return recipe.model_copy(update={"rules": [*recipe.rules, Rule(match=names, scheme=HEAD_SCHEME)]})


def _head(graph: ir.Model) -> ir.Node | None:
    """The product that logits are made with, behind what bounds or scales them."""
    value = next((each for each in graph.graph.outputs if each.name == LOGITS), None)
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in ("MatMul", "Gemm"):
            return node
        value = next((each for each in node.inputs if each is not None and each.producer() is not None), None)
    return None


def prove_cache(artifact: Path, honest: Honest, source: Source, scratch: Path) -> dict[str, Any]:
    """Run an artifact from its cache, and beside its decoded form, which is written into ``scratch``.

    Raises:
        InputError: its logits are not those that they should be.
    """
    decoded = scratch / "decoded_cache.onnx"
    save_graph(honest.decoded(), decoded)
    cast = any(outcome.plan.form == "cast" for outcome in honest.outcomes)
    return prove_exported(artifact, decoded, source.exported_db, Path(source.subject.path), cast=cast)


def write_decoder_config(folder: Path, out: Path, layout: OnnxLayout) -> list[str]:
    """Write how onnxruntime-genai opens a decoder; returns a warning of what the decoder is.

    Targets with a config.json of their own need none.
    """
    config = load_config(folder).get_text_config(decoder=True)
    cache = read_cache_shape(folder).uniform
    if layout.config is None and cache is not None:
        kv_heads, head_dim = cache
        dimensions = Dimensions(
            _ANY_DECODER, longest_sequence(folder), config.vocab_size, config.hidden_size, config.num_attention_heads,
            kv_heads, head_dim, config.num_hidden_layers, in_place=False,
        )  # fmt: skip
        write_json(out / GENAI_CONFIG, genai_config(dimensions, folder, layout.file))
    return [
        f"It was exported by torch, with a cache, in standard operators, which are slower than fused ones: "
        f"{why_not_built(folder)}."
    ]
