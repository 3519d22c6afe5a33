"""Four-bit codes of integer layers in four bits of the file: a Cast makes bytes of them when the model is loaded.

onnxruntime has no integer kernel for four-bit weights of a convolution or of a matrix product with quantized inputs.
It folds a Cast of a constant, though, and then finds the eight-bit weights that its kernels take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.onnx.graph.values import add_initializer, constant, prepend
from quantcli.onnx.weights.integer import ORIGIN

if TYPE_CHECKING:
    import onnx_ir as ir


def store_in_four_bits(model: ir.Model) -> None:
    """Replace int8 constants that are four-bit codes by int4 ones and a Cast."""
    import onnx_ir as ir

    for name, value in list(model.graph.initializers.items()):
        origin, tensor = value.meta.get(ORIGIN), constant(value)
        if origin is None or tensor is None or origin.number_format.bits != 4 or tensor.dtype != ir.DataType.INT8:
            continue
        del model.graph.initializers[name]
        values = tensor.numpy().astype(ir.DataType.INT4.numpy())
        narrow = add_initializer(model.graph, name, ir.tensor(values, dtype=ir.DataType.INT4, name=name))
        cast = ir.node("Cast", [narrow], {"to": ir.DataType.INT8}, name=f"{name}_cast")
        wide = cast.outputs[0]
        wide.name, wide.type, wide.shape = f"{name}_bytes", value.type, value.shape
        value.replace_all_uses_with(wide)
        prepend(model.graph, cast)
