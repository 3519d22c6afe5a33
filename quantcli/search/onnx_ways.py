"""What can become of each layer of a graph, in how many bytes and with how much work."""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantcli.errors import BudgetError, InputError
from quantcli.onnx.plan.plan import LayerOutcome
from quantcli.planning.recipe import Recipe
from quantcli.planning.rules import Rules
from quantcli.search.budget import FLOAT
from quantcli.search.choices import Choice, Group, Mix, Rule, chosen, chosen_recipe, rules_of, ways_to_store
from quantcli.search.onnx_runs import GraphRuns, noise_of
from quantcli.search.onnx_work import works
from quantcli.search.sensitivity_file import LayerFigures, WayFigures


def uniform_recipe(recipe: Recipe, rule: Rule) -> Recipe:
    """A recipe with one way to store for all layers that its own rules do not mean."""
    scheme = {"scheme": wish} if (wish := dict(rule).get("scheme")) else {}
    return chosen_recipe(recipe, scheme, [{"match": "*", **dict(rule)}])


def uniform_recipes(recipe: Recipe, allow: Sequence[str]) -> Iterator[Recipe]:
    """Recipes of one scheme for all layers, as if each had been asked for by itself."""
    for rule in ways_to_store(recipe, allow).values():
        if "scheme" in dict(rule):
            # With a rule, `int8-static` is what was judged: by itself it would protect itself when converted again.
            is_static = dict(rule)["scheme"] == "int8-static"
            yield uniform_recipe(recipe, rule) if is_static else chosen_recipe(recipe, dict(rule))


def label_of(uniform: Recipe) -> str:
    """What people call a recipe of one scheme for all layers."""
    return f"{uniform.scheme} group {uniform.group_size}" if uniform.group_size else str(uniform.scheme)


@dataclass(frozen=True)
class Ways:
    """The layers that a search decides on, and what each can become.

    Attributes:
        recipe: the user's, whose own rules and skips hold before all others.
        rules: what a recipe says for each way, by its label.
        layers: in the graph's order; nodes that read one weight are one layer. Only ways that differ are listed.
        rest: bytes of the artifact beside the layers, about.
    """

    recipe: Recipe
    rules: Mapping[str, Rule]
    layers: Mapping[str, LayerFigures]
    rest: int

    @property
    def work(self) -> float:
        """What one run of the model as it is takes, in multiplications of a float convolution."""
        return sum(layer.work for layer in self.layers.values())

    def work_of(self, label: str) -> float:
        """What one run takes where all layers that can be are stored alike, as `work` counts it."""
        stored = ((layer, layer.ways.get(self._own(layer, label))) for layer in self.layers.values())
        return sum(layer.work * (way.factor if way else 1.0) for layer, way in stored)

    def labels_of(self, label: str) -> dict[str, int]:
        """How many layers are stored how where all that can be are stored alike, the most frequent first."""
        return dict(Counter(self._own(layer, label) for layer in self.layers.values()).most_common())

    @staticmethod
    def _own(layer: LayerFigures, label: str) -> str:
        """The label by which a layer knows a way to store it: its own one where others come to the same."""
        return next((own for own, way in layer.ways.items() if label == own or label in way.alike), FLOAT)

    def groups(self, costs: Mapping[str, Mapping[str, float]]) -> list[Group]:
        """What the solver chooses of; ``costs`` are by layer and label."""
        found = []
        for name, layer in self.layers.items():
            choices = tuple(
                Choice(label, self.rules[label], way.nbytes, costs[name][label], layer.work * way.factor)
                for label, way in layer.ways.items()
            )
            found.append(Group((name,), choices))
        return found

    def recipe_of(self, groups: Sequence[Group], mix: Mix) -> Recipe:
        """An ordinary recipe for a mix. Raises InputError where it would leave everything as it is."""
        taken = chosen(groups, mix)
        weights: dict[Rule, int] = defaultdict(int)
        for group, choice in zip(groups, taken, strict=True):
            weights[choice.rule] += sum(self.layers[name].nbytes for name in group.layers)
        quantizing = {rule: nbytes for rule, nbytes in weights.items() if "skip" not in dict(rule)}
        if not quantizing:
            raise InputError("No layer is to be quantized.")
        # The scheme of most bytes is that of the recipe; the first one where two have as many.
        main = max(quantizing, key=lambda rule: quantizing[rule])
        rules = [rule | {"match": [glob.escape(name) for name in rule["match"]]} for rule in rules_of(groups, mix)]
        return chosen_recipe(self.recipe, dict(main), rules)


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
    rules, whole, floats = ways_to_store(recipe, allow), Rules(recipe), runs.float_bytes()
    layers: dict[str, LayerFigures] = {}
    seen: dict[str, dict[object, WayFigures]] = defaultdict(dict)
    for label, rule in rules.items():
        if label == FLOAT:
            continue
        try:
            wish = uniform_recipe(Recipe(), rule)
            # Rewriting takes the weights away, without whose shapes nothing is known of the work.
            work = works(runs.planned(wish), sizes)
            outcomes, file = runs.carried_out(wish)
        except InputError:
            # The scheme applies to nothing here.
            continue
        free = [each for each in outcomes if whole.first(each.plan.name, each.plan.node.name or "") is None]
        overhead = _overhead(outcomes, file.stat().st_size - floats)
        for name, same in _by_weight(free).items():
            plans, first = [each.plan for each in same], same[0]
            layer = layers.setdefault(name, LayerFigures(nbytes=first.plan.info.nbytes, work=work[name][0], ways={}))
            form = tuple((plan.form, plan.scheme) for plan in plans)
            if form in seen[name]:
                seen[name][form].alike.append(label)
            elif first.plan.form:
                layer.ways[label] = seen[name][form] = WayFigures(
                    nbytes=first.bytes_after + overhead,
                    factor=work[name][1] / work[name][0] if work[name][0] else 1.0,
                    error=noise_of([first.sqnr_db]),
                )
    layers = {name: layer for name, layer in layers.items() if layer.ways}
    if not layers:
        raise BudgetError(
            f"None of {', '.join(rules)} applies to a layer of {runs.model}.", "Name others with --allow."
        )
    for layer in layers.values() if FLOAT in rules else ():
        layer.ways[FLOAT] = WayFigures(nbytes=layer.nbytes, factor=1.0, error=0.0)
    return Ways(recipe, rules, layers, floats - sum(layer.nbytes for layer in layers.values()))


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
