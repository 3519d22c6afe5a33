"""NaN and infinity among the weights that a plan quantizes, found before anything is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.errors import InputError
from quantcli.onnx.graph.values import array, constant, input_of
from quantcli.onnx.plan.plan import GraphPlan

if TYPE_CHECKING:
    import onnx_ir as ir

#: Values looked at together.
_CHUNK = 1 << 22


def require_finite(plan: GraphPlan) -> None:
    """Raise InputError where a weight that is quantized holds NaN or infinity, or the bias of such a layer does.

    A bias of -inf masks a class out, and stays one where only the weight becomes codes: with fixed ranges, biases do.
    """
    seen = set()
    for layer in plan.nodes:
        if not layer.form:
            continue
        bias = None if layer.node.op_type == "Gather" else input_of(layer.node, 2)
        for value, masks in ((layer.weight, False), (bias, layer.form != "static")):
            if value is not None and (value, masks) not in seen:
                seen.add((value, masks))
                _require_finite(value, layer.name, masks)


def _require_finite(value: ir.Value, layer: str, masks: bool) -> None:
    tensor = constant(value)
    if tensor is None or not tensor.dtype.is_floating_point():
        return
    values = array(value)
    assert values is not None
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        wanted = ~np.isnan(part) if masks else np.isfinite(part)
        if not wanted.all():
            index = start + int(np.argmin(wanted))
            place = [int(part) for part in np.unravel_index(index, values.shape)]
            raise InputError(
                f"{value.name} holds NaN or infinite values, which cannot be quantized: {float(flat[index])} at {place}"
                " is the first.",
                f"Repair the model, or leave the layer out with --skip {layer}.",
            )
