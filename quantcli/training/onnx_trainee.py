"""A quantized graph in training: what its nodes compute, with codes, scales, biases and norms that learn.

The graph that is trained is the very one that will be written: each DequantizeLinear, or Cast and Mul, of a weight,
each pair around a value and each n-bit node is replaced by a rounding with gradients
(`quantcli.algorithms.fake_quantize`), and everything else runs as it stands. What was learned is written back into the
graph's constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantcli.algorithms.fake_quantize import LearnedRange, LearnedValues, LearnedWeight, dynamic_range
from quantcli.core.numerics import error_powers, in_groups
from quantcli.core.scheme import NumberFormat
from quantcli.errors import InputError
from quantcli.onnx.execution.executor import Replacement, TorchGraph
from quantcli.onnx.execution.nbits_decode import NBITS_OPERATORS, decode
from quantcli.onnx.graph.values import array, constant, input_of, integer, is_standard
from quantcli.onnx.weights.integer import ORIGIN, Origin
from quantcli.onnx.weights.stored import (
    StoredBias,
    StoredWeight,
    read_codes,
    read_nbits,
    set_constant,
    write_codes,
    write_nbits,
)

if TYPE_CHECKING:
    import onnx_ir as ir

#: Inputs of these that are learned beside weights, by position.
_LEARNED_INPUTS = {
    "Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,), "LayerNormalization": (1, 2), "BatchNormalization": (1, 2),
    "GroupNormalization": (1, 2), "InstanceNormalization": (1, 2), "RMSNormalization": (1,),
}  # fmt: skip
#: What a vector that is added right after is the bias of.
_PRODUCTS = ("MatMul", "MatMulNBits", "Gemm", "Conv", "Mul")
#: Activations between quantized nodes: uint8, as codes from -128.
_ACTIVATION = NumberFormat("int8", symmetric=False)
_CODES, _CODE_SHIFT = 256, 128


class GraphTrainee:
    """The trainee that `quantcli.training.loop` trains."""

    def __init__(self, original: ir.Model, quantized: ir.Model, device: torch.device, *, norms: bool = True) -> None:
        """Find what is quantized, and get ready to learn it.

        Args:
            original: the prepared graph in floating point.
            quantized: the same graph, quantized; it is changed by `write_back` alone.
            device: where it is trained.
            norms: whether biases and norms learn, too.

        Raises:
            InputError: an operator has no differentiable form here, or nothing is quantized that could learn.
        """
        self.model, self.device = quantized, device
        self._floats = original.graph.initializers
        self._replaced: dict[str, Replacement] = {}
        self._weights: dict[str, StoredWeight] = {}
        self._ranges: dict[str, LearnedRange] = {}
        self._biases: dict[str, StoredBias] = {}
        self._values: dict[str, LearnedValues] = {}
        nodes = list(quantized.graph)
        for node in nodes:
            self._replace(node)
        if not self._weights:
            raise InputError("Nothing is quantized that could be trained: no weight has integer codes of its own.")
        if norms:
            for node in nodes:
                self._learn_beside(node)
        self._student = TorchGraph(quantized, device, replaceable=self._replaced)
        self._teacher = TorchGraph(original, device)

    # What learns.

    def weights(self) -> list[Tensor]:
        """Weights, in steps of their grids."""
        return [weight.learned.units for weight in self._weights.values()]

    def factors(self) -> list[Tensor]:
        """Factors of the scales of weights and activations."""
        scales = [weight.learned.scales.factor for weight in self._weights.values()]
        return scales + [learned.scale.factor for learned in self._ranges.values()]

    def values(self) -> list[Tensor]:
        """Changes of biases and norms."""
        biases = [bias.learned for bias in self._biases.values()]
        return [learned.change for learned in (*biases, *self._values.values())]

    def student(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the quantized graph."""
        values = {name: learned.values() for name, learned in self._values.items()}
        return _floating(self._student.run(inputs, values=values, replaced=self._replaced))

    def teacher(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the original graph."""
        return _floating(self._teacher.run(inputs))

    # How nodes are replaced.

    def _replace(self, node: ir.Node) -> None:
        name = node.outputs[0].name or ""
        if is_standard(node, "QuantizeLinear"):
            self._replaced[name] = partial(_first_input, self._range_of(node))
        elif is_standard(node, "DequantizeLinear"):
            self._replaced[name] = self._dequantized(node)
        elif is_standard(node, "DynamicQuantizeLinear"):
            self._replaced[name] = _dynamic
        elif is_standard(node, "Mul") and (codes := _cast_codes(node.inputs[0])) is not None:
            self._replaced[name] = partial(_constant_of, self._integer_weight(codes, node.inputs[1]))
        elif is_standard(node, "MatMulInteger"):
            self._replace_integer_product(node)
        elif node.op_type in NBITS_OPERATORS:
            self._replaced[name] = self._nbits(node)

    def _range_of(self, node: ir.Node) -> LearnedRange:
        """The range of a pair; pairs that share their scale share it."""
        scale, zero_point = array(node.inputs[1]), array(input_of(node, 2))
        key = _name(node.inputs[1])
        if key not in self._ranges:
            assert scale is not None and zero_point is not None
            shifted = torch.tensor(int(zero_point) - _CODE_SHIFT, dtype=torch.int8, device=self.device)
            start = torch.tensor(float(scale), device=self.device)
            levels = _CODES - 1 - int(zero_point)
            limit = _upper_bound(node.inputs[0])
            largest = None if limit is None or not levels else float(np.float32(limit) / np.float32(levels))
            self._ranges[key] = LearnedRange(start, shifted, _ACTIVATION, torch.float32, largest)
        return self._ranges[key]

    def _dequantized(self, node: ir.Node) -> Replacement:
        tensor = constant(node.inputs[0])
        if tensor is None:
            return _same
        assert node.inputs[0] is not None
        if tensor.dtype.name == "INT32":
            return partial(self._bias_values, node)
        return partial(_constant_of, self._integer_weight(node.inputs[0], node.inputs[1]))

    def _integer_weight(self, codes: ir.Value, scale: ir.Value | None) -> Callable[[], Tensor]:
        """An integer weight ``[channels, inputs]`` as the value that codes stand for, in their own shape."""
        weight = self._weight(codes, scale, nbits=False)
        axis, shape = weight.origin.codes_axis, weight.origin.shape
        return lambda: weight.learned.values().reshape(shape).movedim(0, axis)

    def _weight(
        self, codes: ir.Value, scale: ir.Value | None, zeros: ir.Value | None = None, *, nbits: bool
    ) -> StoredWeight:
        """What learns behind some codes; nodes that share these share it."""
        key = _name(codes)
        if key not in self._weights:
            assert scale is not None
            origin: Origin = codes.meta[ORIGIN]
            start = read_nbits(codes, scale, zeros, origin) if nbits else read_codes(codes, scale, origin)
            dtype = torch.float16 if constant(scale).dtype.name == "FLOAT16" else torch.float32  # type: ignore[union-attr]
            restrict = origin.restricted if origin.pairs else None
            learned = LearnedWeight(start, dtype, restrict, self.device)
            self._weights[key] = StoredWeight(learned, codes, scale, origin, nbits)
        return self._weights[key]

    def _original(self, origin: Origin, columns: int) -> Tensor:
        """The float weight, ``[channels, inputs]``, filled up with zeros to so many columns."""
        values = array(self._floats[origin.name])
        assert values is not None
        moved = np.moveaxis(values, origin.axis, 0).astype(np.float32) * np.float32(origin.factor)
        matrix = torch.from_numpy(np.ascontiguousarray(moved).reshape(len(moved), -1))
        return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))

    def _bias_values(self, node: ir.Node, _: Sequence[Tensor | None]) -> list[Tensor]:
        """An integer bias, rounded in units of the scales as they are now."""
        return [self._bias(node).rounded()[0]]

    def _bias(self, node: ir.Node) -> StoredBias:
        key = _name(node.outputs[0])
        if key not in self._biases:
            (reader,) = {use.node for use in node.outputs[0].uses()}
            assert node.inputs[0] is not None and node.inputs[1] is not None
            codes, scale = array(node.inputs[0]), array(node.inputs[1])
            pair, weights = reader.inputs[0].producer(), reader.inputs[1].producer()  # type: ignore[union-attr]
            assert codes is not None and scale is not None and pair is not None and weights is not None
            start = torch.from_numpy((codes.astype(np.float64) * scale).astype(np.float32)).to(self.device)
            weight = self._weight(weights.inputs[0], weights.inputs[1], nbits=False)  # type: ignore[arg-type]
            learned = LearnedValues(start, torch.float32)
            self._biases[key] = StoredBias(learned, node.inputs[0], node.inputs[1], self._range_of(pair), weight)
        return self._biases[key]

    def _replace_integer_product(self, node: ir.Node) -> None:
        """MatMulInteger and the two Muls behind it: a product of rounded values, whose scales are in them already."""
        codes = node.inputs[1]
        assert codes is not None
        cast = _reader(node.outputs[0], "Cast")
        scaled = _reader(cast.outputs[0], "Mul")
        both = next(value for value in scaled.inputs if value is not cast.outputs[0])
        scales = both.producer() if both is not None else None
        assert scales is not None
        values = self._integer_weight(codes, scales.inputs[1])
        self._replaced[_name(node.outputs[0])] = lambda inputs: [_present(inputs[0]) @ values()]
        self._replaced[_name(cast.outputs[0])] = _same
        self._replaced[_name(scaled.outputs[0])] = _same
        self._replaced[_name(scales.outputs[0])] = _same

    def _nbits(self, node: ir.Node) -> Replacement:
        """A product of a learned matrix, or of one that stays where a lookup reads the same codes."""
        lookup = node.op_type == "GatherBlockQuantized"
        codes = node.inputs[0 if lookup else 1]
        own = node.op_type == "MatMulNBits" and codes is not None and len(codes.uses()) == 1
        if own and codes is not None and ORIGIN in codes.meta:
            weight = self._weight(codes, node.inputs[2], input_of(node, 3), nbits=True)
            columns = integer(node, "K", 0)
            return lambda inputs: [_present(inputs[0]) @ weight.learned.values()[:, :columns].T]
        table = torch.from_numpy(decode(node)).to(self.device)
        if lookup:
            return lambda inputs: [table[_present(inputs[1])]]
        return lambda inputs: [_present(inputs[0]) @ table.T]

    def _learn_beside(self, node: ir.Node) -> None:
        """Let a float bias or the factors of a norm learn."""
        if is_standard(node, "DequantizeLinear") and constant(node.inputs[0]) is not None:
            if constant(node.inputs[0]).dtype.name == "INT32":  # type: ignore[union-attr]
                self._bias(node)
            return
        places: Sequence[int] = _LEARNED_INPUTS.get(node.op_type, ())
        if is_standard(node, "Add"):
            producers = [value.producer() if value is not None else None for value in node.inputs]
            places = [
                index for index in (0, 1) if (other := producers[1 - index]) is not None and other.op_type in _PRODUCTS
            ]
        for index in places:
            value, tensor = input_of(node, index), constant(input_of(node, index))
            if value is None or tensor is None or tensor.dtype.name != "FLOAT" or len(tensor.shape) != 1:
                continue
            if tensor.shape.numpy()[0] > 1 and value.name not in self._values:
                start = torch.from_numpy(np.array(tensor.numpy())).to(self.device)
                # What a norm multiplies by comes right before what it adds.
                factors = index == 1 and not is_standard(node, "Add")
                self._values[_name(value)] = LearnedValues(start, torch.float32, factors=factors)

    # What was learned.

    @torch.no_grad()
    def write_back(self) -> dict[str, tuple[float, float]]:
        """Put what was learned into the graph's constants; returns the powers of each weight and of its error."""
        losses = {}
        for weight in self._weights.values():
            tensor = weight.learned.tensor()
            original = self._original(weight.origin, tensor.codes.shape[1])
            write_nbits(weight, tensor) if weight.nbits else write_codes(weight, tensor)
            losses[weight.origin.name] = error_powers(in_groups(original, tensor.number_format), tensor)
        for name, learned in self._ranges.items():
            set_constant(self.model.graph.initializers[name], learned.values().reshape(()).cpu().numpy())
        for bias in self._biases.values():
            _, codes, scale = bias.rounded()
            set_constant(bias.codes, codes.cpu().numpy())
            set_constant(bias.scale, scale.cpu().numpy())
        for name, values in self._values.items():
            set_constant(self.model.graph.initializers[name], values.values().cpu().numpy())
        return losses


def _cast_codes(value: ir.Value | None) -> ir.Value | None:
    """The codes of a weight that a Cast makes a value of, to be multiplied by their scale; None of any other value."""
    node = value.producer() if value is not None else None
    codes = node.inputs[0] if node is not None and is_standard(node, "Cast") else None
    return codes if codes is not None and ORIGIN in codes.meta else None


def _upper_bound(value: ir.Value | None) -> float | None:
    """Where a Clip cuts a value: with codes beyond that it would not be absorbed into the kernel before it."""
    node = value.producer() if value is not None else None
    most = array(input_of(node, 2)) if node is not None and is_standard(node, "Clip") else None
    return None if most is None else float(most)


def _reader(value: ir.Value, operator: str) -> ir.Node:
    """The node of this kind that reads a value."""
    return next(use.node for use in value.uses() if use.node.op_type == operator)


def _first_input(function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    return [function(_present(inputs[0]))]


def _constant_of(values: Callable[[], Tensor], _: Sequence[Tensor | None]) -> list[Tensor]:
    return [values()]


def _same(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    return [_present(inputs[0])]


def _dynamic(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """What DynamicQuantizeLinear does to values, with scale and zero point in them already."""
    values = dynamic_range(_present(inputs[0]), _ACTIVATION)
    return [values, values.new_ones(()), values.new_zeros(())]


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _floating(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in outputs.items() if values.is_floating_point()}


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name
