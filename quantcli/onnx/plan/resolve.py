"""From a recipe and a graph to a plan: what becomes of each weight, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.algorithms import ALGORITHMS, default_rounding
from quantcli.core.dtypes import DTYPE_OF_NUMBER
from quantcli.core.scheme import PRESETS, NumberFormat, Scheme
from quantcli.errors import InputError, UsageError
from quantcli.onnx.graph.operands import readers
from quantcli.onnx.graph.values import constant, input_of, integer, real
from quantcli.onnx.plan.layer_inputs import layer_input
from quantcli.onnx.plan.plan import (
    GraphPlan,
    Mode,
    NodePlan,
    counted,
    graph_quantization,
    require_work,
    undecided,
    weighted_nodes,
)
from quantcli.planning.recipe import Recipe, build_scheme
from quantcli.planning.rules import SKIPPED, Rules, label_of, no_groups, require_support, scheme_asked_for
from quantcli.planning.steps import Step, named_steps, parse_steps
from quantcli.system.text import suggestion

if TYPE_CHECKING:
    import onnx_ir as ir

#: Below this many values, codes and scales save nothing worth a node.
_SMALLEST_WEIGHT = 256


def resolve_graph(recipe: Recipe, model: ir.Model, file: Path) -> GraphPlan:
    """Decide what becomes of each weight.

    Raises:
        UsageError: no scheme, or one that does not fit, or a rule that matches nothing.
        InputError: the model is quantized already, or has nothing that the scheme applies to.
    """
    found = graph_quantization(model)
    if found:
        raise InputError(f"{file} is already quantized ({found}).", "Convert the original model instead.")
    wish = scheme_asked_for(recipe)
    scheme = build_scheme(wish)
    plan = _Planner(recipe, scheme, label_of(wish, scheme), model, file).plan()
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
        known = [value.name or "" for _, value in pairs][:20]
        names = [name for pair in pairs for name in _names(*pair)]
        self.rules.require_matches(names, lambda glob: suggestion(glob, known))
        nodes = tuple(self._rest(self._decide(node, value)) for node, value in pairs)
        warnings = counted(node.note for node in nodes)
        return GraphPlan(nodes, self.name, self.recipe, tuple(warnings), self.damping)

    def _decide(self, node: ir.Node, value: ir.Value) -> NodePlan:
        plan = undecided(node, value, self.file)
        info = plan.info
        rule = self.rules.first(*_names(node, value))
        if rule and rule.skip:
            return plan.left(SKIPPED)
        scheme, label = self.scheme, self.name
        note = None
        if rule and rule.scheme:
            scheme = build_scheme(rule.scheme)
            label = label_of(rule.scheme, scheme)
        elif scheme.weights.bits == 4 and _is_tied(value):
            scheme, note, label = PRESETS["int8"], f"int8 in place of {label}: the head reads the same table", "int8"
        plan = replace(plan, note=note)
        # A small layer between integer ones runs on integers too; elsewhere it would only cost a node.
        static = scheme.inputs is not None and not scheme.inputs.dynamic and node.op_type != "Gather"
        if info.numel < _SMALLEST_WEIGHT and not static:
            return plan.left("too small to save anything")
        if scheme.weights.is_cast:
            return self._cast(plan, scheme, label)
        if node.graph is not self.model.graph:
            return plan.left("inside a subgraph")
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
        small = plan.info.numel < _SMALLEST_WEIGHT
        if plan.mode != "float" or small or rest not in ("fp16", "bf16") or plan.info.dtype != "F32":
            return plan
        return replace(plan, mode="cast", scheme=PRESETS[rest], label=rest, reason=None, note=f"cast: {plan.reason}")

    def _cast(self, plan: NodePlan, scheme: Scheme, label: str) -> NodePlan:
        if plan.info.dtype == DTYPE_OF_NUMBER[scheme.weights.dtype]:
            return plan.left("already so")
        return replace(plan, mode="cast", scheme=scheme, label=label)

    def _quantize(self, plan: NodePlan, scheme: Scheme, label: str, wish: str) -> NodePlan:
        if scheme.inputs is not None and plan.role != "embedding":
            reason = _no_integer_kernel(plan.node, scheme.inputs)
            if reason is None:
                mode: Mode = "dynamic" if scheme.inputs.dynamic else "static"
                return self._rounded(replace(plan, mode=mode, scheme=scheme, label=label), scheme, wish)
            if plan.info.numel < _SMALLEST_WEIGHT:
                return plan.left(reason)
            note = f"int8 weights only: {reason}"
            if plan.role == "conv":
                return self._expanded(plan, note, wish)
            plan = replace(plan, note=note)
        if plan.role == "conv":
            same = scheme == PRESETS["int8"]
            other = None if same else f"int8 in place of {label}, the only form of a convolution"
            return self._expanded(plan, other, wish)
        from quantcli.onnx.plan import nbits

        # A lookup has no activations to quantize; its table is most of a small model's bytes.
        scheme = Scheme(scheme.weights)
        reason = nbits.supports(plan.node, scheme)
        if reason:
            return plan.left(reason)
        carried = nbits.effective(plan.node, scheme)
        if carried.weights.dtype != scheme.weights.dtype:
            plan = replace(plan, note=f"{carried.weights.dtype} in place of {label}, which no lookup can read")
            scheme, label, wish = carried, carried.weights.dtype, "auto"
        return self._rounded(replace(plan, mode="weights", scheme=scheme, label=label), scheme, wish)

    def _expanded(self, plan: NodePlan, note: str | None, wish: str) -> NodePlan:
        """A convolution whose weights are stored as int8, and expanded to floats when it runs."""
        scheme = PRESETS["int8"]
        plan = replace(plan, mode="weights", scheme=scheme, label="int8", note=note)
        return self._rounded(plan, scheme, wish if wish == "gptq" else "auto")

    @staticmethod
    def _rounded(plan: NodePlan, scheme: Scheme, wish: str) -> NodePlan:
        """With the algorithm that chooses the codes; one without data where a layer's inputs cannot serve."""
        algorithm = default_rounding(scheme.weights)
        if wish == "auto":
            return replace(plan, algorithm=algorithm)
        require_support(wish, scheme.weights)
        if wish != "gptq":
            return replace(plan, algorithm=wish)
        tensor = constant(plan.weight)
        assert tensor is not None
        found = "a lookup reads the same table" if _is_tied(plan.weight) else layer_input(plan.node, tensor)
        if isinstance(found, str):
            return plan.rounded_plainly(found)
        return replace(plan, algorithm="gptq", input=found)


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


