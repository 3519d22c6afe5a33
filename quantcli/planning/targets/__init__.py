"""What runtimes load and run well: a plan that one would not take is refused before work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quantcli.errors import UsageError
from quantcli.planning.plan import Plan
from quantcli.planning.targets.base import CHECKED, Refusal, Target, no_checkpoint
from quantcli.planning.targets.serving import (
    every_left_layer_is_seen,
    experts_left,
    granularity,
    heads,
    inputs_of_experts,
    one_scheme,
    seen_as_declared,
    unknown_format,
    zero_points,
)
from quantcli.planning.targets.transformers import one_scheme_for_gptq, one_width_of_experts


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
