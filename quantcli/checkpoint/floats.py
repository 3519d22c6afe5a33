"""Checkpoints of weights in eight bits, or four, with scales, as some models are published: mostly floating-point ones.

What a weight is follows from dtypes and shapes. Whatever tool wrote it, a value is its code times a scale, for all
values, a row, a group or a block; only where blocks end in the middle is the configuration asked for their size.

- FP8 (``fp8``, ``fbgemm_fp8``, compressed-tensors): ``weight`` F8 with ``weight_scale_inv`` or ``weight_scale``; both
  are multiplied. MXFP8 has scales of eight bits that are powers of two (E8M0).
- FP8 without any scale: a plain cast. A scale that is missing is told from that by what the rest of the file has.
- INT8 of bitsandbytes: ``weight`` I8 with ``SCB``, the largest value of a row, which is 127.
- FP4 of compressed-tensors: ``weight_packed`` U8, two E2M1 codes each, with ``weight_scale``: E8M0 for 32 values
  (MXFP4), or F8 for 16 beside a ``weight_global_scale`` that divides (NVFP4).
- NVFP4 of ModelOpt (``modelopt``): ``weight`` U8, ``weight_scale`` F8, and a ``weight_scale_2`` that multiplies.
- FP4 beside FP8 (``fp8``): ``weight`` I8 or U8, two E2M1 codes each, with ``weight_scale_inv``.
- MXFP4 of gpt-oss (``mxfp4``): ``X_blocks`` U8 ``[experts, outputs, groups, 16]`` and ``X_scales`` U8 stand for ``X``
  ``[experts, inputs, outputs]``.

Values are float32, exact but for one rounding of the product. torch is imported only where they are made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_BYTES = ("I8", "U8")
#: Kinds of checkpoints whose signed bytes are integers, and what one of them calls the largest value of each row.
_WITH_INTEGERS = ("compressed-tensors", "bitsandbytes")
_LARGEST = "SCB"
#: One scale over the scales, of two tools: the one divides by it, the other multiplies.
_OVER_ALL = ("_global_scale", "_scale_2")
#: What inputs are multiplied by before a layer, so that its weight alone is not what the layer computes with.
_OF_LAYER = "pre_quant_scale"
#: Values of the 16 codes of E2M1.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: Sides of a block where nothing else is said: DeepSeek's, which all others took over.
_BLOCK = (128, 128)
_PER_MX_SCALE = 32
#: Outputs of an expert decoded at a time.
_CHUNK = 512

#: Tensors beside a weight that tell of its inputs, and mean nothing without its codes.
_OF_INPUTS = re.compile(r"(input|activation)(_global)?_(scale|zero_point)(_ub)?$")
#: Scales of a cache of keys and values, which quantized runtimes read.
_OF_CACHE = re.compile(r"(^|\.)[kvq]_scale$|(^|\.)(prob|prob_output)_scale$")
#: Parts of weights that are left once all that is known was taken.
_PART = re.compile(r"(_scale|_scale_inv|_global_scale|_packed|_blocks|_scales|_zero_point|qweight)$")


@dataclass(frozen=True)
class FloatWeight:
    """A weight as codes and scales: ``block`` is how many rows and columns share a scale, ``packed`` means FP4.

    ``codes`` hold its rows, and are its values where there is no ``scale``; ``by_expert``: gpt-oss, whose experts are
    stored turned.
    """

    name: str
    shape: tuple[int, ...]
    label: str
    codes: TensorInfo
    scale: TensorInfo | None
    block: tuple[int, int]
    others: tuple[TensorInfo, ...] = ()
    packed: bool = False
    by_expert: bool = False

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Every tensor that stands for it."""
        return (self.codes, *([self.scale] if self.scale else []), *self.others)


