"""Graphs of which some layers are quantized, run for a moment: how far their outputs move."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.conversion.onnx.comparison import Comparison, OutputComparison
from quantcli.errors import InputError
from quantcli.onnx.graph.save import save_graph
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.judge import without_outliers
from quantcli.onnx.plan.plan import GraphPlan, LayerOutcome
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.onnx.rewrite.four_bit_storage import store_in_four_bits
from quantcli.onnx.rewrite.transform import transform
from quantcli.planning.recipe import Recipe, validate
from quantcli.search.choices import Rule
from quantcli.system.parallel import torch_threads

if TYPE_CHECKING:
    import onnx_ir as ir


def noise_of(outputs: Iterable[float | None]) -> float:
    """Noise by signal, summed over outputs that keep so many dB; it adds up over layers whose errors are independent.

    None: an output is equal.
    """
    return sum(10 ** (-each / 10) for each in outputs if each is not None)


@dataclass(frozen=True)
class GraphRuns:
    """One graph, to be quantized in many ways.

    Attributes:
        graph: in an operator set that all of them can be written in; it is left as it is.
        model: the file that it is of, for messages.
        evidence: what layers are quantized by.
        outputs: compares with the model.
        folder: where graphs are written.
    """

    graph: ir.Model
    model: Path
    evidence: Evidence
    outputs: OutputComparison
    folder: Path

    def planned(self, recipe: Recipe, graph: ir.Model | None = None) -> GraphPlan:
        """What a recipe makes of a graph, this one unless another is given.

        Raises:
            InputError: nothing is quantized.
        """
        plan = resolve_graph(recipe, graph or self.graph, self.model)
        return without_outliers(plan, self.evidence.statistics) if self.evidence.statistics else plan

    def carried_out(self, recipe: Recipe) -> tuple[Sequence[LayerOutcome], Path]:
        """What became of the layers of a copy of the graph, and where that is written.

        Raises:
            InputError: nothing is quantized.
        """
        graph = self.graph.clone()
        plan = self.planned(recipe, graph)
        with torch_threads():
            outcomes = transform(graph, plan, self.evidence)
        store_in_four_bits(graph)
        file = self.folder / "quantized.onnx"
        save_graph(graph, file)
        return outcomes, file

    def float_bytes(self) -> int:
        """Bytes of the graph as a file before anything is quantized."""
        file = self.folder / "float.onnx"
        return sum(each.stat().st_size for each in save_graph(self.graph.clone(), file))

    def noise(self, recipe: Recipe) -> float:
        """How far the outputs move where a recipe is carried out; infinite where they are not finite.

        Raises:
            InputError: nothing is quantized.
        """
        found = self._compared(recipe)
        return inf if found is None else noise_of(found.outputs.values())

    def sqnr_db(self, recipe: Recipe) -> float:
        """Signal to noise of all outputs together; infinite where they are equal, or not finite, by its sign.

        Raises:
            InputError: nothing is quantized.
        """
        found = self._compared(recipe)
        return -inf if found is None else inf if found.sqnr_db is None else found.sqnr_db

    def _compared(self, recipe: Recipe) -> Comparison | None:
        _, file = self.carried_out(recipe)
        try:
            return self.outputs.against(file, "A candidate")
        except InputError:
            # It overflows, or the runtime has no kernel for it: then it is none to be chosen.
            return None

    def noise_of_layers(self, layers: Mapping[str, Rule]) -> float:
        """As `noise`, where a few layers alone are quantized, each as its rule says."""
        by_rule: dict[Rule, list[str]] = {}
        for name, rule in layers.items():
            by_rule.setdefault(rule, []).append(glob.escape(name))
        rules = [{"match": names, **dict(rule)} for rule, names in by_rule.items()]
        scheme = next(dict(rule)["scheme"] for rule in by_rule if "scheme" in dict(rule))
        return self.noise(validate({"scheme": scheme, "rules": [*rules, {"match": "*", "skip": True}]}, "the search"))
