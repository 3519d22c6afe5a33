"""What a runtime would not load or not run well, refused by name before any work: targets of checkpoint conversions.

What is said of vLLM and SGLang was read in the sources of the releases in `CHECKED`; what is said of transformers was
seen when tiny models were loaded, and first versions are the first releases whose files know the format. A version
that the user names counts where releases are known to differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantcli.checkpoint.roles import module_of
from quantcli.planning.plan import Plan, quantization_config
from quantcli.planning.rules import rule_matches
from quantcli.planning.targets.base import (
    FUSED_EXPERTS,
    Refusal,
    Target,
    declared,
    declared_alone,
    modules,
    single_experts,
)
from quantcli.planning.targets.fused import FusedLayers, fused_layers, leaf_of, mixtures, scheme_of, told_apart
from quantcli.planning.targets.transformers import FIRST_TRANSFORMERS
from quantcli.system.text import listed

#: Since then vLLM's bitsandbytes is a plug-in of its own.
_NO_BITSANDBYTES = "0.28"
#: Groups that Marlin, the kernel of both, multiplies; beside one scale per channel.
_KERNEL_GROUPS = (32, 64, 128)


def unknown_format(plan: Plan, target: Target) -> Refusal | None:
    """A version without a reader for the format."""
    first = FIRST_TRANSFORMERS.get(plan.format)
    if target.runtime == "transformers" and first and target.is_before(first):
        return Refusal(
            f"transformers reads {plan.format} from {first} on",
            "Name a newer version, or cast the model with --scheme fp16, which every version loads.",
        )
    if target.runtime == "vllm" and plan.format == "bitsandbytes" and not target.is_before(_NO_BITSANDBYTES):
        return Refusal(
            f"vLLM has no bitsandbytes of its own since {_NO_BITSANDBYTES}, only in the plug-in vllm-bnb-plugin",
            "Use --scheme int4, or leave --target out if the plug-in is there.",
        )
    return None


def zero_points(plan: Plan, target: Target) -> Refusal | None:
    """Zero points that a runtime's layers or kernels have no place for."""
    named = modules(plan.layers, lambda scheme: not scheme.weights.symmetric)
    eight_bits = modules(plan.layers, lambda scheme: not scheme.weights.symmetric and scheme.weights.dtype == "int8")
    if target.runtime == "transformers":
        if plan.format == "compressed-tensors" and named and not target.is_before("5"):
            return Refusal(
                f"{listed(named)}: asymmetric, and transformers loads zero points of compressed-tensors only with "
                "quantization_config=CompressedTensorsConfig(dequantize=True)",
                "Make the scheme symmetric, use --format gptq, or --target vllm.",
            )
    elif plan.format == "gptq" and named:
        return Refusal(
            f"{listed(named)}: asymmetric, and {target.name} runs symmetric gptq only",
            "Make the scheme symmetric, or use --format awq or compressed-tensors.",
        )
    elif target.is_fusing and eight_bits:
        return Refusal(
            f"{listed(eight_bits)}: asymmetric int8, and {target.name}'s Marlin kernel has zero points for int4 only",
            "Make the scheme symmetric.",
        )
    return None


def granularity(plan: Plan, target: Target) -> Refusal | None:
    """Scales at distances that the kernels of vLLM and SGLang do not have."""
    if not target.is_fusing or plan.format == "bitsandbytes":
        return None
    named = modules(plan.layers, lambda scheme: scheme.inputs is None and scheme.weights.granularity.kind == "tensor")
    if named:
        return Refusal(
            f"{listed(named)}: one scale for the whole weight, and {target.name} runs weights that are quantized alone "
            "with scales per channel or group",
            "Use granularity channel or group.",
        )
    groups = ", ".join(map(str, _KERNEL_GROUPS))
    named = modules(plan.layers, lambda scheme: (scheme.weights.granularity.size or 32) not in _KERNEL_GROUPS)
    if named:
        return Refusal(
            f"{listed(named)}: groups of a size that {target.name}'s Marlin kernel does not have, which are {groups}",
            f"Use --group-size with one of {groups}, scales per channel (int8), or --skip these layers.",
        )
    return None


def one_scheme(plan: Plan, target: Target) -> Refusal | None:
    """Layers that become one matrix, and the experts of one mixture, need one scheme."""
    if not target.is_fusing:
        return None
    uneven = [each for each in fused_layers(plan.layers) if len(each.schemes) > 1]
    if uneven:
        globs = " ".join(f"--skip '*.{leaf_of(part)}'" for part in uneven[0].parts)
        return Refusal(
            f"{listed([each.parent for each in uneven])}: {told_apart(uneven[0].parts)}; {target.name} makes one layer "
            "of these",
            f"Give them one scheme, or leave all of them out: {globs}",
        )
    for parent, experts in mixtures(plan.layers).items():
        if len({scheme_of(layer) for layer in experts}) > 1:
            return Refusal(
                f"{parent}: {told_apart(experts)}; {target.name} runs the experts of a layer as one",
                "Give all of them one scheme, such as one --group-size that divides both widths, or --skip all.",
            )
    return None


