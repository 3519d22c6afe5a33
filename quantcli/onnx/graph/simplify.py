"""Simplifications that keep a graph's function: identities, constants, shapes; in bodies of control flow, too."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from quantcli.onnx.graph.casts import keeps_codes
from quantcli.onnx.graph.values import constant, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

#: Constants above this many elements are not folded through nodes: the result would have to be held in memory.
_FOLDED_ELEMENTS = 1 << 24

#: A folded constant may have this many elements more than those that go with it. Beyond, the file would grow: masks
#: that are made of a Range, or a row that is tiled, take nothing until they are made at load.
GROWTH_ELEMENTS = 1 << 10

#: Folded by an evaluator that has no such types, or that would fix what is drawn anew in every run.
_NOT_FOLDED = (
    "Bernoulli", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt", "SequenceConstruct",
    "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence",
    "ConcatFromSequence", "StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer",
)  # fmt: skip

#: The operator whose output is a map.
_MAKES_MAP = ("ai.onnx.ml", "ZipMap")

#: A domain that no operator has.
_UNKNOWN = "quantcli.unknown"

#: Of a byte or less each.
_NARROW = ("BOOL", "INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")

#: Operators one of whose outputs is no tensor, and those that hand such a value on.
_NO_TENSORS = ("Optional", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceMap",
               "SplitToSequence")  # fmt: skip


def lift_constants(model: ir.Model) -> None:
    """Make every Constant an initializer; those that a function called twice was inlined with are one."""
    from onnx_ir.passes import common

    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for graph in model.graphs():
        first: dict[int, ir.Value] = {}
        for name, value in list(graph.initializers.items()):
            if value.const_value is None or value.is_graph_output() or value.is_graph_input():
                continue
            # Each holds the other's own tensor: nothing is read.
            known = first.setdefault(id(value.const_value), value)
            if known is not value:
                value.replace_all_uses_with(known)
                del graph.initializers[name]


def remove_unused(model: ir.Model) -> None:
    """Remove nodes, constants and optional outputs that nobody reads, but for outputs that a kernel insists on."""
    from onnx_ir.passes import common

    # Given an earlier state, onnxruntime's Attention demands to return the next one, read or not.
    names = {
        node: [output.name for output in node.outputs]
        for node in model.graph.all_nodes()
        if is_standard(node, "Attention")
    }
    common.RemoveUnusedNodesPass()(model)
    for node, outputs in names.items():
        node.resize_outputs(len(outputs))
        for output, name in zip(node.outputs, outputs, strict=True):
            output.name = name


def drop_identities(model: ir.Model) -> None:
    """Remove every Identity but those that tell an output of a graph, or of a body, apart from another value."""
    import onnx_ir as ir

    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        source, output = (node.inputs[0], node.outputs[0]) if _is_identity(node) else (None, None)
        if source is None or output is None or node.graph is None:
            continue
        if output.is_graph_output():
            apart = source.is_graph_input() or source.is_initializer() or source.is_graph_output()
            if apart or source.graph is not node.graph:
                continue
        source.shape = _merged(source.shape, output.shape)
        if source.type is None:
            source.type = output.type
        named = output.is_graph_output()
        ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
        if named:
            source.name = output.name
        node.graph.remove(node, safe=True)


def _is_identity(node: ir.Node) -> bool:
    return is_standard(node, "Identity") and len(node.inputs) == len(node.outputs) == 1


def _merged(one: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    """What two shapes of one value say together: numbers before names, names before nothing."""
    import onnx_ir as ir

    if one is None or other is None or len(one) != len(other):
        return other if one is None else one
    return ir.Shape([_dimension(first, second) for first, second in zip(one, other, strict=True)])


def _dimension(first: int | ir.SymbolicDim, second: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(first, int) or (first.value is not None and not isinstance(second, int)):
        return first
    return second


def fold_constants(model: ir.Model) -> None:
    """Compute what only constants lead to, where that does not make the file larger."""
    from onnxscript import optimizer

    before = list(model.graph.all_nodes())
    optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=_FOLDED_ELEMENTS,
        output_size_limit=GROWTH_ELEMENTS,
        should_fold=_may_fold,
    )
    _forget(set(before) - set(model.graph.all_nodes()))


def _forget(nodes: Iterable[ir.Node]) -> None:
    """Take nodes that are in no graph any more off the readers of what they read.

    Of an If whose condition is known one branch goes, and its nodes would still count as readers of a weight.
    """
    for node in nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _may_fold(node: ir.Node) -> bool | None:
    """False where a node must stay; None leaves it to the folder's own rules."""
    strings = any(value is not None and value.dtype is not None and value.dtype.is_string() for value in node.inputs)
    return False if strings or is_standard(node, *_NOT_FOLDED) or _widens(node) else keeps_codes(node)


def _widens(node: ir.Node) -> bool:
    """Whether a node makes floats of a large mask, or of codes that someone quantized: several bytes for each."""
    if not is_standard(node, "Cast", "CastLike", "Where"):
        return False
    tensor = constant(node.inputs[0])
    return tensor is not None and tensor.size > GROWTH_ELEMENTS and tensor.dtype.name in _NARROW


def infer_shapes(model: ir.Model) -> None:
    """Note the shapes and types of values where they can be known."""
    from onnx_ir.passes import common

    others = _not_tensors(model)
    # onnx infers types of maps, on which onnx-ir fails: what makes one is taken for an operator that nobody knows.
    maps = [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == _MAKES_MAP]
    for node in maps:
        node.domain = _UNKNOWN
    if maps:
        model.opset_imports[_UNKNOWN] = 1
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    finally:
        model.opset_imports.pop(_UNKNOWN, None)
        for node in maps:
            node.domain = _MAKES_MAP[0]
    # The pass takes a sequence of tensors for a tensor.
    for value, kind in others.items():
        value.type, value.shape = kind, None


def _not_tensors(model: ir.Model) -> dict[ir.Value, ir.TypeProtocol | None]:
    """Sequences, optionals and maps with their types, None where that is not noted."""
    import onnx_ir as ir

    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    found = {value: value.type for graph in model.graphs() for value in graph.inputs if _is_other(value)}
    known = -1
    while known < len(found):
        known = len(found)
        for node in nodes:
            handed_on = is_standard(node, "Identity") and node.inputs[0] in found
            for index, value in enumerate(node.outputs):
                other = handed_on or is_standard(node, *_NO_TENSORS) or _is_other(value)
                if other or _from_body(node, index, found):
                    found.setdefault(value, value.type)
    return found


def _is_other(value: ir.Value) -> bool:
    import onnx_ir as ir

    return value.type is not None and not isinstance(value.type, ir.TensorType | ir.SparseTensorType)


def _from_body(node: ir.Node, index: int, found: Container[ir.Value]) -> bool:
    """Whether an output of control flow is what a body returns as no tensor."""
    import onnx_ir as ir

    # A Loop's body returns its condition first.
    place = index + 1 if is_standard(node, "Loop") else index
    bodies = (attribute for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH)
    outputs = [body.as_graph().outputs for body in bodies if not body.is_ref()]
    return any(place < len(each) and (_is_other(each[place]) or each[place] in found) for each in outputs)
