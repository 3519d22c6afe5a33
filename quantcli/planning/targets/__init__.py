"""What runtimes load and run well: a plan that one would not take is refused before work. One entry per runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from quantcli.core import plugins
from quantcli.core.plugins import Entry
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from quantcli.planning.plan import Plan
    from quantcli.planning.recipe import Recipe
    from quantcli.planning.targets.base import Rules

TARGETS: dict[str, Entry] = {
    "transformers": Entry("quantcli.planning.targets.transformers", "Hugging Face transformers"),
    "vllm": Entry("quantcli.planning.targets.serving", "vLLM"),
    "sglang": Entry("quantcli.planning.targets.serving", "SGLang"),
    "llama.cpp": Entry("quantcli.planning.targets.llama_cpp", "llama.cpp, by GGUF"),
    "onnxruntime": Entry("quantcli.planning.targets.onnxruntime", "ONNX Runtime"),
}

#: Whose refusals are said as warnings where the user names no target.
_DEFAULT = "transformers"
#: Formats that another runtime is meant by.
_RUNTIME_OF_FORMAT = {"gguf": "llama.cpp"}
#: Targets that load one format alone, which a wish for them means.
_FORMAT_OF_RUNTIME = {runtime: form for form, runtime in _RUNTIME_OF_FORMAT.items()}


def format_for(recipe: Recipe) -> str | None:
    """The format that a recipe asks for by itself, or by its target."""
    return recipe.format or _FORMAT_OF_RUNTIME.get(recipe.runtime[0] or "")


def for_target(plan: Plan) -> Plan:
    """The plan itself where its target loads what it would write.

    Without a target, what transformers would not load is added to the plan's warnings.

    Raises:
        UsageError: the target would not load it, or not run it well.
    """
    from quantcli.planning.targets.base import Target

    runtime, version = plan.recipe.runtime
    meant = _RUNTIME_OF_FORMAT.get(plan.format, _DEFAULT)
    if runtime and plan.format in _RUNTIME_OF_FORMAT and runtime != meant:
        raise UsageError(f"--target {plan.recipe.target}: {plan.format} is for {meant}.", "Leave out one of them.")
    rules = _rules(runtime or meant)
    checked = rules.CHECKED[runtime or meant]
    target = Target(runtime or meant, version, checked)
    refusals = [refusal for rule in rules.RULES if (refusal := rule(plan, target))]
    if runtime and refusals:
        first = refusals[0]
        raise UsageError(f"--target {plan.recipe.target}: {first.reason} (checked on {checked}).", first.hint)
    said = [f"In {target.name}: {refusal.reason} (checked on {checked})." for refusal in refusals]
    return replace(plan, warnings=tuple(dict.fromkeys([*plan.warnings, *said])))


def require_onnx(recipe: Recipe) -> None:
    """Raise UsageError where a recipe's target does not load ONNX."""
    runtime, _ = recipe.runtime
    if runtime and not _rules(runtime).LOADS_ONNX:
        raise UsageError(f"{runtime} does not load ONNX.", "Use --target onnxruntime, or another format.")


def _rules(runtime: str) -> Rules:
    return cast("Rules", plugins.load(TARGETS, "target", runtime))
