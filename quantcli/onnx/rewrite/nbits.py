"""Weight-only quantization of ONNX nodes: onnxruntime's n-bit operators in place of MatMul, Gemm and Gather.

- MatMul and Gemm with a constant matrix: MatMulNBits, 4 or 8 bits in blocks along input features.
- The same in NF4 (QLoRA, arXiv:2305.14314): MatMulBnb4.
- Gather of rows, that is embeddings: GatherBlockQuantized, 4 or 8 bits.

The operators are documented in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.core.tensors import Hessian, QuantizedTensor, Rounding
from quantcli.onnx.graph.operands import Operand, operand_of, remove_unread
from quantcli.onnx.graph.values import add_initializer, constant, free_name, input_of, integer, is_standard, real
from quantcli.onnx.plan import nbits
from quantcli.onnx.plan.evidence import Evidence, Journal, Made
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.nbits import block_size
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan
from quantcli.onnx.weights.integer import ORIGIN, Origin

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"

#: Lets MatMulNBits round its inputs to int8, per block: the only fast kernels. Below 4 it computes in
#: float32, three (4 bits) to thirty times (8 bits) more slowly for one row; unset means 0. The inputs'
#: rounding adds noise at about 45 dB, which is that of 8-bit weights and far below that of 4-bit ones.
ACCURACY_LEVEL = 4

#: Lets it round nothing. What is small beside the inputs' rounding comes out as noise, and below zero at times.
EXACT_LEVEL = 0

#: Operators that make much of what is small, and NaN of what is below zero; and those that hand their input on.
_OF_SMALL_VALUES = ("Log", "Sqrt")
_HAND_ON = ("Cast", "Clip", "Concat", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")

#: Key of a weight's `meta` under which its stored forms are kept, for the next node that reads it.
_FORMS = "quantcli.forms"


@dataclass(frozen=True)
class NbitsNode:
    """What a node was replaced by: bytes of constants that are new in the graph, and what is to be said of blocks."""

    nbytes: int
    note: str | None
    rounding: Rounding
    decoded: Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Form:
    """A weight in stored form: what any node that reads it can share. ``scales``: and zero points, if any."""

    block: int
    codes: ir.Value
    scales: list[ir.Value]
    nbytes: int
    rounding: Rounding
    decoded: Callable[[], np.ndarray]


def quantize_node(
    model: ir.Model,
    node: ir.Node,
    scheme: Scheme,
    algorithm: str,
    *,
    hessian: Hessian | None = None,
    given: QuantizedTensor | None = None,
    accuracy_level: int = ACCURACY_LEVEL,
    journal: Journal | None = None,
) -> NbitsNode:
    """Replace a node by its n-bit form; its float weight goes when nothing reads it any more.

    Args:
        model: the model, whose operator sets are extended.
        node: a node that `nbits.supports` has no reason against.
        scheme: its weights' number format; blocks may come out smaller than asked, never larger.
        algorithm: name of the algorithm that chooses the codes.
        hessian: of the node's input, which gptq needs.
        given: codes that stand for the weight of a product, in the scheme's groups, to be taken as they are.
        accuracy_level: what MatMulNBits may compute in, see `ACCURACY_LEVEL`.
        journal: where codes that come of the weight alone are noted.

    Raises:
        InputError: the weight holds NaN or infinity.
        ValueError: the node cannot be quantized so.
    """
    operand = operand_of(node)
    if isinstance(operand, str) or (reason := nbits.supports(node, scheme)):
        raise ValueError(f"{node.name}: {operand if isinstance(operand, str) else reason}")
    weights = nbits.effective(node, scheme).weights
    operator, forms = nbits.nbits_operator(node, weights), operand.value.meta.setdefault(_FORMS, {})
    key = (_shared_by(operator, operand, weights), weights, algorithm, operand.transposed, operand.factor)
    shared = key in forms
    if not shared:
        forms[key] = _make_form(operand, operator, weights, algorithm, hessian, given, journal)
    form: _Form = forms[key]
    codes, nodes = _shaped(node, form, _codes_shape(operator, operand, weights, form.block))
    if operator == "GatherBlockQuantized":
        nodes.append(_gather(node, codes, form, weights))
    else:
        nodes += _product(node, operand, operator, codes, form, weights, accuracy_level)
    _replace(node, nodes)
    model.opset_imports.setdefault(DOMAIN, 1)
    remove_unread(operand.value)
    note = _note(scheme.weights, weights, form.block)
    return NbitsNode(0 if shared else form.nbytes, note, form.rounding, form.decoded)


def _shared_by(operator: str, operand: Operand, weights: NumberFormat) -> str:
    """Which operators read the same bytes: a table's rows are those of a product where no block is padded."""
    padded = operator != "MatMulBnb4" and operand.columns % block_size(operand.columns, weights)
    return operator if padded or operator == "MatMulBnb4" else "rows"


