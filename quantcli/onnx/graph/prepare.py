"""From any ONNX graph to the one that is calibrated and quantized: same function, fewer disguises.

Calibration and conversion both start from `prepare`, so that a value's name means the same to both.
Names of values that survive, of inputs and outputs above all, are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING

from quantcli.errors import InputError
from quantcli.onnx.graph.casts import look_through_casts
from quantcli.onnx.graph.external import SMALL_BYTES, take_in
from quantcli.onnx.graph.fold import fold_affine
from quantcli.onnx.graph.model import OnnxModel
from quantcli.onnx.graph.operands import is_matrix_transpose
from quantcli.onnx.graph.products import plain_products
from quantcli.onnx.graph.regroup import regroup_constants
from quantcli.onnx.graph.simplify import drop_identities, fold_constants, infer_shapes, lift_constants, remove_unused
from quantcli.onnx.graph.values import (
    add_initializer,
    array,
    constant,
    free_name,
    holds_infinity,
    input_of,
    integer,
    integers,
    is_standard,
    only_consumer,
    rank,
)
from quantcli.system.text import first_line

if TYPE_CHECKING:
    import onnx_ir as ir

#: What a step stumbles over in a graph that it has no idea of.
_STUMBLES = (ValueError, RuntimeError, KeyError, TypeError, IndexError, AttributeError, AssertionError)

#: The steps by which a graph is simplified, in turn; each keeps its function, and all can do without each other.
STEPS = (
    "inline functions", "lift constants", "drop identities", "look through casts", "fold constants",
    "lift folded constants", "infer shapes", "regroup constants", "write products plainly", "join products with biases",
    "turn weights", "fold affine nodes", "pool in place of means",
)  # fmt: skip


def prepare(model: OnnxModel, *, fold: bool = True, without: Collection[str] = (), defaults: bool = False) -> ir.Model:
    """A copy of the graph with functions inlined, constants folded, and with ``fold`` batch norm in the weights.

    A step that fails is left out, as are those of `STEPS` that are named in ``without``. With ``defaults`` integers
    that were inputs as well still are, so that nobody computes shapes of them beforehand.

    Raises:
        InputError: the graph is inconsistent.
    """
    from onnx_ir.passes import common

    steps = dict(zip(STEPS, _functions(), strict=True))
    left_out = {*without} | (set() if fold else {"fold affine nodes"})
    while True:
        try:
            graph_model = model.ir.clone()
        except _STUMBLES as error:
            raise InputError(f"{model.shown} is not a consistent ONNX graph: {first_line(error)}") from error
        common.RemoveInitializersFromInputsPass()(graph_model)
        if defaults:
            _list_integers(graph_model, model.defaults)
        # Initializers that are no inputs came with this version.
        graph_model.ir_version = max(graph_model.ir_version or 0, 4)
        take_in(graph_model, SMALL_BYTES)
        failed = _first_failure(graph_model, {name: step for name, step in steps.items() if name not in left_out})
        if failed is None:
            break
        # What failed halfway may be anything now: the next try begins anew.
        left_out.add(failed)
    try:
        remove_unused(graph_model)
        common.NameFixPass()(graph_model)
    except _STUMBLES as error:
        raise InputError(f"{model.shown} is not a consistent ONNX graph: {first_line(error)}") from error
    return graph_model


def _list_integers(model: ir.Model, names: Collection[str]) -> None:
    """Make those of some initializers that hold integers inputs."""
    for name, value in model.graph.initializers.items():
        if name in names and value.dtype is not None and value.dtype.is_integer():
            model.graph.inputs.append(value)


def _functions() -> tuple[Callable[[ir.Model], object], ...]:
    """What does each of the steps."""
    from onnx_ir.passes import common

    return (
        common.InlinePass(), lift_constants, drop_identities, look_through_casts, fold_constants, lift_constants,
        infer_shapes, regroup_constants, plain_products, _products_with_bias, _turn_weights, fold_affine,
        _pool_instead_of_mean,
    )  # fmt: skip


def _first_failure(model: ir.Model, steps: Mapping[str, Callable[[ir.Model], object]]) -> str | None:
    """Take the steps; the name of the one that fails, or None."""
    for name, step in steps.items():
        try:
            step(model)
        except _STUMBLES:
            return name
    return None


def _turn_weights(model: ir.Model) -> None:
    """Take Transposes of a matrix that nobody else reads into it, or of a table; it is turned when it is read."""
    import onnx_ir as ir

    for node in list(model.graph):
        value, output = (node.inputs[0], node.outputs[0]) if is_matrix_transpose(node) else (None, None)
        tensor = constant(value)
        if value is None or output is None or tensor is None or value.graph is not model.graph:
            continue
        if value.is_graph_output() or output.is_graph_output() or len(tensor.shape) != 2:
            continue
        others = [use for use in value.uses() if use.node is not node]
        # A table is stored as it is looked up in; what multiplies by it turns it.
        if others and not any(is_standard(reader, "Gather") for reader in output.consumers()):
            continue
        shape = ir.Shape(tensor.shape.numpy()[::-1])
        value.const_value = ir.LazyTensor(partial(_turned, tensor), dtype=tensor.dtype, shape=shape, name=value.name)
        value.shape = shape
        output.replace_all_uses_with(value)
        if not others:
            model.graph.remove(node, safe=True)
            continue
        output.shape = ir.Shape(tensor.shape.numpy())
        for reader, index in others:
            reader.replace_input_with(index, output)
        model.graph.remove(node)
        model.graph.insert_before(model.graph[0], node)


def _turned(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir as ir

    return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=tensor.name)


def _products_with_bias(model: ir.Model) -> None:
    """Write a matrix product and the constant vector added to it as one Gemm, where the input is a matrix.

    The runtime does the same at load, but then no longer finds the integer form of the product.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        data, weight = (node.inputs[0], constant(node.inputs[1])) if is_standard(node, "MatMul") else (None, None)
        add = only_consumer(node.outputs[0]) if weight is not None else None
        if data is None or weight is None or add is None or not is_standard(add, "Add") or add.graph is not model.graph:
            continue
        bias = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        tensor = constant(bias)
        if rank(data) != 2 or len(weight.shape) != 2 or tensor is None or list(tensor.shape) != [weight.shape[1]]:
            continue
        # What masks classes out is no bias: integer kernels have none that is infinite.
        if not weight.dtype.is_floating_point() or holds_infinity(bias):
            continue
        gemm = ir.Node("", "Gemm", [data, node.inputs[1], bias], num_outputs=1, name=node.name)
        output = add.outputs[0]
        gemm.outputs[0].type, gemm.outputs[0].shape = output.type, output.shape
        name = output.name
        ir.convenience.replace_nodes_and_values(model.graph, node, [add, node], [gemm], [output], [gemm.outputs[0]])
        gemm.outputs[0].name = name


