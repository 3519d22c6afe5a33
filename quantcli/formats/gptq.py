"""GPTQ as its authors' tools and gptqmodel store it, version 1 (checked against gptqmodel 7.7).

The layout of AutoGPTQ, named after the algorithm (arXiv:2210.17323) but open to any: codes are packed along the
inputs, so that a weight ``[O, I]`` becomes ``qweight`` ``[I / (32 / bits), O]``. Zero points are stored less one;
zero itself therefore has no form, and readers of version 2, which stores them plain, misread the file without an
error. torch is imported only where bits are laid out: planning does without.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo, TensorSpec
from quantcli.errors import InputError
from quantcli.formats.base import Storage
from quantcli.formats.module_patterns import module_patterns

if TYPE_CHECKING:
    from torch import Tensor

NAME = "gptq"
STORAGE = Storage(scale_dtype="F16", by_rows=False, lowest_zero_point=False)

ROLES = {
    "embedding": "gptq carries only linear layers",
    "conv": "gptq carries only linear layers",
    "conv1d": "gptq does not match transposed Conv1D layers; nf4 does",
    "experts": "gptq cannot carry fused 3-D expert weights",
    "head": "runtimes look for gptq only inside the blocks of a model",
}

#: Where runtimes look for the blocks of a model when its configuration does not say (optimum 2.3).
_KNOWN_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "h",
    "decoder.layers",
    "layers",
)


def supports(scheme: Scheme) -> str | None:
    """Why the scheme cannot be written, or None when it can."""
    weights = scheme.weights
    if weights.dtype not in ("int4", "int8"):
        return f"{NAME} carries int4 and int8 weights, not {weights.dtype}"
    if weights.granularity.kind not in ("channel", "group"):
        return f"{NAME} carries scales per channel or group, not per {weights.granularity.kind}"
    if weights.dynamic or weights.double_quantized:
        return f"{NAME} stores the scales of weights as they are; not {weights}"
    if scheme.inputs is not None:
        return f"{NAME} keeps inputs as they are"
    return None


def carries(role: str) -> str | None:
    """Why layers of this role stay as they are, or None when they are quantized."""
    return ROLES.get(role)


def fits(shape: tuple[int, ...], scheme: Scheme) -> str | None:
    """Why a matrix ``[O, I]`` cannot be laid out, or None: both sides are packed into whole words."""
    per_word = _per_word(scheme)
    if any(side % per_word for side in shape):
        return f"{NAME} packs {per_word} values into a word, and {shape[0]} x {shape[1]} does not divide"
    return None


def together(schemes: Iterable[Scheme]) -> str | None:
    """None: exceptions to the most common scheme are listed by name."""
    return None


def _per_word(scheme: Scheme) -> int:
    return 32 // scheme.weights.bits


def _stem(weight: str) -> str:
    """Name of the module, with the dot: its tensors do not extend the weight's own name."""
    return weight.removesuffix("weight")


def codes_name(weight: str, scheme: Scheme) -> str:
    """Name of the tensor that holds the codes of ``weight``."""
    return f"{_stem(weight)}qweight"


def _group_size(shape: tuple[int, ...], scheme: Scheme) -> int:
    return scheme.weights.granularity.size or shape[1]


