"""Quantized checkpoints as inputs: every quantized weight with its scheme, as codes and scales, or as plain values.

What the format modules can write they can read: shapes and schemes come from headers and the
``quantization_config``, codes through the same decoding that verifies what was written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config_file import section_of
from quantcli.checkpoint.floats import FloatCheckpoint, holds_floats
from quantcli.checkpoint.roles import module_of, quantization_of
from quantcli.core.dtypes import FLOAT_DTYPES
from quantcli.core.scheme import Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo, TensorSpec
from quantcli.errors import InputError
from quantcli.formats.base import QuantizedFormat
from quantcli.formats.compressed_tensors import refuse_unread
from quantcli.system.files import about

if TYPE_CHECKING:
    from torch import Tensor

READ = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "gguf")
#: Kinds of scaled floating-point weights, by the names that their configurations have.
FLOATS = ("fp8", "fbgemm_fp8", "mxfp4", "modelopt")
#: Kinds that may be such, or others.
_MAYBE_FLOATS = ("compressed-tensors", "bitsandbytes")

#: What the second version of gptq's format is called, which gptqmodel computes with.
_GPTQ_V2 = "gptq_v2"

#: Tensors of a layer that no longer mean anything without its codes.
_OF_INPUTS = ("input_scale", "input_zero_point")

#: Parts of a quantized weight, which mean nothing by themselves.
_PART = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|SCB|weight_(packed|shape|zero_point)|weight\.(\w*absmax|\w*quant_map|quant_state\..+))$"
)

#: Where transformers has layers that store ``[inputs, outputs]``; these kinds of codes are of the turned weight.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D_LEAF = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
_TURNING = ("bitsandbytes", "gptq", "awq")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored as codes: ``shape`` is that of the matrix ``[outputs, inputs]`` that was quantized.

    ``parts`` are the tensors that stand for it; ``transposed``: the model itself stores ``[inputs, outputs]``.
    ``order`` holds the group of each column where groups are not columns side by side (``desc_act``, ``actorder``).
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    parts: tuple[TensorInfo, ...]
    transposed: bool = False
    order: TensorInfo | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that stands for it."""
        return sum(part.nbytes for part in self.parts)


