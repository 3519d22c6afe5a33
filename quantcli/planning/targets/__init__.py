"""What runtimes load and run well: a plan that one would not take is refused before work. One entry per runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantcli.core import plugins
from quantcli.core.plugins import Entry
from quantcli.core.scheme import Scheme
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from quantcli.planning.plan import Plan
    from quantcli.planning.recipe import Recipe
    from quantcli.planning.targets.base import OnnxLayout, OnnxRules, Refusal, Rules, Target

TARGETS: dict[str, Entry] = {
    "transformers": Entry("quantcli.planning.targets.transformers", "Hugging Face transformers"),
    "vllm": Entry("quantcli.planning.targets.serving", "vLLM"),
    "sglang": Entry("quantcli.planning.targets.serving", "SGLang"),
    "llama.cpp": Entry("quantcli.planning.targets.llama_cpp", "llama.cpp, by GGUF"),
    "onnxruntime": Entry("quantcli.planning.targets.onnxruntime", "ONNX Runtime"),
    "onnxruntime-genai": Entry("quantcli.planning.targets.onnxruntime", "ONNX Runtime GenAI: decoders with a cache"),
    "transformers.js": Entry("quantcli.planning.targets.transformers_js", "transformers.js, in Node and in browsers"),
}

#: Whose refusals are said as warnings where the user names no target.
_DEFAULT = "transformers"
#: Formats that another runtime is meant by.
_RUNTIME_OF_FORMAT = {"gguf": "llama.cpp"}
#: Targets that load one format alone, which a wish for them means.
_FORMAT_OF_RUNTIME = {runtime: form for form, runtime in _RUNTIME_OF_FORMAT.items()}


def for_target(plan: Plan) -> Plan:
    """The plan itself where its target loads what it would write.

    Without a target, what transformers would not load is added to the plan's warnings.

    Raises:
        UsageError: the target would not load it, or not run it well.
    """
    runtime, _ = plan.recipe.runtime
    meant = _RUNTIME_OF_FORMAT.get(plan.format, _DEFAULT)
    if runtime and plan.format in _RUNTIME_OF_FORMAT and runtime != meant:
        raise UsageError(f"--target {plan.recipe.target}: {plan.format} is for {meant}.", "Leave out one of them.")
    rules, target = _rules(runtime or meant), _target(plan.recipe, meant)
    refusals = [refusal for rule in rules.RULES if (refusal := rule(plan, target))]
    if runtime and refusals:
        raise _refused(plan.recipe, refusals[0])
    said = [f"In {target.name}: {refusal.reason} (checked on {target.checked})." for refusal in refusals]
    return replace(plan, warnings=tuple(dict.fromkeys([*plan.warnings, *said])))


def require_onnx(recipe: Recipe, config: Mapping[str, Any] | None, output: Path) -> None:
    """Raise UsageError where a recipe's target would not load what a model becomes as ONNX.

    ``config`` is the model's config.json, None where it has none.
    """
    rules = _onnx_rules(recipe)
    if rules is None:
        return
    from quantcli.planning.targets.base import GraphRequest

    request = GraphRequest(recipe, _target(recipe), config, output)
    refusals = (refusal for rule in rules.GRAPH_RULES if (refusal := rule(request)))
    if (first := next(refusals, None)) is not None:
        raise _refused(recipe, first)


def exported_decoder_refusal(recipe: Recipe, model_type: str, *, uniform: bool) -> Refusal | None:
    """Why a recipe's target would not run a decoder that torch exports with a cache; None where it would.

    ``uniform``: keys and values of all layers have the same heads of one length.
    """
    rules = _onnx_rules(recipe)
    if rules is None:
        return None
    from quantcli.planning.targets.base import ExportedDecoder

    decoder = ExportedDecoder(_target(recipe), model_type, uniform)
    return next((refusal for rule in rules.DECODER_RULES if (refusal := rule(decoder))), None)


def completed(recipe: Recipe) -> Recipe:
    """A recipe with what goes without saying for its target."""
    runtime, _ = recipe.runtime
    if runtime in _FORMAT_OF_RUNTIME and recipe.format is None:
        return recipe.model_copy(update={"format": _FORMAT_OF_RUNTIME[runtime]})
    if runtime is None or not _rules(runtime).LOADS_ONNX:
        return recipe
    return cast("OnnxRules", _rules(runtime)).completed(recipe)


def onnx_layout(recipe: Recipe, planned: Iterable[tuple[Scheme | None, int]]) -> OnnxLayout:
    """How a recipe's target wants a folder with a graph.

    ``planned`` are the schemes of its weights, None for those that stay, with how many values each has. The folder is
    called by the recipe's own scheme, or where it names none, by the one that most values are in.
    """
    from quantcli.planning.recipe import build_scheme
    from quantcli.planning.targets.base import OnnxLayout

    rules = _onnx_rules(recipe)
    if rules is None:
        return OnnxLayout()
    if recipe.scheme is not None:
        return rules.onnx_layout(recipe, build_scheme(recipe.scheme))
    values = Counter[Scheme]()
    for scheme, count in planned:
        if scheme is not None:
            values[scheme] += count
    return rules.onnx_layout(recipe, values.most_common(1)[0][0])


def onnxruntime_version(recipe: Recipe) -> str | None:
    """The onnxruntime that a recipe's target runs, where it names a version."""
    _, version = recipe.runtime
    rules = _onnx_rules(recipe)
    return None if rules is None or version is None else rules.onnxruntime_version(version)


def _onnx_rules(recipe: Recipe) -> OnnxRules | None:
    """Those of a recipe's target, if it has one. Raises UsageError where that does not load ONNX."""
    runtime, _ = recipe.runtime
    if runtime is None:
        return None
    if not _rules(runtime).LOADS_ONNX:
        raise UsageError(f"{runtime} does not load ONNX.", "Use --target onnxruntime, or another format.")
    return cast("OnnxRules", _rules(runtime))


def _target(recipe: Recipe, meant: str = _DEFAULT) -> Target:
    from quantcli.planning.targets.base import Target

    runtime, version = recipe.runtime
    name = runtime or meant
    return Target(name, version, _rules(name).CHECKED[name])


def _refused(recipe: Recipe, refusal: Refusal) -> UsageError:
    return UsageError(
        f"--target {recipe.target}: {refusal.reason} (checked on {_target(recipe).checked}).", refusal.hint
    )


def _rules(runtime: str) -> Rules:
    return cast("Rules", plugins.load(TARGETS, "target", runtime))
