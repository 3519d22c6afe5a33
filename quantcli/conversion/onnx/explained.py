"""Whether what an artifact's outputs lose is what quantization costs, or something went wrong.

Losses alone do not tell: four bits may honestly leave a small network 5 dB. Where an output lost more than its
weights' own error lets expect, a second graph is run: the model itself, in floats, with every quantized weight in
decoded form, and with the inputs of layers rounded as the scheme rounds them. It has the honest error, and neither the
rewritten nodes nor the runtime's integer kernels. An artifact far below it computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.conversion.onnx.comparison import REPORT_IT, Comparison, OutputComparison
from quantcli.errors import InputError
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.save import save_graph
from quantcli.onnx.graph.values import array
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.placement import place
from quantcli.onnx.plan.plan import GraphPlan, LayerOutcome
from quantcli.onnx.rewrite.qdq import StaticQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

#: Eight-bit activations leave at most about this much, whatever the weights keep.
_ACTIVATIONS_DB = 35.0

#: What weights that are cast, or exact, leave at the least.
_EXACT_DB = 70.0

#: Layers add up: outputs this far below the worst weight are still no reason to look closer.
_FIRST_LOOK_DB = 15.0

#: An artifact this far below its decoded form computes something else.
_FAR_DB = 12.0

#: Operators at which a small error becomes a large one: what follows them cannot be judged by its size.
_JUMPS = frozenset(
    ("TopK", "ArgMax", "ArgMin", "Hardmax", "NonZero", "Unique", "Multinomial", "Bernoulli", "NonMaxSuppression",
     "Round", "Floor", "Ceil", "Sign", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "If", "Loop",
     "Compress", "Mod", "RoiAlign", "MaxRoiPool", "GridSample")
)  # fmt: skip

#: Of these, the ones that make the shapes of what follows depend on values.
_SHAPING = frozenset(("NonZero", "Unique", "NonMaxSuppression", "If", "Loop", "Compress"))


class Honest:
    """The decoded form of an artifact, which is made only where it is asked for.

    Args:
        graph: the graph that will be rewritten; a copy is kept.
        plan: what becomes of it.
        evidence: what it is quantized by.
    """

    def __init__(self, graph: ir.Model, plan: GraphPlan, evidence: Evidence) -> None:
        self.graph, self.evidence = graph.clone(), evidence
        # Rewriting changes the nodes of the plan; a clone has its own in the same order. Names would not do: two
        # branches may use the same ones.
        self._places = {id(node): place for place, node in enumerate(graph.graph.all_nodes())}
        self._names = {layer.name for layer in plan.nodes if layer.form}
        self.outcomes: list[LayerOutcome] = []

    def require(
        self, outcomes: Sequence[LayerOutcome], comparison: OutputComparison, found: Comparison, artifact: Path
    ) -> list[str]:
        """Judge what an artifact's outputs lost; what cannot be judged is said.

        Args:
            outcomes: what became of the layers.
            comparison: of outputs.
            found: of those of the artifact.
            artifact: where it is written.

        Raises:
            InputError: an output lost far more than that of the decoded form.
        """
        self.outcomes = [outcome for outcome in outcomes if outcome.plan.form]
        doubtful = {
            name: db for name, db in found.outputs.items() if db is not None and db < self._expected_db - _FIRST_LOOK_DB
        }
        if not doubtful:
            return []
        if self._jumps(_JUMPS):
            return [_unjudged(doubtful, "operators follow that make a large error of a small one.")]
        if not comparison.repeats():
            return [_unjudged(doubtful, "the model returns something else each time it runs.")]
        folder = comparison.folder
        try:
            saved = _saved(self.decoded(), folder / "decoded.onnx")
            decoded = comparison.against(saved, "The model in decoded form", literal=True)
        except InputError as error:
            # It overflows, or is none that the runtime takes: then nothing can be told from it.
            return [_unjudged(doubtful, f"its decoded form does not run. {error.message}")]
        wrong = _far_below(doubtful, decoded)
        if wrong and any(outcome.plan.form == "nbits" for outcome in self.outcomes):
            # The n-bit kernels round their inputs on their own, unless they are told not to.
            exact = comparison.against(_saved(_in_floats(artifact), folder / "exact.onnx"), "The artifact")
            wrong = [name for name in wrong if name in _far_below(exact.outputs, decoded)]
        if wrong:
            name = wrong[0]
            kept, honest = doubtful[name], decoded.outputs.get(name)
            figure = "all of it" if honest is None else f"{honest:.1f} dB"
            raise InputError(
                f"The artifact's output {name} is wrong: it keeps {kept:.1f} dB of the model's, where the error of its "
                f"weights would leave {figure}.",
                REPORT_IT,
            )
        return []

    @property
    def shapes_depend_on_values(self) -> bool:
        """Whether an output may have another shape for the sake of a small error."""
        return self._jumps(_SHAPING)

    @property
    def _expected_db(self) -> float:
        figures = [outcome.sqnr_db for outcome in self.outcomes if outcome.sqnr_db is not None]
        if any(outcome.plan.form in ("static", "dynamic", "nbits") for outcome in self.outcomes):
            figures.append(_ACTIVATIONS_DB)
        return min([*figures, _EXACT_DB])

    def _jumps(self, operators: frozenset[str]) -> bool:
        """Whether one of some operators follows a layer that was quantized."""
        weights = (value for graph in self.graph.graphs() for value in graph.initializers.values())
        waiting = [value for value in weights if value.name in self._names]
        seen = set(waiting)
        while waiting:
            for use in waiting.pop().uses():
                if use.node.op_type in operators or (operators is _JUMPS and _counts(use.node)):
                    return True
                new = [output for output in use.node.outputs if output not in seen]
                seen.update(new)
                waiting += new
        return False

    def decoded(self) -> ir.Model:
        """The graph before it was rewritten, with the values that codes stand for; known once `require` was asked."""
        model = self.graph.clone()
        weights = {name: value for graph in model.graphs() for name, value in graph.initializers.items()}
        for outcome in self.outcomes:
            if outcome.plan.name in weights:
                _replace(weights[outcome.plan.name], outcome)
        nodes = list(model.graph.all_nodes())
        static, dynamic = (
            [nodes[self._places[id(outcome.plan.node)]] for outcome in self.outcomes if outcome.plan.form == form]
            for form in ("static", "dynamic")
        )
        if static and self.evidence.statistics is not None:
            StaticQuantizer(model, place(model, static), self.evidence.statistics.range).insert_pairs()
        for node in dynamic:
            _round_input(node)
        model.graph.sort()
        return model


def _counts(node: ir.Node) -> bool:
    """Whether a node makes integers of its input."""
    target = node.outputs[0].dtype if node.op_type == "Cast" else None
    return target is not None and not target.is_floating_point()


def _replace(value: ir.Value, outcome: LayerOutcome) -> None:
    """Give a weight the values that its codes stand for; where these are not told, an error of the same size."""
    import numpy as np
    import onnx_ir as ir

    original, rounding = array(value), outcome.rounding
    assert original is not None
    if outcome.decoded is not None:
        values = outcome.decoded()
    elif rounding is not None and rounding.signal and rounding.noise:
        spread = np.sqrt(rounding.noise / rounding.signal * np.square(original.astype(np.float64)).mean())
        values = original + spread * np.random.default_rng(0).standard_normal(original.shape)
    else:
        return
    value.const_value = ir.tensor(values.astype(original.dtype).reshape(original.shape), name=value.name)


def _round_input(node: ir.Node) -> None:
    import onnx_ir as ir

    graph, data = node.graph, node.inputs[0]
    assert graph is not None
    quantize = ir.Node("", "DynamicQuantizeLinear", [data], num_outputs=3, name=f"{node.name}_honest_quantize")
    restore = ir.Node("", "DequantizeLinear", quantize.outputs, name=f"{node.name}_honest_dequantize")
    for value, part in zip((*quantize.outputs, *restore.outputs), ("codes", "scale", "zero", "values"), strict=True):
        value.name = f"{node.outputs[0].name}_honest_{part}"
    graph.insert_before(node, [quantize, restore])
    node.replace_input_with(0, restore.outputs[0])


def _in_floats(artifact: Path) -> ir.Model:
    """An artifact whose n-bit products do not round their inputs."""
    import onnx_ir as ir

    model = open_onnx(artifact).ir
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return model


def _unjudged(doubtful: Mapping[str, float], reason: str) -> str:
    worst = min(doubtful, key=lambda name: doubtful[name])
    return (
        f"The output {worst} keeps {doubtful[worst]:.1f} dB of the model's, and whether that is the error of its "
        f"weights was not judged: {reason}"
    )


def _saved(model: ir.Model, path: Path) -> Path:
    save_graph(model, path)
    return path


def _far_below(found: Mapping[str, float | None], decoded: Comparison) -> list[str]:
    """Outputs that lost far more than those of the decoded form."""
    wrong = []
    for name, db in found.items():
        honest = decoded.outputs.get(name)
        if db is not None and (honest is None or db < honest - _FAR_DB):
            wrong.append(name)
    return wrong
