"""Quantized checkpoints as inputs: every coded weight with its scheme, as codes and scales, or as plain values.

What the format modules can write they can read: shapes and schemes come from headers and the
``quantization_config``, codes through the same decoding that verifies what was written.
"""

from __future__ import annotations

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli import plugins
from quantcli.checkpoints.folder import Checkpoint
from quantcli.errors import InputError
from quantcli.plugins import CodedFormat
from quantcli.roles import module_of, quantization_of
from quantcli.scheme import FLOAT_DTYPES, QuantizedTensor, Scheme, TensorInfo, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

READ = ("compressed-tensors", "gptq", "awq", "bitsandbytes")

#: Of a manifest, what tells of its artifact's making.
_ORIGIN = ("quantcli", "input_sha256", "scheme", "algorithm")

#: Decoded weights kept at a time: neighbouring slabs, and workers, ask for the same ones.
_KEPT = 2
#: Bytes of a code meanwhile: as it is unpacked, turned, and in the tensors that are kept.
_HELD = 4

#: What config.json tells of codes, now and formerly.
_SECTIONS = ("quantization_config", "compression_config")

#: Tensors of a layer that no longer mean anything without its codes.
_OF_INPUTS = ("input_scale", "input_zero_point")

#: Parts of a coded weight, which mean nothing by themselves.
_PART = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|SCB|weight_(packed|shape|zero_point)|weight\.(\w*absmax|\w*quant_map|quant_state\..+))$"
)

#: Where transformers has layers that store ``[inputs, outputs]``; bitsandbytes quantizes them turned.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_LEAF = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")


@dataclass(frozen=True)
class CodedWeight:
    """A weight that is stored as codes: ``shape`` is that of the matrix ``[outputs, inputs]`` that was quantized.

    ``parts`` are the tensors that stand for it; ``transposed``: the model itself stores ``[inputs, outputs]``.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    parts: tuple[TensorInfo, ...]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all that stands for it."""
        return sum(part.nbytes for part in self.parts)


