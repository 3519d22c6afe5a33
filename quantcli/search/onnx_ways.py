"""What can become of each layer of a graph, in how many bytes and with how much work."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from quantcli.core.scheme import PRESETS
from quantcli.errors import BudgetError, InputError
from quantcli.onnx.graph.operands import channel_axis
from quantcli.onnx.graph.values import constant, is_standard
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.planning.recipe import Recipe, validate
from quantcli.planning.rules import Rules
from quantcli.search.budget import FLOAT
from quantcli.search.choices import Choice, Group, Mix, chosen, rules_of
from quantcli.search.onnx_runs import GraphRuns, Rule, noise_of

#: Sizes of groups that are tried, finest first, where the user names none.
_GROUP_SIZES = (32, 64, 128)

#: The time that a form takes by that of the float kernel, about: what decides between mixes that are alike in all
#: else must be the same on every machine. Measured on AVX-512 with onnxruntime 1.32, see the facts in
#: `quantcli.onnx.rewrite`.
_WORK = {"static": 0.5, "dynamic": 0.5, "recurrent": 0.6, "nbits": 0.9, "cast": 1.05}

#: A convolution whose weight is restored at every run.
_WORK_OF_RESTORED = 1.5


def ways_to_store(recipe: Recipe, allow: Sequence[str]) -> dict[str, Rule]:
    """What a recipe's rule says for each way to store a layer, by what people call it, as the user ordered them."""
    ways: dict[str, Rule] = {}
    for name in allow:
        if name == FLOAT:
            ways[FLOAT] = (("skip", True),)
        elif PRESETS[name].weights.granularity.kind == "group":
            for size in (recipe.group_size,) if recipe.group_size else _GROUP_SIZES:
                ways[f"{name} group {size}"] = (("scheme", name), ("group_size", size))
        else:
            ways[name] = (("scheme", name),)
    return ways


def uniform_recipe(recipe: Recipe, rule: Rule) -> Recipe:
    """A recipe with one way to store for all layers that its own rules do not mean."""
    own = recipe.model_dump(exclude_unset=True)
    own.pop("group_size", None)
    scheme = {"scheme": wish} if (wish := dict(rule).get("scheme")) else {}
    return validate(own | scheme | {"rules": [*own.get("rules", []), {"match": "*", **dict(rule)}]}, "the search")


@dataclass(frozen=True)
class Layer:
    """Nodes that read one weight, and about how many multiplications they do in one run."""

    name: str
    nbytes: int
    work: float


@dataclass(frozen=True)
class Ways:
    """The layers that a search decides on, and what each can become.

    Attributes:
        recipe: the user's, whose own rules and skips hold before all others.
        rules: what a recipe says for each way, by its label.
        layers: in the graph's order.
        bytes_of: what a layer takes in the artifact, by its name and a way's label; only ways that differ are listed.
        factor_of: the time it takes by that of the float kernel, likewise.
        error_of: noise by signal of the weight itself, likewise.
        rest: bytes of the artifact beside the layers, about.
    """

    recipe: Recipe
    rules: Mapping[str, Rule]
    layers: Sequence[Layer]
    bytes_of: Mapping[str, Mapping[str, int]]
    factor_of: Mapping[str, Mapping[str, float]]
    error_of: Mapping[str, Mapping[str, float]]
    rest: int

    def groups(self, costs: Mapping[str, Mapping[str, float]]) -> list[Group]:
        """What the solver chooses of; ``costs`` are by layer and label, and a way that has none is not offered."""
        found = []
        for layer in self.layers:
            known = costs[layer.name]
            choices = tuple(
                Choice(label, self.rules[label], nbytes, known[label], layer.work * self.factor_of[layer.name][label])
                for label, nbytes in self.bytes_of[layer.name].items()
                if label in known
            )
            if choices:
                found.append(Group((layer.name,), choices))
        return found

    def recipe_of(self, groups: Sequence[Group], mix: Mix) -> Recipe:
        """An ordinary recipe for a mix. Raises InputError where it would leave everything as it is."""
        taken = chosen(groups, mix)
        weights: dict[Rule, int] = defaultdict(int)
        sizes = {layer.name: layer.nbytes for layer in self.layers}
        for group, choice in zip(groups, taken, strict=True):
            weights[choice.rule] += sum(sizes[name] for name in group.layers)
        quantizing = {rule: nbytes for rule, nbytes in weights.items() if "skip" not in dict(rule)}
        if not quantizing:
            raise InputError("No layer is to be quantized.")
        # The scheme of most bytes is that of the recipe; the first one where two have as many.
        main = max(quantizing, key=lambda rule: quantizing[rule])
        rules = [rule | {"match": [glob.escape(name) for name in rule["match"]]} for rule in rules_of(groups, mix)]
        own = self.recipe.model_dump(exclude_unset=True)
        own.pop("group_size", None)
        return validate(own | dict(main) | {"rules": [*own.get("rules", []), *rules]}, "the search")


