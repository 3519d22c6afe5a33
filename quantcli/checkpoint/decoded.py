"""A quantized checkpoint read as values."""

from __future__ import annotations

import threading
from collections import OrderedDict
from math import prod
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint, CheckpointView
from quantcli.checkpoint.config_file import without_section
from quantcli.checkpoint.floats import FloatCheckpoint
from quantcli.checkpoint.quantized import QuantizedCheckpoint, QuantizedWeight, open_values
from quantcli.core.tensors import QuantizedTensor, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

#: Of a manifest, what tells of its artifact's making.
_ORIGIN = ("quantcli", "input_sha256", "scheme", "algorithm")

#: Decoded weights kept at a time: neighbouring slabs, and workers, ask for the same ones.
_KEPT = 2
#: Bytes of a code meanwhile: as it is unpacked, turned, and in the tensors that are kept.
_HELD = 4


class DecodedCheckpoint(CheckpointView):
    """A quantized checkpoint seen as an ordinary one: quantized weights are float32, the rest as it is.

    At most a few weights are held as codes at a time; values are made of them as rows are asked for.
    """

    def __init__(self, quantized: QuantizedCheckpoint) -> None:
        self._quantized = quantized
        self._kept: OrderedDict[str, QuantizedTensor] = OrderedDict()
        self._deciding = threading.Lock()
        self._loading: dict[str, threading.Lock] = {name: threading.Lock() for name in quantized.weights}
        self._show(quantized.checkpoint, _in_order(quantized), quantized.form.NAME)

    def _show(self, original: Checkpoint, infos: list[TensorInfo], method: str) -> None:
        """Be the checkpoint that has these tensors in place of the original's."""
        self.method = method
        CheckpointView.__init__(self, original, infos)
        if self.config is not None:
            self.config = without_section(self.config)

    @property
    def held_bytes(self) -> int:
        """Memory for the largest weight while it is decoded: its codes as stored, unpacked, turned and kept."""
        weights = self._quantized.weights.values()
        return max((_HELD * prod(weight.shape) + weight.nbytes for weight in weights), default=0)

    def origin(self) -> dict[str, Any]:
        """What is known of where the codes come from, for the manifest of what is made of them."""
        made = {key: value for key, value in self.manifest.to_json().items() if key in _ORIGIN}
        return {"format": self.method} | made

    @property
    def is_read_only(self) -> bool:
        """Whether it is in a form that quantcli does not write: its values can be quantized to any scheme."""
        return self._quantized.is_read_only

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the inputs of some layers are quantized as well, which its values do not tell."""
        return any(weight.scheme.inputs for weight in self._quantized.weights.values())

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor; float32 where they are decoded."""
        weight = self._quantized.weights.get(info.name)
        if weight is None:
            return self.original.read_rows(info, start, stop)
        tensor = self._tensor(info.name)
        if weight.transposed:
            return self._matrix(tensor, weight, 0, weight.shape[0]).T[start:stop].contiguous()
        return self._matrix(tensor, weight, start, stop)

    def _matrix(self, tensor: QuantizedTensor, weight: QuantizedWeight, start: int, stop: int) -> Tensor:
        """Rows of a weight ``[outputs, inputs]``."""
        from quantcli.core import numerics

        if weight.order is not None:
            return self._in_groups(tensor, weight.order, start, stop)
        if tensor.number_format.granularity.kind == "block":
            return _blocks(tensor, start, stop)
        one_scale = tensor.number_format.granularity.kind == "tensor"
        rows = slice(0, 1) if one_scale else slice(start, stop)
        zero_point = None if tensor.zero_point is None else tensor.zero_point[rows]
        codes = tensor.codes[start:stop]
        part = QuantizedTensor(codes, tensor.scale[rows], zero_point, tuple(codes.shape), tensor.number_format)
        return numerics.decoded(part)

    def _in_groups(self, tensor: QuantizedTensor, order: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows of a weight each of whose columns has the scale of its own group."""
        groups = self.original.read_rows(order, 0, order.rows).long()
        values = tensor.codes[start:stop].float()
        if tensor.zero_point is not None:
            values -= tensor.zero_point[start:stop][:, groups]
        return values.mul_(tensor.scale[start:stop][:, groups])

    def _tensor(self, name: str) -> QuantizedTensor:
        with self._loading[name]:
            with self._deciding:
                tensor = self._kept.pop(name, None)
            tensor = tensor or self._quantized.tensor(name)
            with self._deciding:
                self._kept[name] = tensor
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return tensor


class DecodedFloats(DecodedCheckpoint):
    """A checkpoint of scaled floating-point weights seen as an ordinary one, as `DecodedCheckpoint`.

    Nothing is held: values are made of the rows that are asked for.
    """

    def __init__(self, floats: FloatCheckpoint) -> None:
        self._floats = floats
        self._show(floats.checkpoint, floats.infos(), floats.method)

    @property
    def held_bytes(self) -> int:
        """Memory for rows while they are decoded."""
        return self._floats.held_bytes

    @property
    def is_read_only(self) -> bool:
        """Whether it is in a form that quantcli does not write: its values can be quantized to any scheme."""
        return True

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the inputs of some layers are quantized as well; that does not count, since these never were here."""
        return False

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor; float32 where they are decoded."""
        if info.name in self._floats.weights:
            return self._floats.rows(info.name, start, stop)
        return self.original.read_rows(info, start, stop)


def decoded_checkpoint(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """A quantized checkpoint of any kind that is read, as values. Raises InputError where it is not or is damaged."""
    found = open_values(checkpoint)
    if isinstance(found, FloatCheckpoint):
        return DecodedFloats(found)
    decoded = DecodedCheckpoint(found)
    if found.is_read_only:
        decoded.warnings += (f"The model was quantized before ({found.scheme}): what that cost stays.",)
    return decoded


def _blocks(tensor: QuantizedTensor, start: int, stop: int) -> Tensor:
    """Rows of a weight whose scales are per block of the flattened tensor; the last block may be short."""
    from torch.nn.functional import pad

    from quantcli.core import numerics

    columns, size = tensor.shape[1], tensor.number_format.granularity.size or 1
    first, last = start * columns // size, -(-stop * columns // size)
    codes = tensor.codes.reshape(-1)[first * size : last * size]
    codes = pad(codes, (0, (last - first) * size - len(codes))).reshape(-1, size)
    values = numerics.dequantize(codes, tensor.scale[first:last], None, tensor.number_format).reshape(-1)
    return values[start * columns - first * size : stop * columns - first * size].reshape(-1, columns)


def _in_order(quantized: QuantizedCheckpoint) -> list[TensorInfo]:
    """Tensors as the model itself has them, a weight where its codes lie."""
    rest = {info.name for info in quantized.rest}
    by_codes = {quantized.form.codes_name(name, weight.scheme): weight for name, weight in quantized.weights.items()}
    infos = []
    for info in quantized.checkpoint.infos():
        if info.name in by_codes:
            weight = by_codes[info.name]
            shape = weight.shape[::-1] if weight.transposed else weight.shape
            infos.append(TensorInfo(weight.name, shape, "F32", prod(shape) * 4, info.file, decoded=True))
        elif info.name in rest:
            infos.append(info)
    return infos
