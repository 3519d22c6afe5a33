"""fp16 and bf16: weights are stored at half size, and one Cast brings each back to float32, or to float64.

On a CPU onnxruntime computes in float32 either way, and folds these casts when it loads the model: what is gained
is the file's size. The graph's own inputs, outputs and arithmetic stay float32, so that nothing overflows in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quantcli.core.dtypes import DTYPE_OF_NUMBER
from quantcli.core.scheme import Scheme
from quantcli.core.tensors import Rounding
from quantcli.errors import InputError
from quantcli.onnx.graph.casts import stored_bytes
from quantcli.onnx.graph.values import constant, free_name
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.forms import Form
from quantcli.onnx.plan.plan import LayerOutcome, NodePlan

if TYPE_CHECKING:
    import onnx_ir as ir

#: Matrices below this many bytes, and vectors below this many, stay: they weigh nothing.
_SMALLEST_MATRIX, _SMALLEST_VECTOR = 1 << 10, 1 << 16

#: Of a tensor's power. Rounding alone is far below; beyond, values have fallen under the smallest number.
_MOST_NOISE = 1e-3

#: The operator set whose Cast knows bf16.
_BF16_OPSET = 13

#: Values looked at together.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class CastWeight:
    """A weight that was cast; or one that stayed as it was, and ``stays`` says why."""

    value: ir.Value
    nbytes: int
    rounding: Rounding | None = None
    stays: str | None = None
    decoded: Callable[[], np.ndarray] | None = None


def cast_weights(model: ir.Model, dtype: str, chosen: Collection[ir.Value] | None = None) -> list[CastWeight]:
    """Store a model's wider weights as ``dtype``, fp16 or bf16, in place; casting is put off until they are saved.

    Small tensors stay as they are and are not listed; where some are ``chosen``, all others neither.

    Raises:
        InputError: there is nothing to cast, because the model is in half precision already or holds no weights;
            or its operator set is too old for bf16.
    """
    opset = model.opset_imports.get("", 1)
    if dtype == "bf16" and opset < _BF16_OPSET:
        raise InputError(
            f"The model uses operator set {opset}, which has no bf16; it came with {_BF16_OPSET}.", "Use fp16."
        )
    weights = [
        value
        for graph in model.graphs()
        for value in list(graph.initializers.values())
        if _is_weight(value) and (chosen is None or value in chosen)
    ]
    if not weights:
        raise InputError(_nothing_to_cast(model, dtype))
    return [_cast(value, dtype) for value in weights]


def _is_weight(value: ir.Value) -> bool:
    tensor = constant(value)
    if tensor is None or tensor.dtype.name not in ("FLOAT", "DOUBLE") or value.is_graph_output():
        return False
    return tensor.nbytes >= (_SMALLEST_MATRIX if len(tensor.shape) > 1 else _SMALLEST_VECTOR)


def _nothing_to_cast(model: ir.Model, dtype: str) -> str:
    constants = [tensor for graph in model.graphs() for v in graph.initializers.values() if (tensor := constant(v))]
    halves = {tensor.dtype.name: tensor.nbytes for tensor in constants if tensor.dtype.name in ("FLOAT16", "BFLOAT16")}
    if halves:
        names = " and ".join("fp16" if name == "FLOAT16" else "bf16" for name in sorted(halves))
        return f"The model's weights are {names} already; there is nothing to cast to {dtype}."
    return f"The model holds no float32 weights to cast to {dtype}."


def _cast(value: ir.Value, dtype: str) -> CastWeight:
    import onnx_ir as ir

    tensor, graph, name = constant(value), value.graph, value.name
    assert tensor is not None and graph is not None and name is not None
    half = ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.BFLOAT16
    signal, noise, overflows = _powers(tensor, half)
    wide = "fp32" if tensor.dtype == ir.DataType.FLOAT else "fp64"
    if overflows:
        largest = float(np.finfo(np.float16).max) if dtype == "fp16" else 3.39e38
        note = f"stays {wide}: {overflows} values lie beyond {largest:.6g}, the largest {dtype} number"
        return CastWeight(value, tensor.nbytes, stays=note)
    if noise > signal * _MOST_NOISE:
        note = f"stays {wide}: its values are too small for {dtype}, which rounds most of them to zero"
        return CastWeight(value, tensor.nbytes, stays=note)
    stored = ir.Value(
        name=free_name(graph, f"{name}_{dtype}"),
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(half),
        const_value=ir.LazyTensor(
            partial(_half, tensor, half), dtype=half, shape=ir.Shape(tensor.shape.numpy()), name=f"{name}_{dtype}"
        ),
    )
    cast = ir.node("Cast", [stored], {"to": tensor.dtype}, name=f"{name}_to_float")
    value.replace_all_uses_with(cast.outputs[0])
    graph.initializers.pop(name)
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, value.type
    graph.register_initializer(stored)
    if len(graph):
        graph.insert_before(graph[0], cast)
    else:
        graph.append(cast)
    rounding = Rounding("cast", signal=signal, noise=noise)
    return CastWeight(value, tensor.size * 2, rounding, decoded=lambda: _half(tensor, half).numpy())


def _half(tensor: ir.TensorProtocol, half: ir.DataType) -> ir.TensorProtocol:
    import onnx_ir as ir

    with np.errstate(over="ignore"):
        return ir.tensor(tensor.numpy().astype(half.numpy()), name=tensor.name)


def _powers(tensor: ir.TensorProtocol, half: ir.DataType) -> tuple[float, float, int]:
    """Powers of a tensor and of what the cast changes, over finite values; and how many finite ones overflow."""
    flat, signal, noise, overflows = tensor.numpy().reshape(-1), 0.0, 0.0, 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        with np.errstate(over="ignore", invalid="ignore"):
            back = part.astype(half.numpy()).astype(part.dtype)
        finite = np.isfinite(part)
        overflows += int(np.count_nonzero(finite & ~np.isfinite(back)))
        kept = part[finite].astype(np.float64)
        signal += float(kept @ kept)
        with np.errstate(invalid="ignore"):
            error = kept - back[finite]
        noise += float(error @ error)
    return signal, noise, overflows


def _supports(layer: NodePlan, scheme: Scheme) -> str | None:
    dtype = layer.info.dtype
    if dtype == DTYPE_OF_NUMBER[scheme.weights.dtype]:
        return f"already {scheme.weights.dtype}"
    stored = stored_bytes(layer.weight)
    if dtype not in ("F32", "F64") or (stored is not None and stored < layer.info.nbytes):
        return "already in half precision"
    return None


def _rewriter(model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence) -> Callable[[NodePlan], LayerOutcome]:
    """Casts the weights of all the layers at once, in the order of the file."""
    written: dict[ir.Value, CastWeight] = {}
    for dtype in ("fp16", "bf16"):
        chosen = {layer.weight for layer in layers if layer.scheme and layer.scheme.weights.dtype == dtype}
        if chosen:
            written |= {each.value: each for each in cast_weights(model, dtype, chosen)}

    def rewrite(layer: NodePlan) -> LayerOutcome:
        weight = written[layer.weight]
        plan = layer.left(weight.stays) if weight.stays else layer
        return LayerOutcome(plan, weight.nbytes, weight.rounding, weight.decoded)

    return rewrite


FORM = Form(
    "cast",
    lambda scheme: scheme.weights.is_cast,
    _supports,
    _rewriter,
    lambda layer: _BF16_OPSET if layer.scheme and layer.scheme.weights.dtype == "bf16" else 0,
)
