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
    "onnxruntime": Entry("quantcli.planning.targets.onnxruntime", "ONNX Runtime"),
    "onnxruntime-genai": Entry("quantcli.planning.targets.onnxruntime", "ONNX Runtime GenAI: decoders with a cache"),
}

#: Whose refusals are said as warnings where the user names no target.
_DEFAULT = "transformers"


def for_target(plan: Plan) -> Plan:
    """The plan itself where its target loads what it would write.

    Without a target, what transformers would not load is added to the plan's warnings.

    Raises:
        UsageError: the target would not load it, or not run it well.
    """
    from quantcli.planning.targets.base import Target

    runtime, version = plan.recipe.runtime
    rules = _rules(runtime or _DEFAULT)
    checked = rules.CHECKED[runtime or _DEFAULT]
    target = Target(runtime or _DEFAULT, version, checked)
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
