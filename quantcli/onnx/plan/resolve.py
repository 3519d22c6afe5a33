"""From a recipe and a graph to a plan: what becomes of each weight, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli import algorithms
from quantcli.algorithms import default_rounding
from quantcli.core.scheme import PRESETS, Scheme
from quantcli.errors import InputError, UsageError
from quantcli.onnx.graph.operands import readers
from quantcli.onnx.graph.values import constant
from quantcli.onnx.plan.forms import form, form_of
from quantcli.onnx.plan.layer_inputs import layer_input
from quantcli.onnx.plan.plan import (
    GraphPlan,
    NodePlan,
    counted,
    graph_quantization,
    require_work,
    undecided,
    weighted_nodes,
)
from quantcli.planning.plan import matches
from quantcli.planning.recipe import Recipe, Rule, build_scheme
from quantcli.planning.steps import Step, named_steps, parse_steps
from quantcli.system.text import suggestion

if TYPE_CHECKING:
    import onnx_ir as ir

#: What can choose the codes of a graph's weights.
ONNX_ALGORITHMS = ("rtn", "mse", "gptq")

#: Below this many values, codes and scales save nothing worth a node.
_SMALLEST_WEIGHT = 256


def resolve_graph(recipe: Recipe, model: ir.Model, file: Path) -> GraphPlan:
    """Decide what becomes of each weight.

    Raises:
        UsageError: no scheme, or one that does not fit, or a rule that matches nothing.
        InputError: the model is quantized already, or has nothing that the scheme applies to.
    """
    quantization = graph_quantization(model)
    if quantization:
        raise InputError(f"{file} is already quantized ({quantization}).", "Convert the original model instead.")
    if recipe.scheme is None:
        raise UsageError("No scheme is given.", f"Choose one with --scheme: {', '.join(PRESETS)}.")
    scheme = build_scheme(recipe.scheme)
    name = recipe.scheme if isinstance(recipe.scheme, str) else scheme.weights.dtype
    plan = _Planner(recipe, scheme, name, model, file).plan()
    require_work(plan, file)
    return plan


class _Planner:
    """Holds what the decisions share."""

    def __init__(self, recipe: Recipe, scheme: Scheme, name: str, model: ir.Model, file: Path) -> None:
        self.recipe, self.scheme, self.name, self.model, self.file = recipe, scheme, name, model, file
        step = _rounding_step(recipe)
        self.algorithm = step.name if step else "auto"
        self.damping = step.options.damping if step and step.name == "gptq" else None
        self.rules = [*(Rule(match=glob, skip=True) for glob in recipe.skip), *recipe.rules]

    def plan(self) -> GraphPlan:
        pairs = list(weighted_nodes(self.model))
        self._check_rules(pairs)
        nodes = tuple(self._rest(self._decide(node, value)) for node, value in pairs)
        warnings = counted(node.note for node in nodes)
        return GraphPlan(nodes, self.name, self.recipe, tuple(warnings), self.damping)

    def _check_rules(self, pairs: Sequence[tuple[ir.Node, ir.Value]]) -> None:
        for rule in self.rules:
            for glob in rule.globs:
                if not any(_means(glob, node, value) for node, value in pairs):
                    known = [value.name or "" for _, value in pairs]
                    raise UsageError(f"{glob!r} matches no layer.", suggestion(glob, known[:20]))

    def _decide(self, node: ir.Node, value: ir.Value) -> NodePlan:
        plan = undecided(node, value, self.file)
        info = plan.info
        rule = next((rule for rule in self.rules if any(_means(glob, node, value) for glob in rule.globs)), None)
        if rule and rule.skip:
            return plan.left("skipped as asked")
        scheme, label = self.scheme, self.name
        note = None
        if rule and rule.scheme:
            scheme = build_scheme(rule.scheme)
            label = rule.scheme if isinstance(rule.scheme, str) else scheme.weights.dtype
        elif scheme.weights.bits == 4 and _is_tied(value):
            scheme, note, label = PRESETS["int8"], f"int8 in place of {label}: the head reads the same table", "int8"
        plan = replace(plan, note=note)
        # A small layer between integer ones runs on integers too; elsewhere it would only cost a node.
        if info.numel < _SMALLEST_WEIGHT and not (scheme.is_static and node.op_type != "Gather"):
            return plan.left("too small to save anything")
        if scheme.weights.is_cast:
            return _in_form(plan, scheme, label)
        if node.graph is not self.model.graph:
            return plan.left("inside a subgraph")
        wish = (rule.algorithm if rule else None) or self.algorithm
        own = rule.group_size if rule else None
        if own is None and (scheme == self.scheme or scheme.weights.granularity.kind in ("group", "block")):
            own = self.recipe.group_size
        return self._quantize(plan, scheme, label, wish, own)

    def _rest(self, plan: NodePlan) -> NodePlan:
        """Cast what is left, where the user says so."""
        rest = self.recipe.rest
        small = plan.info.numel < _SMALLEST_WEIGHT
        if plan.form or small or rest not in ("fp16", "bf16") or plan.info.dtype != "F32":
            return plan
        return replace(plan, form="cast", scheme=PRESETS[rest], label=rest, reason=None, note=f"cast: {plan.reason}")

    def _quantize(self, plan: NodePlan, scheme: Scheme, label: str, wish: str, group_size: int | None) -> NodePlan:
        if group_size and scheme.weights.granularity.kind in ("group", "block"):
            scheme = scheme.with_group_size(group_size)
        elif group_size and plan.role != "embedding":
            raise UsageError(f"--group-size does not apply to {label}, whose scales are per channel.")
        if scheme.inputs is not None and plan.role != "embedding":
            with_inputs = _in_form(plan, scheme, label)
            if with_inputs.form:
                return self._rounded(with_inputs, wish)
            if plan.info.numel < _SMALLEST_WEIGHT:
                return with_inputs
            plan = replace(plan, note=f"int8 weights only: {with_inputs.reason}")
        # A lookup has no activations to quantize; its table is most of a small model's bytes.
        scheme = Scheme(scheme.weights)
        weights_only = _in_form(plan, scheme, label)
        if not weights_only.form:
            return weights_only
        if (other := form(weights_only.form).substitute(plan, scheme)) is not None:
            carried, why = other
            dtype = carried.weights.dtype
            note = plan.note if plan.note or carried == scheme else f"{dtype} in place of {label}, {why}"
            weights_only = replace(weights_only, scheme=carried, label=dtype, note=note)
            wish = wish if wish == "gptq" and plan.role == "conv" else "auto"
        return self._rounded(weights_only, wish)

    @staticmethod
    def _rounded(plan: NodePlan, wish: str) -> NodePlan:
        """With the algorithm that chooses the codes; one without data where a layer's inputs cannot serve."""
        assert plan.scheme is not None
        weights = plan.scheme.weights
        if wish == "auto":
            return replace(plan, algorithm=default_rounding(weights))
        if (reason := algorithms.algorithm(wish).supports(weights)) is not None:
            raise UsageError(f"The algorithm {wish} does not fit: {reason}.")
        if wish != "gptq":
            return replace(plan, algorithm=wish)
        tensor = constant(plan.weight)
        assert tensor is not None
        inputs = "a lookup reads the same table" if _is_tied(plan.weight) else layer_input(plan.node, tensor)
        if isinstance(inputs, str):
            return plan.rounded_plainly(inputs)
        return replace(plan, algorithm="gptq", input=inputs)


