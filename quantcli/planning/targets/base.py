"""What the rules of every target share: the target, a refusal, and what a plan asks of a runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantcli import formats
from quantcli.checkpoint.roles import module_of
from quantcli.core.scheme import Scheme
from quantcli.planning.plan import LayerPlan, Plan, quantization_config
from quantcli.planning.targets.fused import scheme_of
from quantcli.system.text import listed

if TYPE_CHECKING:
    from quantcli.planning.recipe import Recipe

#: Since then experts are one parameter per layer in transformers.
FUSED_EXPERTS = "5"


@dataclass(frozen=True)
class Target:
    """A runtime, its version where the user named one, and the release that its rules were ``checked`` on."""

    runtime: str
    version: str | None
    checked: str

    @property
    def name(self) -> str:
        """As its makers write it."""
        return self.checked.split()[0]

    def is_before(self, version: str) -> bool:
        """Whether an older version than this one was named."""
        return self.version is not None and _numbers(self.version) < _numbers(version)


@dataclass(frozen=True)
class Refusal:
    """What is wrong, and what to do instead."""

    reason: str
    hint: str


@dataclass(frozen=True)
class GraphRequest:
    """A model that is to become a graph: its config.json, or None, and where it is to lie."""

    recipe: Recipe
    target: Target
    config: Mapping[str, Any] | None
    output: Path


@dataclass(frozen=True)
class ExportedDecoder:
    """A language model that torch exports with a key-value cache for a target.

    ``uniform``: keys and values of all layers have the same heads of one length.
    """

    target: Target
    model_type: str
    uniform: bool


@dataclass(frozen=True)
class OnnxLayout:
    """How a runtime wants a folder with a graph.

    - ``file``: the graph's place in the folder.
    - ``data``: the file beside it that holds its weights, where one message cannot.
    - ``config``: the config.json beside the graph, made of the model's own and of whether there is such a file; None
      where it is copied.
    - ``readers``: files of which one must be there for texts, images or sounds to become inputs; none for any.
    """

    file: str = "model.onnx"
    data: str = "model.onnx.data"
    config: Callable[[Mapping[str, Any], bool], dict[str, Any]] | None = None
    readers: tuple[str, ...] = ()

    def warnings(self, model: Path) -> list[str]:
        """What a model's folder lacks for this runtime."""
        if not self.readers or any((model / name).is_file() for name in self.readers):
            return []
        lacking = " and no ".join(self.readers)
        return [f"{model} has no {lacking}: the runtime opens the output, but makes no inputs of texts or images."]


class Rules(Protocol):
    """What a target's module holds.

    ``RULES``: in the order in which they are asked; the first refusal is the one that is told. ``CHECKED``: by the
    runtime's name, the release that they were checked on, begun with the name as its makers write it.
    """

    RULES: tuple[Callable[[Plan, Target], Refusal | None], ...]
    CHECKED: Mapping[str, str]
    LOADS_ONNX: bool


class OnnxRules(Rules, Protocol):
    """What the module of a target that takes ONNX holds besides.

    ``GRAPH_RULES``: asked like ``RULES``, of what becomes ONNX; ``DECODER_RULES``: of a decoder that torch would
    export. ``completed``: a recipe with what goes without saying.
    ``onnx_layout``: of a folder whose weights have a scheme, for the most part. ``onnxruntime_version``: which one a
    version of the target runs.
    """

    GRAPH_RULES: tuple[Callable[[GraphRequest], Refusal | None], ...]
    DECODER_RULES: tuple[Callable[[ExportedDecoder], Refusal | None], ...]

    def completed(self, recipe: Recipe) -> Recipe:
        """See above."""
        ...

    def onnx_layout(self, recipe: Recipe, scheme: Scheme) -> OnnxLayout:
        """See above."""
        ...

    def onnxruntime_version(self, version: str) -> str:
        """See above."""
        ...


def no_checkpoint(plan: Plan, target: Target) -> Refusal | None:
    """A rule of runtimes that take ONNX, and nothing else."""
    if plan.format == "onnx":
        return None
    return Refusal(f"{target.name} loads ONNX, not {plan.format}", "Use --format onnx.")


def experts_taken_for_quantized(names: list[str], plan: Plan, target: Target) -> Refusal | None:
    """What is said of experts that stay unquantized where the runtime takes all experts of a model for quantized."""
    if not names or quantization_config(plan) is None:
        return None
    fused = any(layer.role == "experts" for layer in plan.layers)
    return Refusal(
        f"{listed(names)}: experts that stay unquantized, and {target.name} takes those of a {plan.format} model for "
        "quantized",
        "Quantize all experts, or cast the model with --scheme bf16"
        + ("; without --target they are left with a warning." if fused else "."),
    )


def inputs_of_experts(named: list[LayerPlan], what: str, target: Target) -> Refusal | None:
    """What is said of experts that the runtime has no kernel for, because of ``what`` about quantized inputs."""
    if not named:
        return None
    return Refusal(
        f"{listed([module_of(layer.info.name) for layer in named])}: experts {what}, which {target.name} does not run",
        "Give them --scheme int8 or int4, without quantized inputs, or --target vllm with --scheme int8-dynamic.",
    )


def single_experts(plan: Plan) -> list[LayerPlan]:
    """Experts that the file holds one by one."""
    return [layer for layer in plan.layers if layer.role == "expert"]


def experts_left(plan: Plan) -> list[str]:
    """Those of them that stay unquantized."""
    return [module_of(layer.info.name) for layer in single_experts(plan) if not scheme_of(layer)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def modules(layers: Iterable[LayerPlan], holds: Callable[[Scheme], bool]) -> list[str]:
    """Names of the quantized layers of which something holds."""
    return [module_of(layer.info.name) for layer in layers if (scheme := scheme_of(layer)) and holds(scheme)]


def asymmetric(plan: Plan) -> list[str]:
    """Layers that have zero points."""
    return modules(plan.layers, lambda scheme: not scheme.weights.symmetric)


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