def layers_of(plans: Iterable[NodePlan], sizes: Mapping[str, int]) -> list[Layer]:
    """The layers of a plan, each weight once; ``sizes`` are bytes of float32 values in one run."""
    work: dict[str, float] = defaultdict(float)
    nbytes: dict[str, int] = {}
    for plan in plans:
        nbytes[plan.name] = plan.info.nbytes
        work[plan.name] += _multiplications(plan, sizes)
    return [Layer(name, nbytes[name], work[name]) for name in nbytes]


def _multiplications(plan: NodePlan, sizes: Mapping[str, int]) -> float:
    """Of a node in one run; those of operators without products count for nothing."""
    if is_standard(plan.node, "Gather"):
        return 0.0
    outputs = sizes.get(plan.node.outputs[0].name or "", 0) / 4
    tensor = constant(plan.weight)
    if tensor is None or not is_standard(plan.node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return float(plan.info.numel)
    shape = tensor.shape.numpy()
    if is_standard(plan.node, "ConvTranspose"):
        return outputs * prod(shape[2:]) * shape[0]
    if is_standard(plan.node, "MatMul") and plan.weight is plan.node.inputs[0]:
        return outputs * shape[-1]
    axis = channel_axis(plan.node) if plan.weight is plan.node.inputs[1] else len(shape) - 1
    return outputs * plan.info.numel / max(1, shape[axis])


def work_factor(plan: NodePlan) -> float:
    """The time of a layer by that of its float kernel, about."""
    if plan.form == "nbits" and is_standard(plan.node, "Conv", "ConvTranspose"):
        return _WORK_OF_RESTORED
    return _WORK.get(plan.form or "", 1.0)


def open_ways(runs: GraphRuns, recipe: Recipe, allow: Sequence[str], sizes: Mapping[str, int]) -> Ways:
    """See what each layer of a graph can become, by carrying out each way for all of them.

    Args:
        runs: of the graph.
        recipe: the user's; layers that its own rules mean are not decided on.
        allow: the schemes to choose from.
        sizes: bytes of float32 values in one run, by their names.

    Raises:
        BudgetError: no scheme applies to anything.
    """
    rules = ways_to_store(recipe, allow)
    floats, whole = runs.float_bytes(), Rules(recipe)
    bytes_of: dict[str, dict[str, int]] = defaultdict(dict)
    factor_of: dict[str, dict[str, float]] = defaultdict(dict)
    error_of: dict[str, dict[str, float]] = defaultdict(dict)
    seen: dict[str, set[object]] = defaultdict(set)
    plans: dict[str, list[NodePlan]] = {}
    for label, rule in rules.items():
        if label == FLOAT:
            continue
        try:
            outcomes, file = runs.carried_out(uniform_recipe(Recipe(), rule))
        except InputError:
            # The scheme applies to nothing here.
            continue
        free = [each for each in outcomes if whole.first(each.plan.name, each.plan.node.name or "") is None]
        overhead = _overhead(outcomes, file.stat().st_size - floats)
        for name, same in _by_weight(free).items():
            plans.setdefault(name, [each.plan for each in same])
            form = tuple((each.plan.form, each.plan.scheme) for each in same)
            if not same[0].plan.form or form in seen[name]:
                continue
            seen[name].add(form)
            bytes_of[name][label] = same[0].bytes_after + overhead
            factor_of[name][label] = work_factor(same[0].plan)
            error_of[name][label] = noise_of([same[0].sqnr_db])
    layers = [each for each in layers_of((p for same in plans.values() for p in same), sizes) if bytes_of[each.name]]
    if not layers:
        raise BudgetError(
            f"None of {', '.join(rules)} applies to a layer of {runs.model}.", "Name others with --allow."
        )
    for layer in layers if FLOAT in rules else ():
        bytes_of[layer.name][FLOAT] = layer.nbytes
        factor_of[layer.name][FLOAT] = 1.0
    return Ways(recipe, rules, layers, bytes_of, factor_of, error_of, floats - sum(layer.nbytes for layer in layers))


def _by_weight(outcomes: Iterable[LayerOutcome]) -> dict[str, list[LayerOutcome]]:
    found: dict[str, list[LayerOutcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.plan.name, []).append(outcome)
    return found


def _overhead(outcomes: Sequence[LayerOutcome], grown: int) -> int:
    """Bytes of a quantized layer beside its codes and scales: nodes, names, what quantizes its input.

    ``grown`` is by how much the whole file did.
    """
    layers = [same[0] for same in _by_weight(outcomes).values() if same[0].plan.form]
    return round((grown - sum(each.bytes_after - each.plan.info.nbytes for each in layers)) / max(1, len(layers)))