def _in_form(plan: NodePlan, scheme: Scheme, label: str) -> NodePlan:
    """A layer in the first form that supports it with a scheme, or left in floating point."""
    name, reason = form_of(plan, scheme)
    return replace(plan, form=name, scheme=scheme, label=label) if name else plan.left(reason)


def _rounding_step(recipe: Recipe) -> Step | None:
    """The one algorithm that a recipe asks for, or None. Raises UsageError where it is not for ONNX."""
    steps = parse_steps(named_steps(recipe))
    rules = (rule.algorithm for rule in recipe.rules if rule.algorithm)
    for name in [*(step.name for step in steps.all if step.name != "qat"), *rules]:
        if name in algorithms.ALGORITHMS and name not in (*ONNX_ALGORITHMS, "auto"):
            known = ", ".join((*ONNX_ALGORITHMS, "qat"))
            raise UsageError(f"The algorithm {name} does not work on ONNX graphs.", f"Choose among {known}.")
    return steps.rounding


def _is_tied(value: ir.Value) -> bool:
    """Whether a table is looked up in, and is the matrix of a product as well.

    At four bits such a head costs more than all layers together: SmolLM2-135M's perplexity, 16.1 in float32, was
    26.7 with it at four bits and 21.5 at eight, for 14 MB more in 76.
    """
    operators = {node.op_type for node in readers(value)}
    return "Gather" in operators and bool(operators & {"MatMul", "Gemm"})


def _means(glob: str, node: ir.Node, value: ir.Value) -> bool:
    """Whether a glob means this layer: by its weight's name, its module's, or the node's."""
    return matches(glob, value.name or "") or matches(glob, node.name or "")