def layout(weight: str, shape: tuple[int, ...], scheme: Scheme, scale_dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that stands for ``weight`` ``[O, I]``."""
    outputs, inputs = shape
    groups, per_word, stem = inputs // _group_size(shape, scheme), _per_word(scheme), _stem(weight)
    return {
        f"{stem}qweight": TensorSpec("I32", (inputs // per_word, outputs)),
        f"{stem}qzeros": TensorSpec("I32", (groups, outputs // per_word)),
        f"{stem}scales": TensorSpec(scale_dtype, (groups, outputs)),
        f"{stem}g_idx": TensorSpec("I32", (inputs,)),
    }


def codes_offset(row: int, columns: int, scheme: Scheme) -> int:
    """Bytes of the stored codes of so many whole rows; rows themselves do not lie together."""
    return row * columns * scheme.weights.bits // 8


def _pack(codes: Tensor, scheme: Scheme) -> Tensor:
    from quantcli.core import packing

    return packing.pack_int4_low_nibble_first(codes) if scheme.weights.bits == 4 else packing.pack_int8_in_int32(codes)


def _unpack(packed: Tensor, columns: int, scheme: Scheme) -> Tensor:
    from quantcli.core import packing

    if scheme.weights.bits == 4:
        return packing.unpack_int4_low_nibble_first(packed, columns)
    return packing.unpack_int8_from_int32(packed, columns)


def encode_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Stored form of a weight's codes, int8 ``[O, I]``: words of consecutive inputs, ``[I / (32 / bits), O]``."""
    return _pack(codes, scheme).T.contiguous()


def decode_codes(stored: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Inverse of `encode_codes`: int8 ``[O, I]``."""
    return _unpack(stored.T.contiguous(), columns, scheme)


def encode_scales(weight: str, tensor: QuantizedTensor, scheme: Scheme, scale_dtype: str) -> dict[str, Tensor]:
    """Every other tensor of the layer; ``tensor.codes`` is not looked at.

    Raises:
        ValueError: a zero point is the lowest code.
    """
    import torch

    from quantcli.core.dtypes import torch_dtype
    from quantcli.core.numerics import code_range

    lowest, _ = code_range(scheme.weights)
    zero_point = torch.zeros_like(tensor.scale, dtype=torch.int8) if tensor.zero_point is None else tensor.zero_point
    if bool((zero_point == lowest).any()):
        raise ValueError(f"{weight} has a zero point of 0 (unsigned), which {NAME} version 1 cannot store")
    stem, size = _stem(weight), _group_size(tensor.shape, scheme)
    return {
        f"{stem}qzeros": _pack((zero_point - 1).T.contiguous(), scheme),
        f"{stem}scales": tensor.scale.T.contiguous().to(torch_dtype(scale_dtype)),
        f"{stem}g_idx": torch.arange(tensor.shape[1], dtype=torch.int32) // size,
    }


def decode_scales(
    weight: str, shape: tuple[int, ...], scheme: Scheme, load: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point of a layer, as `QuantizedTensor` holds them."""
    stem = _stem(weight)
    scale = load(f"{stem}scales").float().T.contiguous()
    if scheme.weights.symmetric:
        return scale, None
    return scale, (_unpack(load(f"{stem}qzeros"), shape[0], scheme) + 1).T.contiguous()


def find(
    infos: Mapping[str, TensorInfo], section: Mapping[str, Any], load: Callable[[str], Tensor]
) -> dict[str, tuple[tuple[int, int], Scheme]]:
    """Shape ``[O, I]`` and scheme of every quantized weight, by its name; ``section`` is the ``quantization_config``.

    Shapes tell bits and groups. Weights whose zero points are all in the middle are symmetric.

    Raises:
        InputError: version 2, groups that follow the activations' order, or other bits than 4 and 8.
    """
    version = section.get("checkpoint_format") or section.get("format") or NAME
    if version != NAME:
        raise InputError(f"The model's gptq weights are in the form {version!r}.", "Only version 1 ('gptq') is read.")
    found = {}
    for name in [name for name in infos if name.endswith(".qweight") or name == "qweight"]:
        stem = name.removesuffix("qweight")
        packed, zeros, scales = (infos.get(f"{stem}{part}") for part in ("qweight", "qzeros", "scales"))
        parts = [part for part in (packed, zeros, scales) if part is not None and len(part.shape) == 2]
        if packed is None or zeros is None or scales is None or len(parts) < 3:
            raise InputError(f"{name} lacks its qzeros or scales, or they are no matrices: the file is damaged.")
        groups, outputs = scales.shape
        bits = 32 * zeros.columns // max(1, outputs)
        if bits not in (4, 8) or {packed.dtype, zeros.dtype} != {"I32"}:
            raise InputError(f"{name} holds {bits}-bit codes in {packed.dtype}.", "4 and 8 bits in I32 are read.")
        inputs = packed.rows * 32 // bits
        size = max(1, inputs // max(1, groups))
        if f"{stem}g_idx" in infos and not _in_order(load(f"{stem}g_idx"), size):
            raise InputError(
                f"The groups of {stem}weight are not columns side by side (desc_act, or a short last group).",
                "Such weights are not read; quantize the original with desc_act false.",
            )
        is_channel = groups == 1 and section.get("group_size") != size
        granularity = Granularity("channel") if is_channel else Granularity("group", size)
        scheme = Scheme(NumberFormat(f"int{bits}", granularity, symmetric=False))
        if not (_unpack(load(f"{stem}qzeros"), outputs, scheme) + 1).any():
            scheme = Scheme(NumberFormat(f"int{bits}", granularity))
        found[f"{stem}weight"] = ((outputs, inputs), scheme)
    return found


def _in_order(g_idx: Tensor, size: int) -> bool:
    import torch

    return bool((g_idx == torch.arange(len(g_idx)) // size).all())


def _settings(scheme: Scheme) -> dict[str, Any]:
    weights = scheme.weights
    return {"bits": weights.bits, "group_size": weights.granularity.size or -1, "sym": weights.symmetric}


def config(schemes: Mapping[str, Scheme], left: Iterable[str], dtype: str) -> dict[str, Any]:
    """``quantization_config`` of a model: scheme per quantized module, and the modules left out.

    The most common scheme is the model's. What differs is listed twice, for two families of readers: ``dynamic``
    (gptqmodel, vLLM, SGLang) gives the exceptions by regular expression, ``modules_in_block_to_quantize``
    (transformers, through optimum) the layers of a block that are quantized.
    """
    left = list(left)
    base = Counter(schemes.values()).most_common(1)[0][0]
    section = {
        "quant_method": NAME, **_settings(base), "desc_act": False, "true_sequential": True, "lm_head": False,
        "checkpoint_format": NAME,
    }  # fmt: skip
    everything = [*schemes, *left]
    dynamic: dict[str, Any] = {}
    for scheme in dict.fromkeys(schemes.values()):
        if scheme != base:
            names = [name for name, own in schemes.items() if own == scheme]
            dynamic |= {f"+:{pattern}$": _settings(scheme) for pattern in module_patterns(names, everything)}
    dynamic |= {f"-:{pattern}$": {} for pattern in module_patterns(left, everything)}
    blocks = _blocks(schemes)
    if blocks not in _KNOWN_BLOCKS:
        section["block_name_to_quantize"] = blocks
    if any(name.startswith(blocks) for name in left):
        section["modules_in_block_to_quantize"] = [_endings(schemes, left)]
    return section | ({"dynamic": dynamic} if dynamic else {})


def _blocks(names: Iterable[str]) -> str:
    """The list of blocks that all quantized modules are in: what their names share before a number.

    Empty where there is none: to a runtime that means the whole model.
    """
    found = {re.split(r"\.\d+\.", name, maxsplit=1)[0] if re.search(r"\.\d+\.", name) else "" for name in names}
    return found.pop() if len(found) == 1 else ""


def _endings(quantized: Iterable[str], left: Iterable[str]) -> list[str]:
    """Ends of names that mean the quantized modules and none of those left: as short as that allows."""
    left, endings = list(left), dict[str, None]()
    for name in quantized:
        parts = name.split(".")
        candidates = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        number = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
        tail = ".".join(parts[number + 1 :])
        exact = (end for end in [tail, *candidates] if not any(other.endswith(end) for other in left))
        endings[next(exact, name)] = None
    return list(endings)
