"""From a recipe and a graph to a plan: what becomes of each weight, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.algorithms import ALGORITHMS, default_rounding
from quantcli.core.scheme import PRESETS, Scheme
from quantcli.errors import InputError, UsageError
from quantcli.onnx.graph.operands import readers
from quantcli.onnx.graph.values import constant
from quantcli.onnx.plan.forms import form, form_of
from quantcli.onnx.plan.layer_inputs import LayerInput, layer_input
from quantcli.onnx.plan.plan import (
    GraphPlan,
    NodePlan,
    counted,
    graph_quantization,
    require_work,
    undecided,
    weighted_nodes,
)
from quantcli.planning.recipe import Recipe, Rule, build_scheme
from quantcli.planning.rules import SKIPPED, Fate, Rules, label_of, no_groups, require_support, scheme_asked_for
from quantcli.planning.steps import Step, named_steps, parse_steps
from quantcli.system.text import suggestion

if TYPE_CHECKING:
    import onnx_ir as ir

#: Below this many values, codes and scales save nothing worth a node.
_SMALLEST_WEIGHT = 256

_IN_A_BODY = "inside a subgraph, whose values are not calibrated"


def resolve_graph(recipe: Recipe, model: ir.Model, file: Path) -> GraphPlan:
    """Decide what becomes of each weight.

    Raises:
        UsageError: no scheme, or one that does not fit, or a rule that matches nothing.
        InputError: the model has nothing that the scheme applies to, such as one that is quantized already.
    """
    quantization = graph_quantization(model)
    wish = scheme_asked_for(recipe)
    scheme = build_scheme(wish)
    plan = _Planner(recipe, scheme, label_of(wish, scheme), model, file).plan()
    if quantization and not any(node.form for node in plan.nodes):
        left = counted(node.reason for node in plan.nodes)
        why = f" Of what is left: {' '.join(left)}" if left else ""
        raise InputError(f"{file} is already quantized ({quantization}).{why}", "Convert the original model instead.")
    if quantization:
        kept = f"The model is quantized in part already ({quantization}); what is quantized stays as it is."
        plan = replace(plan, warnings=(kept, *plan.warnings))
    require_work(plan, file)
    return plan


class _Planner:
    """Holds what the decisions share."""

    def __init__(self, recipe: Recipe, scheme: Scheme, name: str, model: ir.Model, file: Path) -> None:
        self.recipe, self.scheme, self.name, self.model, self.file = recipe, scheme, name, model, file
        step = _rounding_step(recipe)
        self.algorithm = step.name if step else "auto"
        self.damping = step.options.damping if step and step.name == "gptq" else None
        self.rules = Rules(recipe)

    def plan(self) -> GraphPlan:
        pairs = list(weighted_nodes(self.model))
        known = [weight.value.name or "" for _, weight in pairs][:20]
        names = [name for node, weight in pairs for name in _names(node, weight.value)]
        self.rules.require_matches(names, lambda glob: suggestion(glob, known))
        rules = [self.rules.first(*_names(node, weight.value)) for node, weight in pairs]
        decided = [
            self._decide(undecided(self.model, node, weight, self.file), rule)
            for (node, weight), rule in zip(pairs, rules, strict=True)
        ]
        fates = [Fate(_names(plan.node, plan.weight), None if plan.form else plan.reason) for plan in decided]
        warnings = self.rules.require_obeyed(zip(rules, fates, strict=True))
        nodes = tuple(self._rest(plan) for plan in self._in_pairs(decided))
        warnings += counted(node.note for node in nodes)
        return GraphPlan(nodes, self.name, self.recipe, tuple(warnings), self.damping)

    def _decide(self, plan: NodePlan, rule: Rule | None) -> NodePlan:
        node, value, info = plan.node, plan.weight, plan.info
        if rule and rule.skip:
            return plan.left(SKIPPED)
        scheme, label = self.scheme, self.name
        if not info.numel:
            return plan.left("it holds no values")
        if value.is_graph_output():
            # Its codes would be one more constant beside it.
            return plan.left("its weight is an output of the model")
        note = None
        if rule and rule.scheme:
            scheme = build_scheme(rule.scheme)
            label = label_of(rule.scheme, scheme)
        elif scheme.weights.bits == 4 and _is_tied(value):
            scheme, note, label = PRESETS["int8"], f"int8 in place of {label}: the head reads the same table", "int8"
        plan = replace(plan, note=note)
        # A small layer between integer ones runs on integers too; elsewhere it would only cost a node.
        if info.numel < _SMALLEST_WEIGHT and not (scheme.is_static and node.op_type != "Gather"):
            return plan.left("too small to save anything")
        if scheme.weights.is_cast:
            return _in_form(plan, scheme, label)
        wish = (rule.algorithm if rule else None) or self.algorithm
        size = self.rules.group_size(rule)
        if size and scheme.weights.is_grouped:
            scheme = scheme.with_group_size(size)
        elif size and plan.role != "embedding" and (scheme == self.scheme or (rule and rule.group_size)):
            raise no_groups(label, scheme)
        return self._quantize(plan, scheme, label, wish)

    def _rest(self, plan: NodePlan) -> NodePlan:
        """Cast what is left, where the user says so."""
        rest = self.recipe.rest
        stays = plan.info.numel < _SMALLEST_WEIGHT or plan.weight.is_graph_output()
        if plan.form or stays or rest not in ("fp16", "bf16") or plan.info.dtype not in ("F32", "F64"):
            return plan
        return replace(plan, form="cast", scheme=PRESETS[rest], label=rest, reason=None, note=f"cast: {plan.reason}")

    def _quantize(self, plan: NodePlan, scheme: Scheme, label: str, wish: str) -> NodePlan:
        if scheme.is_static and self._is_in_body(plan) and plan.role != "embedding":
            # The values of a body are not calibrated: ranges are found at inference.
            scheme, label = replace(scheme, inputs=PRESETS["int8-dynamic"].inputs), "int8-dynamic"
            plan = replace(plan, note=_IN_A_BODY)
        if scheme.inputs is not None and plan.role != "embedding":
            with_inputs = _in_form(plan, scheme, label)
            if with_inputs.form:
                return self._rounded(_at_inference(with_inputs), wish)
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

    def _in_pairs(self, plans: list[NodePlan]) -> Iterator[NodePlan]:
        """The plans, where an integer LSTM without one of its two weights has the other stored in few bits alone."""
        whole = Counter(plan.node for plan in plans if plan.form == "recurrent")
        for plan in plans:
            if plan.form != "recurrent" or whole[plan.node] == 2:
                yield plan
                continue
            assert plan.scheme is not None
            alone = replace(plan, form="stored", scheme=Scheme(plan.scheme.weights))
            yield replace(alone, note="int8 weights only: the other weight of the LSTM is not quantized")

    def _rounded(self, plan: NodePlan, wish: str) -> NodePlan:
        """With the algorithm that chooses the codes; one without data where a layer's inputs cannot serve."""
        assert plan.scheme is not None
        weights = plan.scheme.weights
        if wish == "auto":
            return replace(plan, algorithm=default_rounding(weights))
        require_support(wish, weights)
        if wish != "gptq":
            return replace(plan, algorithm=wish)
        tensor = constant(plan.weight)
        assert tensor is not None
        if self._is_in_body(plan):
            inputs: LayerInput | str = _IN_A_BODY
        else:
            inputs = "a lookup reads the same table" if _is_tied(plan.weight) else layer_input(plan.node, tensor)
        if plan.form == "stored" and not isinstance(inputs, str):
            inputs = "its weight is stored for readers of several kinds"
        if isinstance(inputs, str):
            return plan.rounded_plainly(inputs)
        if weights.granularity.kind == "block" and inputs.columns % (weights.granularity.size or 1):
            return plan.rounded_plainly("its blocks reach over the ends of rows")
        return replace(plan, algorithm="gptq", input=inputs)

    def _is_in_body(self, plan: NodePlan) -> bool:
        return plan.node.graph is not self.model.graph


