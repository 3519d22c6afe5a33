"""What a runtime would not load or not run well, refused by name before any work: targets of checkpoint conversions.

What is said of vLLM and SGLang was read in the sources of the releases in `CHECKED`; what is said of transformers was
seen when tiny models were loaded, and first versions are the first releases whose files know the format. A version
that the user names counts where releases are known to differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantcli import plugins
from quantcli.artifact import quantization_config
from quantcli.errors import UsageError
from quantcli.fused import FusedLayers, fused_layers, leaf_of, mixtures, scheme_of, told_apart
from quantcli.plan import LayerPlan, Plan, matches
from quantcli.roles import module_of
from quantcli.scheme import Scheme
from quantcli.units import listed

#: The releases that the rules below were checked on.
CHECKED = {
    "transformers": "transformers 5.23.0",
    "vllm": "vLLM 0.33.0",
    "sglang": "SGLang 0.5.23",
    "onnxruntime": "onnxruntime 1.32",
}
#: The first transformers that reads a format.
_FIRST_TRANSFORMERS = {"compressed-tensors": "4.45", "gptq": "4.32", "awq": "4.35", "bitsandbytes": "4.37"}
#: Since then experts are one parameter per layer in transformers, and vLLM's bitsandbytes is a plug-in of its own.
_FUSED_EXPERTS, _NO_BITSANDBYTES = "5", "0.28"
#: Groups that Marlin, the kernel of both, multiplies; beside one scale per channel.
_KERNEL_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Target:
    """A runtime, and its version where the user named one."""

    runtime: str
    version: str | None = None

    @property
    def is_fusing(self) -> bool:
        """Whether it serves models with layers of its own, several of the checkpoint's in one."""
        return self.runtime in ("vllm", "sglang")

    @property
    def name(self) -> str:
        """As its makers write it."""
        return CHECKED[self.runtime].split()[0]

    def is_before(self, version: str) -> bool:
        """Whether an older version than this one was named."""
        return self.version is not None and _numbers(self.version) < _numbers(version)


@dataclass(frozen=True)
class Refusal:
    """What is wrong, and what to do instead."""

    reason: str
    hint: str


def for_target(plan: Plan) -> Plan:
    """The plan itself where its target loads what it would write.

    Without a target, what transformers would not load is added to the plan's warnings.

    Raises:
        UsageError: the target would not load it, or not run it well.
    """
    runtime, version = plan.recipe.runtime
    target = Target(runtime or "transformers", version)
    refusals = [refusal for rule in RULES if (refusal := rule(plan, target))]
    if runtime and refusals:
        first = refusals[0]
        raise UsageError(f"--target {plan.recipe.target}: {first.reason} (checked on {CHECKED[runtime]}).", first.hint)
    said = [f"In transformers: {refusal.reason} (checked on {CHECKED['transformers']})." for refusal in refusals]
    return replace(plan, warnings=tuple(dict.fromkeys([*plan.warnings, *said])))


def no_checkpoint(plan: Plan, target: Target) -> Refusal | None:
    """ONNX is all that onnxruntime takes."""
    if target.runtime != "onnxruntime":
        return None
    return Refusal(f"onnxruntime loads ONNX, not {plan.format}", "Use --format onnx.")


def unknown_format(plan: Plan, target: Target) -> Refusal | None:
    """A version without a reader for the format."""
    first = _FIRST_TRANSFORMERS.get(plan.format)
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
    named = _modules(plan.layers, lambda scheme: not scheme.weights.symmetric)
    eight_bits = _modules(plan.layers, lambda scheme: not scheme.weights.symmetric and scheme.weights.dtype == "int8")
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
    named = _modules(plan.layers, lambda scheme: scheme.inputs is None and scheme.weights.granularity.kind == "tensor")
    if named:
        return Refusal(
            f"{listed(named)}: one scale for the whole weight, and {target.name} runs weights that are quantized alone "
            "with scales per channel or group",
            "Use granularity channel or group.",
        )
    groups = ", ".join(map(str, _KERNEL_GROUPS))
    named = _modules(plan.layers, lambda scheme: (scheme.weights.granularity.size or 32) not in _KERNEL_GROUPS)
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


