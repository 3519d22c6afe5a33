"""What the rules of every target share: the target, a refusal, and what a plan asks of a runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantcli import formats
from quantcli.checkpoint.roles import module_of
from quantcli.core.scheme import Scheme
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.targets.fused import scheme_of

#: The releases that the rules below were checked on.
CHECKED = {
    "transformers": "transformers 5.23.0",
    "vllm": "vLLM 0.33.0",
    "sglang": "SGLang 0.5.23",
    "onnxruntime": "onnxruntime 1.32",
}
#: Since then experts are one parameter per layer in transformers.
FUSED_EXPERTS = "5"


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


def no_checkpoint(plan: Plan, target: Target) -> Refusal | None:
    """ONNX is all that onnxruntime takes."""
    if target.runtime != "onnxruntime":
        return None
    return Refusal(f"onnxruntime loads ONNX, not {plan.format}", "Use --format onnx.")


def single_experts(plan: Plan) -> list[LayerPlan]:
    """Experts that the file holds one by one."""
    return [layer for layer in plan.layers if layer.role == "expert"]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def modules(layers: Iterable[LayerPlan], holds: Callable[[Scheme], bool]) -> list[str]:
    """Names of the coded layers of which something holds."""
    return [module_of(layer.info.name) for layer in layers if (scheme := scheme_of(layer)) and holds(scheme)]


def declared(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``quantization_config`` says of layers that it does not name."""
    groups = section.get("config_groups")
    if groups is None:
        return {key: section[key] for key in ("bits", "group_size", "sym")}
    general = next(group for group in groups.values() if "Linear" in group["targets"])
    return {key: general[key] for key in ("weights", "input_activations")}


def declared_alone(plan: Plan, scheme: Scheme) -> dict[str, Any]:
    """The same for a model whose only scheme this is."""
    return declared(formats.quantized_format(plan.format).config({"layer": scheme}, [], plan.dtype))