def _in_form(plan: NodePlan, scheme: Scheme, label: str) -> NodePlan:
    """A layer in the first form that supports it with a scheme, or left in floating point."""
    name, reason = form_of(plan, scheme)
    return replace(plan, form=name, scheme=scheme, label=label) if name else plan.left(reason)


def _at_inference(plan: NodePlan) -> NodePlan:
    """A layer with its true label, where fixed ranges were asked for and its inputs get theirs at inference."""
    if plan.form == "static" or plan.scheme is None or not plan.scheme.is_static:
        return plan
    why = "onnxruntime has no integer LSTM with fixed ranges"
    return replace(plan, label="int8-dynamic", note=f"ranges found at inference: {why}")


def _rounding_step(recipe: Recipe) -> Step | None:
    """The one algorithm that a recipe asks for, or None. Raises UsageError where it is not for ONNX."""
    steps = parse_steps(named_steps(recipe))
    suited = [name for name, entry in ALGORITHMS.items() if entry.onnx]
    rounding = [name for name in suited if ALGORITHMS[name].is_rounding]
    rules = (rule.algorithm for rule in recipe.rules if rule.algorithm in ALGORITHMS)
    stray = [step.name for step in steps.all if step.name not in suited] + [n for n in rules if n not in rounding]
    if stray:
        known = ", ".join(suited)
        raise UsageError(f"The algorithm {stray[0]} does not work on ONNX graphs.", f"Choose among {known}.")
    return steps.rounding


def _is_tied(value: ir.Value) -> bool:
    """Whether a table is looked up in, and is the matrix of a product as well.

    At four bits such a head costs more than all layers together: SmolLM2-135M's perplexity, 16.1 in float32, was
    26.7 with it at four bits and 21.5 at eight, for 14 MB more in 76.
    """
    operators = {node.op_type for node in readers(value)}
    return "Gather" in operators and bool(operators & {"MatMul", "Gemm"})


def _names(node: ir.Node, value: ir.Value) -> tuple[str, str]:
    """What a glob can mean a layer by: the name of its weight, and of the node."""
    return value.name or "", node.name or ""