def _pool_instead_of_mean(model: ir.Model) -> None:
    """Write a mean over both spatial dimensions as GlobalAveragePool, which has an integer kernel."""
    import numpy as np
    import onnx_ir as ir

    for node in list(model.graph):
        data = input_of(node, 0)
        if not is_standard(node, "ReduceMean") or data is None or rank(data) != 4:
            continue
        # The runtime has no pool of integers or doubles.
        if data.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            continue
        axes = integers(node, "axes")
        if axes is None:
            values = array(input_of(node, 1))
            axes = None if values is None else values.reshape(-1).tolist()
        if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            continue
        output = node.outputs[0]
        pooled = ir.Node("", "GlobalAveragePool", [data], num_outputs=1, name=f"{node.name}_pool")
        pooled.outputs[0].type = output.type
        nodes, last = [pooled], pooled
        if not integer(node, "keepdims", 1):
            # Zero keeps a dimension as it is, so the batch stays free.
            shape = add_initializer(model.graph, free_name(model.graph, f"{output.name}_shape"), np.array([0, 0]))
            pooled.outputs[0].name = f"{output.name}_pooled"
            last = ir.Node("", "Reshape", [pooled.outputs[0], shape], num_outputs=1, name=f"{node.name}_flat")
            nodes.append(last)
        last.outputs[0].type, last.outputs[0].shape = output.type, output.shape
        name = output.name
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, [output], [last.outputs[0]])
        last.outputs[0].name = name