class CodedCheckpoint:
    """The coded weights of a quantized checkpoint. Use `open_coded`."""

    def __init__(self, checkpoint: Checkpoint, form: CodedFormat) -> None:
        self.checkpoint, self.form = checkpoint, form
        self._infos = {info.name: info for info in checkpoint.infos()}
        section = section_of(checkpoint.config)
        model_type = (checkpoint.config or {}).get("model_type")
        self.weights: dict[str, CodedWeight] = {}
        for name, (shape, scheme) in form.find(self._infos, section, self._load).items():
            parts = self._parts(name, shape, scheme)
            turned = model_type in _CONV1D_MODELS and bool(_CONV1D_LEAF.search(module_of(name)))
            self.weights[name] = CodedWeight(name, shape, scheme, parts, turned and form.carries("conv1d") is None)
        if not self.weights:
            raise InputError(
                f"{checkpoint.path} is declared as {form.NAME}, but holds no weight of a kind that is read."
            )
        for info in self.rest:
            if _PART.search(info.name) or (info.name.endswith("weight") and not info.is_float):
                raise InputError(
                    f"{info.name} belongs to no weight that is whole.",
                    "The file is damaged, or in a form that is not known.",
                )

    @property
    def rest(self) -> tuple[TensorInfo, ...]:
        """Tensors that belong to no coded weight, in file order."""
        taken = {part.name for weight in self.weights.values() for part in weight.parts}
        return tuple(info for info in self._infos.values() if info.name not in taken)

    @property
    def scheme(self) -> str:
        """What the model was quantized to: as its manifest says, else the dtype of most weights."""
        counts = Counter(weight.scheme.weights.dtype for weight in self.weights.values())
        return str((self.checkpoint.manifest or {}).get("scheme") or counts.most_common(1)[0][0])

    def algorithm(self, name: str) -> str | None:
        """What chose the codes of a weight, where the manifest tells."""
        entry: dict[str, Any] = (self.checkpoint.manifest or {}).get("layers", {}).get(name, {})
        return entry.get("algorithm")

    def tensor(self, name: str) -> QuantizedTensor:
        """Codes, scales and zero points of one weight.

        Raises:
            InputError: what is stored contradicts itself.
        """
        weight = self.weights[name]
        scale, zero_point = self.scales(name)
        stored = self._load(self.form.codes_name(name, weight.scheme))
        codes = self.form.decode_codes(stored, weight.shape[1], weight.scheme)
        return QuantizedTensor(codes, scale, zero_point, weight.shape, weight.scheme.weights)

    def scales(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Scales (float32) and zero points of one weight, without its codes. Raises InputError for scales of NaN."""
        import torch

        weight = self.weights[name]
        scale, zero_point = self.form.decode_scales(name, weight.shape, weight.scheme, self._load)
        if not bool(torch.isfinite(scale).all()):
            raise InputError(f"The scales of {name} are not finite: the model is damaged.")
        return scale, zero_point

    def scale_dtype(self, name: str) -> str:
        """The dtype that a weight's scales are stored in, by safetensors' name."""
        named = {info.name: info.dtype for info in self.weights[name].parts}
        return next((named[part] for part in named if part.endswith(("_scale", ".scales")) or part == "scales"), "F32")

    def _load(self, name: str) -> Tensor:
        info = self._infos[name]
        return self.checkpoint.read_rows(info, 0, info.rows)

    def _parts(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[TensorInfo, ...]:
        """Every tensor of a weight. Raises InputError where one is missing or has another shape than it should."""
        size = scheme.weights.granularity.size
        if scheme.weights.granularity.kind == "group" and size and shape[1] % size:
            raise InputError(f"{name} has {shape[1]} columns, and scales for groups of {size}: the file is damaged.")
        parts = []
        for part, spec in self.form.layout(name, shape, scheme, "F32").items():
            info = self._infos.get(part)
            if info is None and part.endswith("g_idx"):
                continue  # older files leave it out where it would only count
            if info is None or not _fits(info, spec):
                found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
                kind = "" if spec.dtype in FLOAT_DTYPES else f"{spec.dtype} "
                raise InputError(
                    f"{part} {found}, and {name} {list(shape)} as {scheme} needs {kind}{list(spec.shape)}.",
                    "The file is damaged, or in a form that is not known.",
                )
            parts.append(info)
        stem = name.removesuffix("weight")
        extra = [self._infos[stem + each] for each in _OF_INPUTS if stem + each in self._infos]
        return tuple(parts + [info for info in extra if info not in parts])


def _fits(info: TensorInfo, spec: TensorSpec) -> bool:
    """Whether a tensor is what its format says; scales may be of any floating-point dtype."""
    if info.dtype != spec.dtype and not (info.is_float and spec.dtype in FLOAT_DTYPES):
        return False
    # A description in JSON is as long as it happens to be; a scale for all may be a scalar.
    if ".quant_state." in info.name:
        return True
    return info.shape == spec.shape or (info.numel == prod(spec.shape) == 1)


def section_of(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The ``quantization_config`` of a config.json; empty where there is none."""
    found = [section for key in _SECTIONS if isinstance(section := (config or {}).get(key), Mapping)]
    return found[0] if found else {}


def open_coded(checkpoint: Checkpoint) -> CodedCheckpoint:
    """List the coded weights of a quantized checkpoint.

    Raises:
        InputError: it is quantized in a way that is not read, or what it holds contradicts itself.
    """
    method = quantization_of(checkpoint.infos(), checkpoint.config) or "nothing"
    if method == "gptq or awq":
        infos = {info.name: info for info in checkpoint.infos()}
        stem = next(name.removesuffix("qweight") for name in infos if name.endswith("qweight"))
        packed, scales = infos[f"{stem}qweight"], infos.get(f"{stem}scales")
        method = "gptq" if scales and scales.shape[-1:] == packed.shape[-1:] else "awq"
    if method not in READ:
        raise InputError(
            f"The model is quantized as {method}, which quantcli does not read.",
            f"Read are {', '.join(READ)}; or start from the original weights.",
        )
    return CodedCheckpoint(checkpoint, plugins.coded_format(method))


class DecodedCheckpoint(Checkpoint):
    """A quantized checkpoint seen as an ordinary one: coded weights are float32, the rest as it is.

    At most a few weights are held as codes at a time; values are made of them as rows are asked for.
    """

    def __init__(self, coded: CodedCheckpoint) -> None:
        original = coded.checkpoint
        self.original = original
        self._coded = coded
        self._kept: OrderedDict[str, QuantizedTensor] = OrderedDict()
        self._deciding = threading.Lock()
        self._loading: dict[str, threading.Lock] = {name: threading.Lock() for name in coded.weights}
        infos = tuple(_in_order(coded))
        super().__init__(
            original.path, infos, folder=original.folder, metadata=original.metadata, warnings=original.warnings
        )
        if self.config is not None:
            self.config = {key: value for key, value in self.config.items() if key not in _SECTIONS}

    @property
    def held_bytes(self) -> int:
        """Memory for the largest weight while it is decoded: its codes as stored, unpacked, turned and kept."""
        return max(_HELD * prod(weight.shape) + weight.nbytes for weight in self._coded.weights.values())

    def origin(self) -> dict[str, Any]:
        """What is known of where the codes come from, for the manifest of what is made of them."""
        known = self.manifest or {}
        made = {key: known[key] for key in _ORIGIN if key in known}
        return {"format": self._coded.form.NAME} | made

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights, sorted."""
        return self.original.files

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor; float32 where they are decoded."""
        weight = self._coded.weights.get(info.name)
        if weight is None:
            return self.original.read_rows(info, start, stop)
        from quantcli import numerics

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
            tensor = tensor or self._coded.tensor(name)
            with self._deciding:
                self._kept[name] = tensor
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return tensor


def _blocks(tensor: QuantizedTensor, start: int, stop: int) -> Tensor:
    """Rows of a weight whose scales are per block of the flattened tensor; the last block may be short."""
    from torch.nn.functional import pad

    from quantcli import numerics

    columns, size = tensor.shape[1], tensor.number_format.granularity.size or 1
    first, last = start * columns // size, -(-stop * columns // size)
    codes = tensor.codes.reshape(-1)[first * size : last * size]
    codes = pad(codes, (0, (last - first) * size - len(codes))).reshape(-1, size)
    values = numerics.dequantize(codes, tensor.scale[first:last], None, tensor.number_format).reshape(-1)
    return values[start * columns - first * size : stop * columns - first * size].reshape(-1, columns)


def _in_order(coded: CodedCheckpoint) -> list[TensorInfo]:
    """Tensors as the model itself has them, a weight where its codes lie."""
    rest = {info.name for info in coded.rest}
    by_codes = {coded.form.codes_name(name, weight.scheme): weight for name, weight in coded.weights.items()}
    infos = []
    for info in coded.checkpoint.infos():
        if info.name in by_codes:
            weight = by_codes[info.name]
            shape = weight.shape[::-1] if weight.transposed else weight.shape
            infos.append(TensorInfo(weight.name, shape, "F32", prod(shape) * 4, info.file))
        elif info.name in rest:
            infos.append(info)
    return infos
