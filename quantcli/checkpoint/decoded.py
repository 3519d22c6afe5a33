"""A quantized checkpoint read as values."""

from __future__ import annotations

import threading
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.quantized import SECTIONS, QuantizedCheckpoint
from quantcli.core.tensors import QuantizedTensor, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

#: Of a manifest, what tells of its artifact's making.
_ORIGIN = ("quantcli", "input_sha256", "scheme", "algorithm")

#: Decoded weights kept at a time: neighbouring slabs, and workers, ask for the same ones.
_KEPT = 2
#: Bytes of a code meanwhile: as it is unpacked, turned, and in the tensors that are kept.
_HELD = 4


class DecodedCheckpoint(Checkpoint):
    """A quantized checkpoint seen as an ordinary one: quantized weights are float32, the rest as it is.

    At most a few weights are held as codes at a time; values are made of them as rows are asked for.
    """

    def __init__(self, quantized: QuantizedCheckpoint) -> None:
        original = quantized.checkpoint
        self.original = original
        self._quantized = quantized
        self._kept: OrderedDict[str, QuantizedTensor] = OrderedDict()
        self._deciding = threading.Lock()
        self._loading: dict[str, threading.Lock] = {name: threading.Lock() for name in quantized.weights}
        infos = tuple(_in_order(quantized))
        super().__init__(
            original.path, infos, folder=original.folder, metadata=original.metadata, warnings=original.warnings
        )
        if self.config is not None:
            self.config = {key: value for key, value in self.config.items() if key not in SECTIONS}

    @property
    def held_bytes(self) -> int:
        """Memory for the largest weight while it is decoded: its codes as stored, unpacked, turned and kept."""
        return max(_HELD * prod(weight.shape) + weight.nbytes for weight in self._quantized.weights.values())

    def origin(self) -> dict[str, Any]:
        """What is known of where the codes come from, for the manifest of what is made of them."""
        made = {key: value for key, value in self.manifest.to_json().items() if key in _ORIGIN}
        return {"format": self._quantized.form.NAME} | made

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights, sorted."""
        return self.original.files

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor; float32 where they are decoded."""
        weight = self._quantized.weights.get(info.name)
        if weight is None:
            return self.original.read_rows(info, start, stop)
        from quantcli.core import numerics

        tensor = self._tensor(info.name)
        if weight.transposed:
            return _blocks(tensor, 0, weight.shape[0]).T[start:stop].contiguous()
        if tensor.number_format.granularity.kind == "block":
            return _blocks(tensor, start, stop)
        one_scale = tensor.number_format.granularity.kind == "tensor"
        rows = slice(0, 1) if one_scale else slice(start, stop)
        zero_point = None if tensor.zero_point is None else tensor.zero_point[rows]
        codes = tensor.codes[start:stop]
        part = QuantizedTensor(codes, tensor.scale[rows], zero_point, tuple(codes.shape), tensor.number_format)
        return numerics.decoded(part)

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
            infos.append(TensorInfo(weight.name, shape, "F32", prod(shape) * 4, info.file))
        elif info.name in rest:
            infos.append(info)
    return infos
