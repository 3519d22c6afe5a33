"""Whether what an artifact's outputs lose is what quantization costs, or something went wrong.

Losses alone do not tell: four bits may honestly leave a small network 5 dB. Where an output lost more than its
weights' own error lets expect, a second graph is run: the model itself, in floats, with every quantized weight in
decoded form, and with the inputs of layers rounded as the scheme rounds them. It has the honest error, and neither the
rewritten nodes nor the runtime's integer kernels. An artifact far below it computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.conversion.onnx.comparison import REPORT_IT, Comparison, OutputComparison
from quantcli.errors import InputError
from quantcli.onnx.graph.flow import Flow
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.save import save_graph
from quantcli.onnx.graph.values import constant
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

#: Outputs of which so little is left are looked at whatever the weights keep, and told of.
_POOR_DB = 10.0

#: Of an output of integers or texts, the part that should be the same: more than truth values share by chance.
_LEAST_SAME = 0.6

#: An artifact this far below its decoded form computes something else.
_FAR_DB = 12.0

#: Operators at which a small error becomes a large one: what follows them cannot be judged by its size.
_JUMPS = frozenset(
    ("TopK", "ArgMax", "ArgMin", "Hardmax", "NonZero", "Unique", "Multinomial", "Bernoulli", "NonMaxSuppression",
     "Round", "Floor", "Ceil", "Sign", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Compress", "Mod",
     "RoiAlign", "MaxRoiPool", "MaxUnpool", "GridSample", "Binarizer", "TreeEnsemble", "TreeEnsembleClassifier",
     "TreeEnsembleRegressor")
)  # fmt: skip

#: Of these, the ones that make the shapes of what follows depend on values.
_SHAPING = frozenset(("NonZero", "Unique", "NonMaxSuppression", "Compress"))


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
        self._weights = {id(value): place for place, value in enumerate(_weights(graph))}
        self._quantized = [layer.weight for layer in plan.nodes if layer.form]
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
        least = max(self._expected_db - _FIRST_LOOK_DB, _POOR_DB)
        doubtful = {name: db for name, db in found.outputs.items() if db is not None and db < least}
        unlike = _unlike(found, comparison)
        if not doubtful:
            return unlike
        return [*self._judged(doubtful, comparison, artifact), *unlike]

    def _judged(self, doubtful: Mapping[str, float], comparison: OutputComparison, artifact: Path) -> list[str]:
        """What is to be said of outputs that lost much. Raises InputError as `require`."""
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
            raise InputError(
                f"The artifact's output {name} is wrong: it keeps {doubtful[name]:.1f} dB of the model's, where the "
                f"error of its weights would leave {_decibels(decoded.outputs.get(name))}.",
                REPORT_IT,
            )
        return _explained(doubtful, decoded)

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
        """Whether one of some operators follows a layer that was quantized, or how often or which body runs does."""
        weights = list(_weights(self.graph))
        quantized = (weights[self._weights[id(value)]] for value in self._quantized)
        counting = operators is _JUMPS
        return Flow(self.graph).meets(quantized, lambda node: node.op_type in operators or (counting and _counts(node)))

    def decoded(self) -> ir.Model:
        """The graph before it was rewritten, with the values that codes stand for; known once `require` was asked."""
        model = self.graph.clone()
        weights = list(_weights(model))
        for outcome in self.outcomes:
            _replace(weights[self._weights[id(outcome.plan.weight)]], outcome)
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


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    """Constants of a graph and of its bodies; two bodies may call theirs by the same name."""
    return (value for graph in model.graphs() for value in graph.initializers.values())


def _counts(node: ir.Node) -> bool:
    """Whether a node makes integers of its input."""
    target = node.outputs[0].dtype if node.op_type == "Cast" else None
    return target is not None and not target.is_floating_point()


def _replace(value: ir.Value, outcome: LayerOutcome) -> None:
    """Give a weight the values that its codes stand for; where these are not told, an error of the same size."""
    import onnx_ir as ir

    tensor, rounding = constant(value), outcome.rounding
    assert tensor is not None
    if outcome.decoded is None and not (rounding is not None and rounding.signal and rounding.noise):
        return
    # Made when it is written, one after the other: all of them may not fit into memory.
    value.const_value = ir.LazyTensor(
        partial(_decoded, tensor, outcome), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name
    )


def _decoded(original: ir.TensorProtocol, outcome: LayerOutcome) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir as ir

    values, rounding = original.numpy(), outcome.rounding
    if outcome.decoded is not None:
        decoded = outcome.decoded()
    else:
        assert rounding is not None
        spread = np.sqrt(rounding.noise / rounding.signal * np.square(values.astype(np.float64)).mean())
        decoded = values + spread * np.random.default_rng(0).standard_normal(values.shape)
    return ir.tensor(decoded.astype(values.dtype).reshape(values.shape), name=original.name)


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


def _unlike(found: Comparison, comparison: OutputComparison) -> list[str]:
    """A word on outputs of integers or texts of which many changed: a jump leads to them, so that none is judged."""
    worst = min(found.same, key=lambda name: found.same[name], default=None)
    if worst is None or found.same[worst] >= _LEAST_SAME or not comparison.repeats():
        return []
    return [
        f"The output {worst} has the model's values in {100 * found.same[worst]:.0f}% of its places. A small error "
        "tips such values, so that it was not judged whether that of the weights explains this; quantcli eval with "
        "real data tells more."
    ]


def _explained(doubtful: Mapping[str, float], decoded: Comparison) -> list[str]:
    """A word where little is left of an output, and rightly so."""
    worst = min(doubtful, key=lambda name: doubtful[name])
    if doubtful[worst] >= _POOR_DB:
        return []
    return [
        f"The output {worst} keeps {doubtful[worst]:.1f} dB of the model's. The error of its weights explains that: "
        f"rounded in the same way and run in floats, they leave {_decibels(decoded.outputs.get(worst))}. Whether it is "
        "enough, quantcli eval with real data tells; more bits, or layers left out with --skip, lose less."
    ]


def _decibels(db: float | None) -> str:
    return "all of it" if db is None else f"{db:.1f} dB"


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