def seen_as_declared(plan: Plan, target: Target) -> Refusal | None:
    """Fused layers whose exception from the model's scheme the runtime does not look for under their own names."""
    section = quantization_config(plan)
    if section is None or not target.is_fusing:
        return None
    # vLLM looks for the parts' own names in compressed-tensors, as both do for layers left out.
    by_common_name = plan.format == "gptq" or (plan.format, target.runtime) == ("compressed-tensors", "sglang")
    for each in fused_layers(plan.layers):
        scheme = next(iter(each.schemes))
        names = listed([module_of(part.info.name) for part in each.parts])
        if scheme is None:
            if target.runtime == "sglang" and not _is_seen_left(each, section):
                return Refusal(
                    f"{names}: left unquantized, and SGLang looks for the exceptions of {plan.format} under the name "
                    f"{each.name} of the layer it makes of them",
                    "Use --format compressed-tensors.",
                )
        elif by_common_name and declared(section) != declared_alone(plan, scheme):
            return Refusal(
                f"{names}: {scheme}, an exception from the model's scheme, and {target.name} looks for the exceptions "
                f"of {plan.format} under the name {each.name} of the layer it makes of them",
                "Give them the scheme that most layers have"
                + (", or use --format compressed-tensors." if target.runtime == "vllm" else "."),
            )
    return None


def every_left_layer_is_seen(plan: Plan, target: Target) -> Refusal | None:
    """SGLang matches whole parts of names with bitsandbytes' list of skipped layers, transformers patterns."""
    left = [module_of(layer.info.name) for layer in plan.layers if layer.role == "linear" and not scheme_of(layer)]
    if target.runtime != "sglang" or plan.format != "bitsandbytes" or not left:
        return None
    return Refusal(
        f"{listed(left)}: left unquantized, and SGLang would take them for quantized",
        "Quantize all linear layers, or use --scheme int4.",
    )


def heads(plan: Plan, target: Target) -> Refusal | None:
    """A head that is the embedding, and one that no name in the configuration means."""
    for rule in plan.recipe.rules if quantization_config(plan) else ():
        meant = [layer for layer in plan.layers if rule_matches(rule, [layer.info.name])]
        if rule.scheme and not rule.skip and meant and all(layer.role == "tied head" for layer in meant):
            return Refusal(
                f"a rule quantizes {listed([module_of(layer.info.name) for layer in meant])}, which is the embedding's "
                f"matrix as well, and {target.name} looks words up in it",
                "Remove the rule.",
            )
    section = quantization_config(plan)
    if section is None or not target.is_fusing or plan.format != "compressed-tensors":
        return None
    for layer in plan.layers:
        scheme = scheme_of(layer)
        if layer.role == "head" and scheme and declared(section) == declared_alone(plan, scheme):
            return Refusal(
                f"{module_of(layer.info.name)}: an output head with the scheme that most layers have, and "
                f"{target.name} takes a head for quantized only where its scheme is declared by name",
                "Leave the head unquantized, or give it a scheme of its own.",
            )
    return None


def experts_left(plan: Plan, target: Target) -> Refusal | None:
    """Experts that stay unquantized where the runtime takes all experts of a model for quantized."""
    is_packed = plan.format == "compressed-tensors"
    fused = [layer.info.name for layer in plan.layers if layer.role == "experts"]
    left = [module_of(layer.info.name) for layer in single_experts(plan) if not scheme_of(layer)]
    if target.is_fusing:
        named = fused if is_packed else [*fused, *left]
    else:
        named = left if is_packed and not target.is_before(FUSED_EXPERTS) else []
    if not named or quantization_config(plan) is None:
        return None
    return Refusal(
        f"{listed(named)}: experts that stay unquantized, and {target.name} takes those of a {plan.format} model for "
        "quantized",
        "Quantize all experts, or cast the model with --scheme bf16"
        + ("; without --target they are left with a warning." if fused else "."),
    )


def inputs_of_experts(plan: Plan, target: Target) -> Refusal | None:
    """Experts with quantized inputs, or beside layers that have them, where the runtime has no such experts."""
    section = quantization_config(plan)
    if section is None or target.is_before(FUSED_EXPERTS if target.runtime == "transformers" else "0"):
        return None
    schemes = {layer: scheme for layer in single_experts(plan) if (scheme := scheme_of(layer))}
    named = [layer for layer, scheme in schemes.items() if scheme.inputs]
    if target.runtime == "vllm":
        named = [layer for layer in named if not (inputs := schemes[layer].inputs) or not inputs.dynamic]
    elif target.runtime == "sglang" and section.get("format") == "mixed-precision":
        named = list(schemes)
    if not named:
        return None
    return Refusal(
        f"{listed([module_of(layer.info.name) for layer in named])}: experts {_inputs_told(target)}, which "
        f"{target.name} does not run",
        "Give them --scheme int8 or int4, without quantized inputs, or --target vllm with --scheme int8-dynamic.",
    )


def _inputs_told(target: Target) -> str:
    return {
        "vllm": "whose inputs have fixed ranges",
        "sglang": "with quantized inputs, or beside layers that have them",
        "transformers": "with quantized inputs",
    }[target.runtime]


def _is_seen_left(fused: FusedLayers, section: Mapping[str, Any]) -> bool:
    """Whether SGLang finds fused layers among a model's exceptions, under their common name."""
    name = f"{fused.parent}.{fused.name}"
    if section["quant_method"] == "gptq":
        patterns = [pattern[2:] for pattern in section.get("dynamic", {}) if pattern.startswith("-:")]
        return any(re.match(pattern, name) for pattern in patterns)
    if section["quant_method"] == "awq":
        return any(part in name for part in section["modules_to_not_convert"])
    return True