class QuantizedCheckpoint:
    """The quantized weights of a quantized checkpoint. Use `open_quantized`."""

    def __init__(self, checkpoint: Checkpoint, form: QuantizedFormat) -> None:
        self.checkpoint, self.form = checkpoint, form
        self._infos = {info.name: info for info in checkpoint.infos()}
        section = section_of(checkpoint.config) or _section_of_manifest(checkpoint)
        versions = (section.get("checkpoint_format"), section.get("format"))
        self._plain_zeros = form.NAME == "gptq" and _GPTQ_V2 in versions
        if self._plain_zeros:
            section = {key: value for key, value in section.items() if key not in ("checkpoint_format", "format")}
        groups = self._group_indices()
        hidden = {index.name for index, _ in groups.values()}
        plain = {name: info for name, info in self._infos.items() if name not in hidden}
        turned_parts = _turned_parts(checkpoint.config, plain) if form.NAME in _TURNING else ()
        self.weights: dict[str, QuantizedWeight] = {}
        for name, (shape, found) in form.find(plain, section, self._load).items():
            scheme = self._of_version_2(name, shape, found) if self._plain_zeros else found
            parts = self._parts(name, shape, scheme)
            index, in_order = groups.get(name.removesuffix("weight"), (None, True))
            if index is not None:
                parts = (*(part for part in parts if part != index), index)
                self._check_groups(name, index, shape, scheme, filled=not in_order)
            turned = name.startswith(turned_parts) and bool(_CONV1D_LEAF.search(module_of(name)))
            self.weights[name] = QuantizedWeight(name, shape, scheme, parts, turned, None if in_order else index)
        if not self.weights and not form.STORAGE.starts_anew:
            raise InputError(
                f"{checkpoint.path} is declared as {form.NAME}, but holds no weight of a kind that is read."
            )
        for info in self.rest:
            if _PART.search(info.name) or (info.name.endswith("weight") and not info.is_float):
                raise InputError(
                    f"{info.name} belongs to no weight that is whole.",
                    "The file is damaged, or in a form that is not known.",
                )

    def _group_indices(self) -> dict[str, tuple[TensorInfo, bool]]:
        """The groups of columns where they have an order of their own, by module; and whether they have it after all.

        gptq lists groups for every weight, and those in order are checked by the format itself.
        """
        import torch

        found = {}
        for name, info in self._infos.items():
            stem, mark, _ = name.rpartition("g_idx")
            if not mark or len(info.shape) != 1 or info.dtype not in ("I32", "I64"):
                continue
            indices = self._load(name)
            if stem.endswith("weight_"):
                # -1 stands for an index that was never filled.
                found[stem.removesuffix("weight_")] = info, bool((indices < 0).any())
            elif self.form.NAME == "gptq" and f"{stem}scales" in self._infos:
                size = max(1, info.rows // max(1, self._infos[f"{stem}scales"].rows))
                if not bool((indices == torch.arange(info.rows) // size).all()):
                    found[stem] = info, False
        return found

    def _check_groups(
        self, name: str, index: TensorInfo, shape: tuple[int, int], scheme: Scheme, *, filled: bool
    ) -> None:
        groups, indices = shape[1] // (scheme.weights.granularity.size or shape[1]), self._load(index.name)
        outside = bool((indices >= groups).any()) or (filled and bool((indices < 0).any()))
        if index.shape != (shape[1],) or outside:
            raise InputError(
                f"{index.name} {list(index.shape)} does not give each of {shape[1]} columns of {name} one of {groups} "
                "groups: the file is damaged."
            )

    def _of_version_2(self, name: str, shape: tuple[int, int], found: Scheme) -> Scheme:
        """The scheme of a weight of gptq's version 2, which was read as version 1: zero points are one less."""
        asymmetric = replace(found, weights=replace(found.weights, symmetric=False))
        _, zero_point = self.form.decode_scales(name, shape, asymmetric, self._load)
        symmetric = zero_point is not None and bool((zero_point == 1).all())
        return replace(found, weights=replace(found.weights, symmetric=symmetric))

    @property
    def is_read_only(self) -> bool:
        """Whether its values can be quantized to any scheme: its form is not written here, or often is the only one."""
        if self.form.STORAGE.starts_anew:
            return True
        return self._plain_zeros or any(weight.order for weight in self.weights.values())

    @property
    def rest(self) -> tuple[TensorInfo, ...]:
        """Tensors that belong to no quantized weight, in file order."""
        taken = {part.name for weight in self.weights.values() for part in weight.parts}
        return tuple(info for info in self._infos.values() if info.name not in taken)

    @property
    def scheme(self) -> str:
        """What the model was quantized to: as its manifest says, else the dtype of most weights."""
        counts = Counter(weight.scheme.weights.dtype for weight in self.weights.values())
        most = counts.most_common(1)
        return self.checkpoint.manifest.scheme or (most[0][0] if most else self.form.NAME)

    def algorithm(self, name: str) -> str | None:
        """What chose the codes of a weight, where the manifest tells."""
        layer = self.checkpoint.manifest.layers.get(name)
        return layer.algorithm if layer else None

    def tensor(self, name: str) -> QuantizedTensor:
        """Codes, scales and zero points of one weight.

        Raises:
            InputError: what is stored contradicts itself.
        """
        weight = self.weights[name]
        scale, zero_point = self.scales(name)
        stored = self._load(self.form.codes_name(name, weight.scheme))
        with about(self.checkpoint.path):
            codes = self.form.decode_codes(stored, weight.shape[1], weight.scheme)
        return QuantizedTensor(codes, scale, zero_point, weight.shape, weight.scheme.weights)

    def scales(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Scales (float32) and zero points of one weight, without its codes. Raises InputError for scales of NaN."""
        import torch

        weight = self.weights[name]
        scheme = weight.scheme
        if self._plain_zeros:
            scheme = replace(scheme, weights=replace(scheme.weights, symmetric=False))
        with about(self.checkpoint.path):
            scale, zero_point = self.form.decode_scales(name, weight.shape, scheme, self._load)
        if self._plain_zeros and zero_point is not None:
            zero_point = None if weight.scheme.weights.symmetric else zero_point - 1
        if not bool(torch.isfinite(scale).all()):
            raise InputError(f"The scales of {name} in {self.checkpoint.path} are not finite: the model is damaged.")
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
                fault = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
                kind = "" if spec.dtype in FLOAT_DTYPES else f"{spec.dtype} "
                raise InputError(
                    f"{part} {fault}, and {name} {list(shape)} as {scheme} needs {kind}{list(spec.shape)}.",
                    "The file is damaged, or in a form that is not known.",
                )
            parts.append(info)
        stem = name.removesuffix("weight")
        extra = [self._infos[stem + leaf] for leaf in _OF_INPUTS if stem + leaf in self._infos]
        return tuple(parts + [info for info in extra if info not in parts])


def _fits(info: TensorInfo, spec: TensorSpec) -> bool:
    """Whether a tensor is what its format says; scales may be of any floating-point dtype."""
    if info.dtype != spec.dtype and not (info.is_float and spec.dtype in FLOAT_DTYPES):
        return False
    # A description in JSON is as long as it happens to be; a scale for all may be a scalar.
    if ".quant_state." in info.name:
        return True
    return info.shape == spec.shape or (info.numel == prod(spec.shape) == 1)


def _turned_parts(config: Mapping[str, Any] | None, names: Iterable[str]) -> tuple[str, ...]:
    """What names begin with in models, or parts of models, whose layers may store ``[inputs, outputs]``.

    A part is named as its configuration is (``decoder`` of a model that captions pictures), or anywhere.
    """
    config, names = config or {}, list(names)
    if config.get("model_type") in _CONV1D_MODELS:
        return ("",)
    parts = [
        f"{key.removesuffix('_config')}."
        for key, part in config.items()
        if isinstance(part, Mapping) and part.get("model_type") in _CONV1D_MODELS
    ]
    return tuple(part if any(name.startswith(part) for name in names) else "" for part in parts)


def _section_of_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the inputs of layers are quantized, of a bare file, which has no configuration: as its manifest tells."""
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in checkpoint.manifest.layers.items():
        inputs = (layer.scheme or "").partition(" | inputs ")[2]
        settings = {"strategy": "token" if "token" in inputs else "tensor", "dynamic": "dynamic" in inputs}
        group = groups.setdefault(inputs, {"targets": [], "input_activations": settings if inputs else None})
        group["targets"] += [module_of(name)] if layer.scheme else []
    return {"config_groups": groups} if groups else {}


def open_quantized(checkpoint: Checkpoint, *, as_values: bool = False) -> QuantizedCheckpoint:
    """List the quantized weights of a quantized checkpoint whose codes are integers, or nf4.

    With ``as_values`` their codes need not be such as another container could hold.

    Raises:
        InputError: it is quantized in a way that is not read, or what it holds contradicts itself.
    """
    method = _method_of(checkpoint)
    if method not in READ:
        if method in FLOATS:
            raise InputError(
                f"{checkpoint.path} is quantized as {method[:80]}, and no other container holds its weights as they "
                "are.",
                "Give a --scheme to quantize their values anew.",
            )
        raise InputError(
            f"{checkpoint.path} is quantized as {method[:80]}, which quantcli does not read.",
            f"Read are {', '.join((*READ, *FLOATS))}; or start from the original weights.",
        )
    with about(checkpoint.path):
        quantized = QuantizedCheckpoint(checkpoint, formats.quantized_format(method))
    ordered = [weight for weight in quantized.weights.values() if weight.order]
    if ordered and not as_values:
        raise InputError(
            f"The groups of {ordered[0].name} follow the order of activations (desc_act, actorder), and no other "
            "container holds them so.",
            "Give a --scheme to quantize its values anew.",
        )
    return quantized


def open_values(checkpoint: Checkpoint) -> QuantizedCheckpoint | FloatCheckpoint:
    """List the quantized weights of a quantized checkpoint of any kind that is read, for their values.

    Raises:
        InputError: it is quantized in a way that is not read, or what it holds contradicts itself.
    """
    return open_floats_of(checkpoint) or open_quantized(checkpoint, as_values=True)


def open_floats_of(checkpoint: Checkpoint) -> FloatCheckpoint | None:
    """The scaled floating-point weights of a quantized checkpoint; None where it is of another kind.

    Raises:
        InputError: they are scaled in a way that is not read, or what is there contradicts itself.
    """
    method = _method_of(checkpoint)
    if method not in FLOATS and not (method in _MAYBE_FLOATS and holds_floats(checkpoint.infos())):
        return None
    with about(checkpoint.path):
        if method == "compressed-tensors":
            refuse_unread(section_of(checkpoint.config))
        return FloatCheckpoint(checkpoint, method, section_of(checkpoint.config))


def _method_of(checkpoint: Checkpoint) -> str:
    method = quantization_of(checkpoint.infos(), checkpoint.config) or "nothing"
    if method != "gptq or awq":
        return method
    infos = {info.name: info for info in checkpoint.infos()}
    stem = next(name.removesuffix("qweight") for name in infos if name.endswith("qweight"))
    packed, scales = infos[f"{stem}qweight"], infos.get(f"{stem}scales")
    return "gptq" if scales and scales.shape[-1:] == packed.shape[-1:] else "awq"


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds quantized weights."""
    return quantization_of(checkpoint.infos(), checkpoint.config) is not None