def _codes_shape(operator: str, operand: Operand, weights: NumberFormat, block: int) -> tuple[int, ...]:
    if operator == "GatherBlockQuantized":
        return operand.rows, operand.columns * weights.bits // 8
    if operator == "MatMulNBits":
        return operand.rows, -(-operand.columns // block), block * weights.bits // 8
    return (-(-operand.rows * operand.columns // 2),)


def _make_form(
    operand: Operand,
    operator: str,
    weights: NumberFormat,
    algorithm: str,
    hessian: Hessian | None,
    given: QuantizedTensor | None,
    journal: Journal | None,
) -> _Form:
    """Quantize, unless codes are given, and register them as constants of the graph that holds the float weight."""
    if operator == "MatMulBnb4":
        block = weights.granularity.size or 0
    elif given is not None:
        block = given.number_format.granularity.size or 0
    else:
        block = block_size(operand.columns, weights)
    pack = partial(_packed, operand, operator, weights, block, algorithm, hessian, given)
    if journal is None or hessian is not None or given is not None:
        made = pack()
    else:
        how = operand.transposed, operand.factor
        made = journal.of(f"{operand.value.name} {operator} {weights} {algorithm} {how}", pack)
    scales = dict(made.tensors)
    codes = scales.pop("codes")
    graph = operand.value.graph
    assert graph is not None
    name = free_name(graph, f"{operand.value.name}_{weights.dtype}")
    stored = add_initializer(graph, name, codes)
    if operator == "MatMulNBits":
        in_blocks = replace(weights, granularity=Granularity("group", block))
        axis, matrix = int(operand.transposed), (operand.rows, operand.columns)
        stored.meta[ORIGIN] = Origin(operand.value.name or "", in_blocks, axis, matrix, factor=operand.factor)
    parts = [add_initializer(graph, free_name(graph, f"{name}_{key}"), values) for key, values in scales.items()]
    return _Form(
        block,
        stored,
        parts,
        sum(values.nbytes for values in made.tensors.values()),
        made.rounding,
        partial(_decoded, [stored, *parts], operand, weights, block),
    )


def _packed(
    operand: Operand,
    operator: str,
    weights: NumberFormat,
    block: int,
    algorithm: str,
    hessian: Hessian | None,
    given: QuantizedTensor | None,
) -> Made:
    """Codes, scales and zero points as an operator reads them."""
    from quantcli.onnx.weights.blocks import pack_codes, pack_nf4, pack_rows

    if operator == "MatMulBnb4":
        packed = pack_nf4(operand, weights, algorithm, hessian)
    elif given is not None:
        packed = pack_codes(given, operand.dtype, algorithm)
    else:
        packed = pack_rows(operand, weights, block, algorithm, hessian)
    shape, codes = _codes_shape(operator, operand, weights, block), packed.codes
    if operator == "GatherBlockQuantized":
        # Lookups do not pad their last block.
        codes = np.ascontiguousarray(codes[:, : shape[1]])
    tensors = {"codes": codes.reshape(shape), "scales": packed.scales}
    return Made(
        tensors if packed.zero_points is None else tensors | {"zero_points": packed.zero_points}, packed.rounding
    )


def _decoded(parts: Sequence[ir.Value], operand: Operand, weights: NumberFormat, block: int) -> np.ndarray:
    """What codes and scales stand for, as the graph holds them now: they are not kept in memory for it."""
    from quantcli.onnx.weights.blocks import Packed

    codes, scales, *zero_points = (value.const_value.numpy() for value in parts if value.const_value is not None)
    packed = Packed(codes, scales, zero_points[0] if zero_points else None, Rounding(""))
    return packed.decoded(operand, weights, block)


def _shaped(node: ir.Node, form: _Form, shape: tuple[int, ...]) -> tuple[ir.Value, list[ir.Node]]:
    """Codes in the shape an operator takes; the runtime folds the Reshape when it loads the model."""
    import onnx_ir as ir

    codes = form.codes
    assert codes.shape is not None and codes.graph is not None
    if codes.shape.numpy() == shape:
        return codes, []
    name = free_name(codes.graph, f"{codes.name}_shape")
    target = add_initializer(codes.graph, name, np.array(shape, np.int64))
    reshape = ir.node("Reshape", [codes, target], name=f"{node.name}_codes")
    reshape.outputs[0].name = f"{node.outputs[0].name}_codes"
    return reshape.outputs[0], [reshape]


def _gather(node: ir.Node, codes: ir.Value, form: _Form, weights: NumberFormat) -> ir.Node:
    import onnx_ir as ir

    inputs = [codes, node.inputs[1], *form.scales]
    attributes = {"bits": weights.bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1}
    return ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=node.name)


def _product(
    node: ir.Node,
    operand: Operand,
    operator: str,
    codes: ir.Value,
    form: _Form,
    weights: NumberFormat,
    accuracy_level: int,
) -> list[ir.Node]:
    """MatMulNBits or MatMulBnb4, and around it what a Gemm does besides."""
    import onnx_ir as ir

    output = node.outputs[0]
    before: list[ir.Node] = []
    left = node.inputs[0]
    if node.op_type == "Gemm" and integer(node, "transA", 0):
        before.append(ir.node("Transpose", [left], {"perm": [1, 0]}, name=f"{node.name}_transpose"))
        before[-1].outputs[0].name = f"{output.name}_left"
        left = before[-1].outputs[0]
    attributes: dict[str, Any] = {"K": operand.columns, "N": operand.rows, "block_size": form.block}
    if operator == "MatMulBnb4":
        attributes |= {"quant_type": 1}
    else:
        attributes |= {"bits": weights.bits, "accuracy_level": accuracy_level}
    inputs = [left, codes, *form.scales]
    product = ir.node(operator, inputs, attributes, domain=DOMAIN, name=node.name)
    bias, beta = (input_of(node, 2), real(node, "beta", 1.0)) if node.op_type == "Gemm" else (None, 0.0)
    if bias is None or beta == 0.0:
        return [*before, product]
    product.outputs[0].name = f"{output.name}_product"
    after: list[ir.Node] = []
    if beta != 1.0:
        after.append(_scaled(node, bias, beta, operand))
        bias = after[-1].outputs[0]
    # An Add, not the operator's own bias: older runtimes do not have that one, newer ones fuse the Add.
    after.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}_bias"))
    return [*before, product, *after]


def _scaled(node: ir.Node, bias: ir.Value, beta: float, operand: Operand) -> ir.Node:
    import onnx_ir as ir

    assert node.graph is not None
    factor = add_initializer(
        node.graph, free_name(node.graph, f"{node.outputs[0].name}_beta"), np.array(beta, operand.dtype)
    )
    scaled = ir.node("Mul", [bias, factor], name=f"{node.name}_beta")
    scaled.outputs[0].name = f"{node.outputs[0].name}_scaled_bias"
    return scaled


def _replace(node: ir.Node, nodes: list[ir.Node]) -> None:
    import onnx_ir as ir

    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, node.outputs, nodes[-1].outputs)