def _no_integer_kernel(node: ir.Node, inputs: NumberFormat) -> str | None:
    """Why a node cannot run on integers with such inputs, or None."""
    if node.op_type == "ConvTranspose":
        return "ConvTranspose has no integer kernel"
    if node.op_type == "Conv" and inputs.dynamic:
        return "onnxruntime's dynamic convolution is many times slower than its float one"
    weight = constant(node.inputs[1])
    if weight is None:
        return "it turns a matrix that others read too"
    if weight.dtype.name != "FLOAT":
        return "integer kernels take and return float32, and this is half precision"
    if node.op_type == "MatMul":
        return None if len(weight.shape) == 2 else "the weight is not a matrix"
    bias = constant(input_of(node, 2))
    if input_of(node, 2) is not None and bias is None:
        return "the bias is not constant"
    if node.op_type == "Gemm":
        if integer(node, "transA", 0) or real(node, "alpha", 1.0) != 1.0 or real(node, "beta", 1.0) != 1.0:
            return "Gemm with a transposed or scaled input has no integer kernel"
        channels = weight.shape[0 if integer(node, "transB", 0) else 1]
        if bias is not None and not inputs.dynamic and bias.size not in (1, channels):
            return "the bias is not one value per output"
    return None


def _names(node: ir.Node, value: ir.Value) -> tuple[str, str]:
    """What a glob can mean a layer by: the name of its weight, and of the node."""
    return value.name or "", node.name or ""