def one_width_of_experts(plan: Plan, target: Target) -> Refusal | None:
    """Experts are unpacked by transformers with one scheme for the whole model, and wrongly without a word.

    It takes the scheme whose patterns hold the word ``experts``, be they shared ones; groups it tells from shapes.
    """
    if target.runtime != "transformers" or plan.format != "compressed-tensors" or target.is_before(_FUSED_EXPERTS):
        return None
    named = [layer for layer in plan.layers if "experts" in layer.info.name and scheme_of(layer)]
    widths = {scheme.weights.dtype for layer in named if (scheme := scheme_of(layer))}
    if len(widths) < 2 or not any(layer.role == "expert" for layer in named):
        return None
    return Refusal(
        f"experts of {' and '.join(sorted(widths))}: {told_apart(named)}; transformers unpacks all experts of a model "
        "alike",
        "Give all experts of the model one dtype, shared experts as well.",
    )


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
        elif by_common_name and _declared(section) != _declared_alone(plan, scheme):
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


def one_scheme_for_gptq(plan: Plan, target: Target) -> Refusal | None:
    """In transformers gptq is loaded by optimum (2.3.0 was read), which knows one scheme for all layers."""
    schemes = sorted({str(layer.scheme) for layer in plan.layers if layer.is_coded})
    if target.runtime != "transformers" or plan.format != "gptq" or len(schemes) < 2:
        return None
    return Refusal(
        f"the layers have {len(schemes)} schemes ({listed(schemes)}), and transformers loads gptq with one",
        "Give all layers one scheme, or use --format compressed-tensors.",
    )


def heads(plan: Plan, target: Target) -> Refusal | None:
    """A head that is the embedding, and one that no name in the configuration means."""
    for rule in plan.recipe.rules if quantization_config(plan) else ():
        meant = [layer for layer in plan.layers if any(matches(glob, layer.info.name) for glob in rule.globs)]
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
        if layer.role == "head" and scheme and _declared(section) == _declared_alone(plan, scheme):
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
    left = [module_of(layer.info.name) for layer in _single_experts(plan) if not scheme_of(layer)]
    if target.is_fusing:
        named = fused if is_packed else [*fused, *left]
    else:
        named = left if is_packed and not target.is_before(_FUSED_EXPERTS) else []
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
    if section is None or target.is_before(_FUSED_EXPERTS if target.runtime == "transformers" else "0"):
        return None
    schemes = {layer: scheme for layer in _single_experts(plan) if (scheme := scheme_of(layer))}
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


def _single_experts(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers if layer.role == "expert"]


#: In the order in which they are asked.
RULES: tuple[Callable[[Plan, Target], Refusal | None], ...] = (
    no_checkpoint,
    unknown_format,
    experts_left,
    inputs_of_experts,
    zero_points,
    granularity,
    one_scheme,
    one_width_of_experts,
    one_scheme_for_gptq,
    seen_as_declared,
    every_left_layer_is_seen,
    heads,
)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _modules(layers: Iterable[LayerPlan], holds: Callable[[Scheme], bool]) -> list[str]:
    """Names of the coded layers of which something holds."""
    return [module_of(layer.info.name) for layer in layers if (scheme := scheme_of(layer)) and holds(scheme)]


def _declared(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``quantization_config`` says of layers that it does not name."""
    groups = section.get("config_groups")
    if groups is None:
        return {key: section[key] for key in ("bits", "group_size", "sym")}
    general = next(group for group in groups.values() if "Linear" in group["targets"])
    return {key: general[key] for key in ("weights", "input_activations")}


def _declared_alone(plan: Plan, scheme: Scheme) -> dict[str, Any]:
    """The same for a model whose only scheme this is."""
    return _declared(plugins.coded_format(plan.format).config({"layer": scheme}, [], plan.dtype))


def _is_seen_left(fused: FusedLayers, section: Mapping[str, Any]) -> bool:
    """Whether SGLang finds fused layers among a model's exceptions, under their common name."""
    name = f"{fused.parent}.{fused.name}"
    if section["quant_method"] == "gptq":
        patterns = [pattern[2:] for pattern in section.get("dynamic", {}) if pattern.startswith("-:")]
        return any(re.match(pattern, name) for pattern in patterns)
    if section["quant_method"] == "awq":
        return any(part in name for part in section["modules_to_not_convert"])
    return True
