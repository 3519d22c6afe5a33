"""Matrix products written otherwise: an Einsum or FusedMatMul of a constant matrix becomes a MatMul where it is one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantcli.onnx.graph.values import (
    add_initializer,
    constant,
    free_name,
    input_of,
    integer,
    is_standard,
    rank,
    real,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def plain_products(model: ir.Model) -> None:
    """Rewrite, in the graph and its bodies, what multiplies an activation by one constant matrix."""
    for graph in list(model.graphs()):
        for node in list(graph):
            if is_standard(node, "Einsum") and len(node.inputs) == 2:
                _plain_einsum(graph, node)
            elif (node.domain, node.op_type) == ("com.microsoft", "FusedMatMul"):
                _plain_fused(graph, node)


def _plain_einsum(graph: ir.Graph, node: ir.Node) -> None:
    """``...C,CF->...F``, the letters of C and F in one piece each; the weight's two may be the other way round."""
    operands, result = einsum_terms(node)
    if len(operands) != 2:
        return
    at = 1 if constant(node.inputs[1]) is not None else 0
    data, weight, term, letters = node.inputs[1 - at], node.inputs[at], operands[1 - at], operands[at]
    tensor = constant(weight)
    if data is None or weight is None or tensor is None or constant(data) is not None:
        return
    if "." in letters or len(letters) != len(tensor.shape) or not _once(letters) or not _once(term.replace("...", "")):
        return
    free = "".join(letter for letter in letters if letter not in term)
    summed = "".join(letter for letter in letters if letter in term)
    kept = term.removesuffix(summed)
    if not free or not summed or not term.endswith(summed) or result != kept + free:
        return
    if letters not in (summed + free, free + summed) or not _keeps_rank(data, term, kept, summed, free):
        return
    sizes = dict(zip(letters, tensor.shape.numpy(), strict=True))
    columns, rows = _product(sizes, summed), _product(sizes, free)
    turned = letters != summed + free
    matrix = _matrix(weight, tensor, (columns, rows), turned)
    nodes: list[ir.Node] = []
    if len(summed) > 1:
        data = _reshaped(graph, node, data, [0] * len(kept) + [columns], "rows", nodes)
    product = _append(nodes, "MatMul", [data, matrix], f"{node.outputs[0].name}_product", node.name)
    if len(free) > 1:
        target = [0] * len(kept) + [sizes[letter] for letter in free]
        _reshaped(graph, node, product, target, "shape", nodes)
    _replace(graph, node, nodes)


def einsum_terms(node: ir.Node) -> tuple[list[str], str]:
    """The letters of an Einsum's operands, and of its result: where none is written, those that occur once."""
    attribute = node.attributes.get("equation")
    terms, arrow, result = ("" if attribute is None else attribute.as_string().replace(" ", "")).partition("->")
    if not arrow:
        letters = terms.replace("...", "").replace(",", "")
        once = "".join(sorted(letter for letter in letters if letters.count(letter) == 1))
        result = f"...{once}" if "..." in terms else once
    return terms.split(","), result


def _once(letters: str) -> bool:
    return len(set(letters)) == len(letters)


def _keeps_rank(data: ir.Value, term: str, kept: str, summed: str, free: str) -> bool:
    """Whether the product can be written for this input: a Reshape must know how many dimensions it keeps."""
    if "..." in term:
        return len(summed) == 1 and len(free) == 1 and (rank(data) or 0) > 1
    return len(kept) > 0


def _product(sizes: dict[str, int], letters: str) -> int:
    product = 1
    for letter in letters:
        product *= int(sizes[letter])
    return product


def _matrix(weight: ir.Value, tensor: ir.TensorProtocol, shape: tuple[int, int], turned: bool) -> ir.Value:
    """A weight as ``[columns, rows]``, made when it is read; the weight itself where it is that already."""
    import onnx_ir as ir

    if not turned and len(tensor.shape) == 2:
        return weight
    owner, name = weight.graph, weight.name or "weight"
    assert owner is not None
    alone = len(weight.uses()) == 1 and not weight.is_graph_output()
    if alone:
        owner.initializers.pop(name)
    name = name if alone else free_name(owner, f"{name}_matrix")
    make = partial(_as_matrix, tensor, shape, turned)
    lazy = ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)
    return add_initializer(owner, name, lazy)


def _as_matrix(tensor: ir.TensorProtocol, shape: tuple[int, int], turned: bool) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir as ir

    values: np.ndarray = tensor.numpy()
    matrix = values.reshape(shape[::-1]).T if turned else values.reshape(shape)
    return ir.tensor(np.ascontiguousarray(matrix), name=tensor.name)


def _plain_fused(graph: ir.Graph, node: ir.Node) -> None:
    data, weight = node.inputs[0], input_of(node, 1)
    tensor = constant(weight)
    if data is None or weight is None or tensor is None or len(tensor.shape) != 2 or (rank(data) or 0) < 2:
        return
    if any(integer(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return
    nodes: list[ir.Node] = []
    name = node.outputs[0].name or "product"
    if integer(node, "transB", 0):
        weight = _append(nodes, "Transpose", [weight], f"{name}_turned", f"{node.name}_turned", perm=[1, 0])
    product = _append(nodes, "MatMul", [data, weight], f"{name}_product", node.name)
    if (factor := real(node, "alpha", 1.0)) != 1.0:
        import numpy as np

        alpha = add_initializer(graph, free_name(graph, f"{name}_alpha"), np.array(factor, tensor.dtype.numpy()))
        _append(nodes, "Mul", [product, alpha], f"{name}_scaled", f"{node.name}_alpha")
    _replace(graph, node, nodes)


def _append(
    nodes: list[ir.Node], operator: str, inputs: list[ir.Value], output: str, name: str | None, **attributes: object
) -> ir.Value:
    import onnx_ir as ir

    nodes.append(ir.node(operator, inputs, attributes, name=name))  # type: ignore[arg-type]
    nodes[-1].outputs[0].name = output
    return nodes[-1].outputs[0]


def _reshaped(
    graph: ir.Graph, node: ir.Node, value: ir.Value, shape: list[int], part: str, nodes: list[ir.Node]
) -> ir.Value:
    import numpy as np

    name = f"{node.outputs[0].name}_{part}"
    target = add_initializer(graph, free_name(graph, name), np.array(shape, np.int64))
    return _append(nodes, "Reshape", [value, target], f"{name}_reshaped", f"{node.name}_{part}")


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put nodes in a node's place; its output keeps name, type and shape."""
    import onnx_ir as ir

    output, last = node.outputs[0], nodes[-1].outputs[0]
    name = output.name
    last.type, last.shape = output.type, output.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [last])
    last.name = name
