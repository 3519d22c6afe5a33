"""What transformers loads: seen when tiny models were loaded; first versions are those whose files know the format."""

from __future__ import annotations

from quantcli.planning.plan import LayerPlan, Plan, quantization_config
from quantcli.planning.rules import SKIPPED
from quantcli.planning.targets.base import (
    FUSED_EXPERTS,
    Refusal,
    Target,
    asymmetric,
    experts_left,
    experts_taken_for_quantized,
    inputs_of_experts,
    single_experts,
)
from quantcli.planning.targets.fused import scheme_of, told_apart
from quantcli.system.text import listed

CHECKED = {"transformers": "transformers 5.23.0"}
LOADS_ONNX = False

#: The first transformers that reads a format.
_FIRST = {"compressed-tensors": "4.45", "gptq": "4.32", "awq": "4.35", "bitsandbytes": "4.37"}


def unknown_format(plan: Plan, target: Target) -> Refusal | None:
    """A version without a reader for the format."""
    first = _FIRST.get(plan.format)
    if not first or not target.is_before(first):
        return None
    return Refusal(
        f"transformers reads {plan.format} from {first} on",
        "Name a newer version, or cast the model with --scheme fp16, which every version loads.",
    )


def unquantized_experts(plan: Plan, target: Target) -> Refusal | None:
    """Single experts that stay unquantized among others that do not, since they are fused into one parameter.

    Those that the class does not load, such as of multi-token prediction, are fused with none.
    """
    fuses = plan.format == "compressed-tensors" and not target.is_before(FUSED_EXPERTS)
    mixed = fuses and any(layer.has_codes for layer in single_experts(plan))
    left = [name for name in experts_left(plan) if f"{name}.weight" not in plan.loader.unknown]
    return experts_taken_for_quantized(left if mixed else [], plan, target)


def fused_experts(plan: Plan, target: Target) -> Refusal | None:
    """Experts that the file holds as one tensor, where the library was asked and takes them in no other form.

    Without a target they stay unquantized, and a warning says how much of the model that is.
    """
    left = [layer for layer in plan.layers if layer.role == "experts" and not scheme_of(layer)]
    named = [layer.info.name for layer in left if layer.reason != SKIPPED]
    if not named or not plan.loader.name or plan.recipe.target is None or quantization_config(plan) is None:
        return None
    return Refusal(
        f"{listed(named)}: fused experts, which {plan.loader.name} of transformers does not load as codes of "
        f"{plan.format}",
        "--skip '*experts*' quantizes all but the experts; without --target they are left with a warning.",
    )


def quantized_inputs_of_experts(plan: Plan, target: Target) -> Refusal | None:
    """Experts with quantized inputs."""
    if quantization_config(plan) is None or target.is_before(FUSED_EXPERTS):
        return None
    named = [layer for layer in single_experts(plan) if (scheme := scheme_of(layer)) and scheme.inputs]
    return inputs_of_experts(named, "with quantized inputs", target)


def zero_points(plan: Plan, target: Target) -> Refusal | None:
    """Zero points that are loaded only with an option."""
    named = asymmetric(plan)
    if plan.format != "compressed-tensors" or not named or target.is_before("5"):
        return None
    return Refusal(
        f"{listed(named)}: asymmetric, and transformers loads zero points of compressed-tensors only with "
        "quantization_config=CompressedTensorsConfig(dequantize=True)",
        "Make the scheme symmetric, use --format gptq, or --target vllm.",
    )


def one_scheme_of_experts(plan: Plan, target: Target) -> Refusal | None:
    """Experts are unpacked by transformers with one scheme for the whole model, and wrongly without a word.

    It takes the scheme whose patterns hold the word ``experts``, be they shared ones. A row that is one group, or has
    one scale, it unpacks with groups of any size.
    """
    if plan.format != "compressed-tensors" or target.is_before(FUSED_EXPERTS):
        return None
    named = [layer for layer in plan.layers if "experts" in layer.info.name and scheme_of(layer)]
    widths = sorted({scheme.weights.dtype for layer in named if (scheme := scheme_of(layer))})
    groups = sorted({size for layer in named if (size := _group_size(layer))})
    if max(len(widths), len(groups)) < 2 or not any(layer.role == "expert" for layer in named):
        return None
    kinds = widths if len(widths) > 1 else [f"groups of {size}" for size in groups]
    return Refusal(
        f"experts of {' and '.join(kinds)}: {told_apart(named)}; transformers unpacks all experts of a model alike",
        "Give all experts of the model one scheme and group size, shared experts as well.",
    )


def _group_size(layer: LayerPlan) -> int | None:
    """Columns that share a scale, where a row has several such groups."""
    scheme = scheme_of(layer)
    size = scheme.weights.granularity.size if scheme else None
    return size if size and size < layer.matrix_shape[1] else None


def one_scheme_for_gptq(plan: Plan, target: Target) -> Refusal | None:
    """In transformers gptq is loaded by optimum (2.3.0 was read), which knows one scheme for all layers."""
    schemes = sorted({str(layer.scheme) for layer in plan.layers if layer.has_codes})
    if plan.format != "gptq" or len(schemes) < 2:
        return None
    return Refusal(
        f"the layers have {len(schemes)} schemes ({listed(schemes)}), and transformers loads gptq with one",
        "Give all layers one scheme, or use --format compressed-tensors.",
    )


def mixtures(plan: Plan) -> list[Refusal]:
    """What the installed transformers would not load of a mixture of experts, which it unpacks as it loads them."""
    target = Target("transformers", None, CHECKED["transformers"])
    rules = (unquantized_experts, one_scheme_of_experts)
    return [refusal for rule in rules if (refusal := rule(plan, target))]


RULES = (
    unknown_format,
    unquantized_experts,
    fused_experts,
    quantized_inputs_of_experts,
    zero_points,
    one_scheme_of_experts,
    one_scheme_for_gptq,
)
