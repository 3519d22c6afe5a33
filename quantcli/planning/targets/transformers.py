"""What transformers loads."""

from __future__ import annotations

from quantcli.planning.plan import Plan
from quantcli.planning.targets.base import FUSED_EXPERTS, Refusal, Target
from quantcli.planning.targets.fused import scheme_of, told_apart
from quantcli.system.text import listed

#: The first transformers that reads a format.
FIRST_TRANSFORMERS = {"compressed-tensors": "4.45", "gptq": "4.32", "awq": "4.35", "bitsandbytes": "4.37"}


def one_width_of_experts(plan: Plan, target: Target) -> Refusal | None:
    """Experts are unpacked by transformers with one scheme for the whole model, and wrongly without a word.

    It takes the scheme whose patterns hold the word ``experts``, be they shared ones; groups it tells from shapes.
    """
    if target.runtime != "transformers" or plan.format != "compressed-tensors" or target.is_before(FUSED_EXPERTS):
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


def one_scheme_for_gptq(plan: Plan, target: Target) -> Refusal | None:
    """In transformers gptq is loaded by optimum (2.3.0 was read), which knows one scheme for all layers."""
    schemes = sorted({str(layer.scheme) for layer in plan.layers if layer.has_codes})
    if target.runtime != "transformers" or plan.format != "gptq" or len(schemes) < 2:
        return None
    return Refusal(
        f"the layers have {len(schemes)} schemes ({listed(schemes)}), and transformers loads gptq with one",
        "Give all layers one scheme, or use --format compressed-tensors.",
    )
