"""What shapes a graph's values have for inputs of given shapes, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

#: Bytes of a constant that shapes may be computed from; of larger ones the shape is all that counts.
_MOST_BYTES = 1024


class ShapeTrial:
    """A graph whose shapes onnx infers again for each choice of its inputs' shapes."""

    def __init__(self, model: ir.Model) -> None:
        import onnx_ir as ir

        self._proto = ir.to_proto(_lean(model))
        self._inputs = {value.name: value for value in self._proto.graph.input}

    def shapes(self, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """The shapes that are known to the last dimension, by the names of values.

        What follows a node whose inputs do not fit together has none.

        Args:
            inputs: the shapes of the graph's inputs, by name; others stay as they are.
        """
        import onnx

        for name, shape in inputs.items():
            dims = self._inputs[name].type.tensor_type.shape.dim
            del dims[:]
            dims.extend(onnx.TensorShapeProto.Dimension(dim_value=length) for length in shape)
        try:
            graph = onnx.shape_inference.infer_shapes(self._proto, data_prop=True).graph
        except onnx.shape_inference.InferenceError:
            return {}
        known = {value.name: _shape(value) for value in (*graph.input, *graph.value_info, *graph.output)}
        return {name: shape for name, shape in known.items() if shape is not None}


def _lean(model: ir.Model) -> ir.Model:
    """A copy without large constants, and without the shapes that it notes of what it computes."""
    import onnx_ir as ir

    lean = model.clone()
    graph = lean.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes > _MOST_BYTES:
            if tensor is not None:
                value.shape, value.dtype, value.const_value = ir.Shape(tensor.shape.numpy()), tensor.dtype, None
            del graph.initializers[name]
            if not value.is_graph_input():
                graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy(), name=name)
    for node in graph:
        for output in node.outputs:
            output.shape = None
    return lean


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """A tensor's shape, None where any of its dimensions is unknown."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    dims = tensor.shape.dim
    return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else None