def _note(asked: NumberFormat, weights: NumberFormat, block: int) -> str | None:
    if weights.dtype != asked.dtype:
        return f"{weights.dtype} in blocks of {block}: onnxruntime has no lookup in {asked.dtype}"
    if weights.granularity.kind == "channel":
        return f"blocks of {block}: the operator has no scales per channel"
    if block != weights.granularity.size:
        return f"blocks of {block}: fewer bytes than blocks of {weights.granularity.size}"
    return None


def _rewriter(model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence) -> Callable[[NodePlan], LayerOutcome]:
    def rewrite(layer: NodePlan) -> LayerOutcome:
        assert layer.scheme and layer.algorithm
        codes = evidence.codes.of(layer) if evidence.codes else None
        hessian = evidence.hessian(layer)
        level = EXACT_LEVEL if _is_logarithm_taken(layer.node.outputs[0]) else ACCURACY_LEVEL
        written = quantize_node(
            model, layer.node, layer.scheme, layer.algorithm, hessian=hessian, given=codes, accuracy_level=level,
            journal=evidence.journal,
        )  # fmt: skip
        return LayerOutcome.quantized(layer, written.nbytes, written.rounding, written.note, written.decoded)

    return rewrite


def _is_logarithm_taken(value: ir.Value) -> bool:
    """Whether a logarithm or a root is taken of a value, as of a sound's energies; with or without a constant floor."""
    seen, pending = {value}, [value]
    while pending:
        for reader in pending.pop().consumers():
            if is_standard(reader, *_OF_SMALL_VALUES):
                return True
            floor = is_standard(reader, "Add", "Max") and any(constant(each) is not None for each in reader.inputs)
            if (floor or is_standard(reader, *_HAND_ON)) and reader.outputs[0] not in seen:
                seen.add(reader.outputs[0])
                pending.append(reader.outputs[0])
    return False


def _substitute(layer: NodePlan, scheme: Scheme) -> tuple[Scheme, str] | None:
    carried = nbits.effective(layer.node, scheme)
    return None if carried.weights.dtype == scheme.weights.dtype else (carried, "which no lookup can read")


FORM = Form(
    "weights",
    lambda scheme: scheme.inputs is None and not scheme.weights.is_cast,
    lambda layer, scheme: nbits.supports(layer.node, scheme),
    _rewriter,
    substitute=_substitute,
)