class FloatCheckpoint:
    """The scaled weights of a checkpoint, and their values. Use `quantized.open_values`."""

    def __init__(self, checkpoint: Checkpoint, method: str, section: Mapping[str, Any]) -> None:
        self.checkpoint, self.method = checkpoint, method
        self._infos = {info.name: info for info in checkpoint.infos()}
        self._section = section
        self._is_cast = not section and _is_cast(self._infos)
        found = (self._weight(info) for info in self._infos.values())
        self.weights = {weight.name: weight for weight in found if weight is not None}
        taken = {part.name for weight in self.weights.values() for part in weight.parts}
        rest = [info for info in self._infos.values() if info.name not in taken and not _of_inputs(info.name)]
        self.rest = tuple(rest)
        for info in rest:
            if info.name.endswith(_OF_LAYER):
                raise InputError(f"{info.name} scales the inputs of a layer whose weight was quantized: not read.")
            if info.dtype in _FP8 or (_PART.search(info.name) and not _is_plain(info)):
                raise InputError(
                    f"{info.name} ({info.dtype}) has no scale, or is one of no weight, in {checkpoint.path}.",
                    "The file is damaged, or in a form that is not known.",
                )
        if not self.weights:
            raise InputError(f"{checkpoint.path} is declared as {method}, but holds no weight of a kind that is read.")

    @property
    def scheme(self) -> str:
        """What most weights are."""
        return Counter(weight.label for weight in self.weights.values()).most_common(1)[0][0]

    @property
    def held_bytes(self) -> int:
        """Memory for one slab while it is decoded, beside its values."""
        experts = [prod(weight.shape[1:]) * 4 for weight in self.weights.values() if len(weight.shape) == 3]
        return max([16 << 20, *experts])

    def infos(self) -> list[TensorInfo]:
        """Tensors as the model itself has them, a weight where its codes lie."""
        rest = {info.name for info in self.rest}
        by_codes = {weight.codes.name: weight for weight in self.weights.values()}
        infos = []
        for info in self._infos.values():
            if info.name in by_codes:
                weight = by_codes[info.name]
                nbytes = prod(weight.shape) * 4
                infos.append(TensorInfo(weight.name, weight.shape, "F32", nbytes, info.file, decoded=True))
            elif info.name in rest:
                infos.append(info)
        return infos

    def _weight(self, info: TensorInfo) -> FloatWeight | None:
        """The weight whose codes a tensor holds, if it does."""
        name = info.name
        if name.endswith("_blocks") and info.dtype == "U8":
            return self._experts(info)
        if name.endswith("_packed") and info.dtype == "U8":
            return self._scaled(info, name.removesuffix("_packed"), packed=True)
        scale = self._scale_of(name)
        if info.dtype in _FP8 and scale:
            return self._scaled(info, name, packed=False)
        if info.dtype in _FP8 and self._is_cast:
            return FloatWeight(name, info.shape, "fp8", info, None, (1, 1))
        if info.dtype in _BYTES and scale and len(info.shape) > 1:
            # Bytes that are not packed are integers, and then they have a sign.
            return self._scaled(info, name, packed=info.dtype != "I8" or self.method not in _WITH_INTEGERS)
        return None

    def _scale_of(self, name: str) -> TensorInfo | None:
        largest = self._infos.get(f"{name.removesuffix('weight')}{_LARGEST}") if name.endswith("weight") else None
        return self._infos.get(f"{name}_scale_inv") or self._infos.get(f"{name}_scale") or largest

    def _scaled(self, codes: TensorInfo, name: str, *, packed: bool) -> FloatWeight:
        scale = self._scale_of(name)
        if scale is None:
            raise InputError(f"{name}_scale is missing: without it {codes.name} means nothing.")
        shape = (*codes.shape[:-1], codes.shape[-1] * (1 + packed))
        zero_point = self._infos.get(f"{name}_zero_point")
        if zero_point is not None:
            raise InputError(f"{name} is {codes.dtype} with zero points, and that is not read.")
        block = _block(shape, scale.shape, self._declared())
        # Codes of four bits have scales of eight: with wide ones they would be integers.
        if block is None or not ((scale.is_float and not packed) or scale.dtype in (*_FP8, "U8", "F8_E8M0")):
            raise InputError(
                f"{name} {list(shape)} has the scales {scale.name} {scale.dtype} {list(scale.shape)}, which do not "
                "divide it into rows, groups or blocks.",
                "The file is damaged, or in a form that is not known.",
            )
        kind = "int8" if codes.dtype == "I8" and not packed else "fp4" if packed else "fp8"
        label = f"{kind}, {_shared(shape, block)}"
        beside = (f"{name}_shape", f"{name}_format", *(name + suffix for suffix in _OVER_ALL))
        others = tuple(part for part in map(self._infos.get, beside) if part)
        return FloatWeight(name, shape, label, codes, scale, block, others, packed)

    def _experts(self, blocks: TensorInfo) -> FloatWeight:
        name = blocks.name.removesuffix("_blocks")
        scale = self._infos.get(f"{name}_scales")
        if scale is None or scale.dtype != "U8":
            raise InputError(f"{name}_scales is missing, or no U8: without it {blocks.name} means nothing.")
        if len(blocks.shape) != 4 or blocks.shape[-1] * 2 != _PER_MX_SCALE or scale.shape != blocks.shape[:-1]:
            raise InputError(
                f"{blocks.name} {list(blocks.shape)} and {scale.name} {list(scale.shape)} are not experts of 32 "
                "values to a scale.",
                "The file is damaged, or in a form that is not known.",
            )
        experts, outputs, groups, _ = blocks.shape
        shape = (experts, groups * _PER_MX_SCALE, outputs)
        label = f"mxfp4, group {_PER_MX_SCALE}"
        return FloatWeight(name, shape, label, blocks, scale, (1, _PER_MX_SCALE), packed=True, by_expert=True)

    def _declared(self) -> tuple[int, int]:
        """Rows and columns of a block as the configuration has them."""
        sizes = [self._section.get("weight_block_size")]
        for group in (self._section.get("config_groups") or {}).values():
            sizes.append((group.get("weights") or {}).get("block_structure"))
        for size in sizes:
            if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
                return size[0], size[1]
        return _BLOCK

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Values of rows ``start`` to ``stop`` of a weight, float32. Raises InputError for scales of NaN."""
        weight = self.weights[name]
        if weight.by_expert:
            return self._expert_rows(weight, start, stop)
        codes = self.checkpoint.read_rows(weight.codes, start, stop)
        values = _unpacked(codes) if weight.packed else codes.float()
        return values if weight.scale is None else values.mul_(self._scales(weight, weight.scale, start, stop))

    def _scales(self, weight: FloatWeight, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Scales of rows, one for each value or in a shape that spreads over them."""
        import torch

        dims = len(weight.shape)
        if info.numel == 1:
            return self._finite(weight, info, 0, info.rows).reshape([1] * dims)
        if dims == 3 or info.rows == weight.shape[0]:
            scale = self._finite(weight, info, start, stop)
            scale = scale.reshape(stop - start, *info.shape[1:], *[1] * (dims - len(info.shape)))
        else:
            first = start // weight.block[0]
            scale = self._finite(weight, info, first, -(-stop // weight.block[0]))
            scale = scale[torch.arange(start, stop) // weight.block[0] - first]
        for axis, size in ((-2, weight.block[0]), (-1, weight.block[1])):
            wanted = weight.shape[axis]
            if (axis == -1 or dims == 3) and scale.shape[axis] not in (1, wanted):
                scale = scale.repeat_interleave(size, axis).narrow(axis, 0, wanted)
        return scale

    def _finite(self, weight: FloatWeight, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows of the scales, float32, as values are multiplied by them."""
        import torch

        stored = self.checkpoint.read_rows(info, start, stop)
        scale = _powers(stored) if info.dtype in ("U8", "F8_E8M0") else stored.float()
        if info.name.endswith(_LARGEST):
            scale = scale / 127
        for over_all in weight.others:
            if over_all.name.endswith(_OVER_ALL):
                factor = self.checkpoint.read_rows(over_all, 0, over_all.rows).float().reshape(-1)[0]
                scale = scale / factor if over_all.name.endswith(_OVER_ALL[0]) else scale * factor
        if not bool(torch.isfinite(scale).all()):
            raise InputError(f"The scales of {weight.name} are not finite: the model is damaged.")
        return scale

    def _expert_rows(self, weight: FloatWeight, start: int, stop: int) -> Tensor:
        import torch

        values, scale = torch.empty(stop - start, *weight.shape[1:]), weight.scale
        assert scale is not None
        for expert in range(start, stop):
            blocks = self.checkpoint.read_rows(weight.codes, expert, expert + 1)[0]
            scales = self._finite(weight, scale, expert, expert + 1)[0]
            for first in range(0, len(blocks), _CHUNK):
                part = _unpacked(blocks[first : first + _CHUNK]).mul_(scales[first : first + _CHUNK].unsqueeze(-1))
                values[expert - start, :, first : first + _CHUNK] = part.reshape(len(part), -1).T
        return values


def _unpacked(codes: Tensor) -> Tensor:
    """Two values of every byte, the low half first: float32, twice as many in the last dimension."""
    import torch

    table = torch.tensor(_E2M1)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), 1)
    return pairs[codes.contiguous().view(torch.uint8).int()].flatten(-2)


def _powers(stored: Tensor) -> Tensor:
    """E8M0 as float32: 2 to the power of the byte less 127; 255 is no number."""
    import torch

    exponents = stored.contiguous().view(torch.uint8).int()
    # The smallest power has no leading bit in float32.
    return torch.where(exponents == 0, 1 << 22, exponents << 23).view(torch.float32)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], declared: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where scales do not fit the weight."""
    if prod(scales) == 1:
        return (shape[-2] if len(shape) > 1 else 1), shape[-1]
    if len(shape) not in (2, 3):
        return None
    rows, columns = shape[-2:]
    if len(shape) == 3:
        if not scales or scales[0] != shape[0]:
            return None
        scales = scales[1:] or (1, 1)
    if len(scales) == 1:
        scales = (*scales, 1)
    if len(scales) != 2 or 0 in scales:
        return None
    for height, width in (declared, _BLOCK):
        if 1 not in scales and scales == (-(-rows // height), -(-columns // width)):
            return height, width
    if rows % scales[0] == 0 and columns % scales[1] == 0:
        return rows // scales[0], columns // scales[1]
    fits = scales == (-(-rows // declared[0]), -(-columns // declared[1]))
    return declared if fits else None


def _shared(shape: tuple[int, ...], block: tuple[int, int]) -> str:
    """How many values share a scale, in words."""
    if block[-1] == shape[-1] and len(shape) > 1:
        return {1: "channel", shape[-2]: "tensor"}.get(block[0], f"block {block[0]} x {block[1]}")
    return f"group {block[1]}" if block[0] == 1 else f"block {block[0]} x {block[1]}"


def _of_inputs(name: str) -> bool:
    return bool(_OF_INPUTS.search(name) or _OF_CACHE.search(name))


def _is_plain(info: TensorInfo) -> bool:
    """Whether a tensor may be one of the model itself, though it is called like a part of a weight."""
    return info.is_float and not info.name.endswith(("weight_scale", "weight_scale_inv", "weight_global_scale"))


def _is_cast(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether what there is of eight bits is a plain cast: none of its modules has anything else that is a scale."""
    places = {name: name.rpartition(".") for name in infos}
    of_eight_bits = Counter(places[name][0] for name, info in infos.items() if info.dtype in _FP8)
    return not any(
        "scale" in leaf and of_eight_bits[module] > (infos[name].dtype in _FP8)
        for name, (module, _, leaf) in places.items()
    )


def holds_floats(infos: Iterable[TensorInfo]) -> bool:
    """Whether weights are scaled floating-point numbers of eight bits or four."""
    found = {info.name: info.dtype for info in infos}
    return any(
        dtype in _FP8 or (dtype == "U8" and name.endswith(("_blocks", "weight_packed")))
        or (dtype in _BYTES and f"{name}_scale_inv" in found) or name.rpartition(".")[2] == _LARGEST
        for name, dtype in found.items()
    )  # fmt: skip
