"""What vLLM and SGLang load and run well, read in the sources of the releases in `CHECKED`.

One file for both, since they share kernels: both serve models with layers of their own, several of the checkpoint's
in one. A version that the user names counts where releases are known to differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantcli.checkpoint.roles import module_of
from quantcli.planning.plan import Plan, quantization_config
from quantcli.planning.targets.base import (
    Refusal,
    Target,
    asymmetric,
    declared,
    declared_alone,
    experts_left,
    experts_taken_for_quantized,
    inputs_of_experts,
    modules,
    single_experts,
)
from quantcli.planning.targets.fused import FusedLayers, fused_layers, leaf_of, mixtures, scheme_of, told_apart
from quantcli.system.text import listed

CHECKED = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23"}
LOADS_ONNX = False

#: Since then vLLM's bitsandbytes is a plug-in of its own.
_NO_BITSANDBYTES = "0.28"
#: Groups that Marlin, the kernel of both, multiplies; beside one scale per channel.
_KERNEL_GROUPS = (32, 64, 128)


def unknown_format(plan: Plan, target: Target) -> Refusal | None:
    """A version without a reader for the format."""
    if target.runtime != "vllm" or plan.format != "bitsandbytes" or target.is_before(_NO_BITSANDBYTES):
        return None
    return Refusal(
        f"vLLM has no bitsandbytes of its own since {_NO_BITSANDBYTES}, only in the plug-in vllm-bnb-plugin",
        "Use --scheme int4, or leave --target out if the plug-in is there.",
    )


def unquantized_experts(plan: Plan, target: Target) -> Refusal | None:
    """Experts that stay unquantized; single ones are found by name in compressed-tensors."""
    fused = [layer.info.name for layer in plan.layers if layer.role == "experts"]
    left = [] if plan.format == "compressed-tensors" else experts_left(plan)
    return experts_taken_for_quantized([*fused, *left], plan, target)


def quantized_inputs_of_experts(plan: Plan, target: Target) -> Refusal | None:
    """Experts with quantized inputs, or beside layers that have them, where the runtime has no such experts."""
    section = quantization_config(plan)
    if section is None:
        return None
    schemes = {layer: scheme for layer in single_experts(plan) if (scheme := scheme_of(layer))}
    if target.runtime == "vllm":
        named = [layer for layer, scheme in schemes.items() if scheme.is_static]
        return inputs_of_experts(named, "whose inputs have fixed ranges", target)
    mixed = section.get("format") == "mixed-precision"
    named = [layer for layer, scheme in schemes.items() if mixed or scheme.inputs]
    return inputs_of_experts(named, "with quantized inputs, or beside layers that have them", target)


def zero_points(plan: Plan, target: Target) -> Refusal | None:
    """Zero points that the runtimes' layers or kernels have no place for."""
    named = asymmetric(plan)
    if plan.format == "gptq" and named:
        return Refusal(
            f"{listed(named)}: asymmetric, and {target.name} runs symmetric gptq only",
            "Make the scheme symmetric, or use --format awq or compressed-tensors.",
        )
    eight_bits = modules(plan.layers, lambda scheme: not scheme.weights.symmetric and scheme.weights.dtype == "int8")
    if eight_bits:
        return Refusal(
            f"{listed(eight_bits)}: asymmetric int8, and {target.name}'s Marlin kernel has zero points for int4 only",
            "Make the scheme symmetric.",
        )
    return None


def granularity(plan: Plan, target: Target) -> Refusal | None:
    """Scales at distances that the kernels of vLLM and SGLang do not have."""
    if plan.format == "bitsandbytes":
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
    if section is None:
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


def undeclared_heads(plan: Plan, target: Target) -> Refusal | None:
    """A head that no name in the configuration means, or that the runtime has in 16 bits alone."""
    section = quantization_config(plan)
    heads = [layer for layer in plan.layers if layer.role == "head" and scheme_of(layer)]
    if plan.format == "bitsandbytes" and heads:
        return Refusal(
            f"{module_of(heads[0].info.name)}: an output head, and {target.name} has none of bitsandbytes",
            "Leave the head unquantized.",
        )
    if section is None or plan.format != "compressed-tensors":
        return None
    for layer in heads:
        scheme = scheme_of(layer)
        if scheme and declared(section) == declared_alone(plan, scheme):
            return Refusal(
                f"{module_of(layer.info.name)}: an output head with the scheme that most layers have, and "
                f"{target.name} takes a head for quantized only where its scheme is declared by name",
                "Leave the head unquantized, or give it a scheme of its own.",
            )
    return None


def _is_seen_left(fused: FusedLayers, section: Mapping[str, Any]) -> bool:
    """Whether SGLang finds fused layers among a model's exceptions, under their common name."""
    name = f"{fused.parent}.{fused.name}"
    if section["quant_method"] == "gptq":
        patterns = [pattern[2:] for pattern in section.get("dynamic", {}) if pattern.startswith("-:")]
        return any(re.match(pattern, name) for pattern in patterns)
    if section["quant_method"] == "awq":
        return any(part in name for part in section["modules_to_not_convert"])
    return True


RULES = (
    unknown_format,
    unquantized_experts,
    quantized_inputs_of_experts,
    zero_points,
    granularity,
    one_scheme,
    seen_as_declared,
    every_left_layer_is_seen,
    undeclared_heads,
)
