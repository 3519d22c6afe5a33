"""AWQ's ``gemm`` layout, as AutoAWQ wrote it and transformers (through gptqmodel), vLLM and SGLang load it.

Named after the algorithm (arXiv:2306.00978) but open to any int4 with groups. A weight ``[O, I]`` becomes ``qweight``
``[I, O / 8]``: eight consecutive outputs in a word, in the order 0 2 4 6 1 3 5 7 in which a GPU unpacks them. Zero
points lie in the same way and are stored as they are, also for symmetric weights (8, the middle). torch is imported
only where bits are laid out: planning does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo, TensorSpec
from quantcli.errors import InputError
from quantcli.formats.base import Storage

if TYPE_CHECKING:
    from torch import Tensor

NAME = "awq"
STORAGE = Storage(scale_dtype="F16", by_rows=False)
_PER_WORD = 8

ROLES = {
    "embedding": "awq carries only linear layers",
    "conv": "awq carries only linear layers",
    "conv1d": "awq does not match transposed Conv1D layers; nf4 does",
    "experts": "awq cannot carry fused 3-D expert weights",
    "head": "runtimes load the output head of an awq model unquantized",
}


def supports(scheme: Scheme) -> str | None:
    """Why the scheme cannot be written, or None when it can."""
    weights = scheme.weights
    if weights.dtype != "int4":
        return f"{NAME} carries int4 weights, not {weights.dtype}"
    if weights.granularity.kind != "group":
        return f"{NAME} carries scales per group, not per {weights.granularity.kind}"
    if weights.dynamic or weights.double_quantized:
        return f"{NAME} stores the scales of weights as they are; not {weights}"
    if scheme.inputs is not None:
        return f"{NAME} keeps inputs as they are"
    return None


def carries(role: str) -> str | None:
    """Why layers of this role stay as they are, or None when they are quantized."""
    return ROLES.get(role)


def fits(shape: tuple[int, ...], scheme: Scheme) -> str | None:
    """Why a matrix ``[O, I]`` cannot be laid out, or None: outputs are packed into whole words."""
    if shape[0] % _PER_WORD:
        return f"{NAME} packs {_PER_WORD} outputs into a word, and {shape[0]} does not divide"
    return None


def together(schemes: Iterable[Scheme]) -> str | None:
    """Why these schemes cannot stand in one model, or None: its configuration knows one group size."""
    sizes = sorted({scheme.weights.granularity.size or 0 for scheme in schemes})
    if len(sizes) > 1:
        return f"{NAME} knows one group size for all layers, not {' and '.join(map(str, sizes))}"
    return None


def _stem(weight: str) -> str:
    """Name of the module, with the dot: its tensors do not extend the weight's own name."""
    return weight.removesuffix("weight")


def codes_name(weight: str, scheme: Scheme) -> str:
    """Name of the tensor that holds the codes of ``weight``."""
    return f"{_stem(weight)}qweight"


def layout(weight: str, shape: tuple[int, ...], scheme: Scheme, scale_dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that stands for ``weight`` ``[O, I]``."""
    outputs, inputs = shape
    groups, stem = inputs // (scheme.weights.granularity.size or inputs), _stem(weight)
    return {
        f"{stem}qweight": TensorSpec("I32", (inputs, outputs // _PER_WORD)),
        f"{stem}qzeros": TensorSpec("I32", (groups, outputs // _PER_WORD)),
        f"{stem}scales": TensorSpec(scale_dtype, (groups, outputs)),
    }


def codes_offset(row: int, columns: int, scheme: Scheme) -> int:
    """Bytes of the stored codes of so many whole rows; rows themselves do not lie together."""
    return row * columns // 2


def encode_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Stored form of a weight's codes, int8 ``[O, I]``: words of consecutive outputs, ``[I, O / 8]``."""
    from quantcli.core import packing

    return packing.pack_int4_even_first(codes.T.contiguous())


def decode_codes(stored: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Inverse of `encode_codes`: int8 ``[O, I]``."""
    from quantcli.core import packing

    return packing.unpack_int4_even_first(stored).T.contiguous()


def encode_scales(weight: str, tensor: QuantizedTensor, scheme: Scheme, scale_dtype: str) -> dict[str, Tensor]:
    """Every other tensor of the layer; ``tensor.codes`` is not looked at."""
    import torch

    from quantcli.core import packing
    from quantcli.core.dtypes import torch_dtype

    zero_point = torch.zeros_like(tensor.scale, dtype=torch.int8) if tensor.zero_point is None else tensor.zero_point
    return {
        f"{_stem(weight)}qzeros": packing.pack_int4_even_first(zero_point.T.contiguous()),
        f"{_stem(weight)}scales": tensor.scale.T.contiguous().to(torch_dtype(scale_dtype)),
    }


def decode_scales(
    weight: str, shape: tuple[int, ...], scheme: Scheme, load: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point of a layer, as `QuantizedTensor` holds them."""
    from quantcli.core import packing

    scale = load(f"{_stem(weight)}scales").float().T.contiguous()
    if scheme.weights.symmetric:
        return scale, None
    return scale, packing.unpack_int4_even_first(load(f"{_stem(weight)}qzeros")).T.contiguous()


def find(
    infos: Mapping[str, TensorInfo], section: Mapping[str, Any], load: Callable[[str], Tensor]
) -> dict[str, tuple[tuple[int, int], Scheme]]:
    """Shape ``[O, I]`` and scheme of every quantized weight, by its name; ``section`` is the ``quantization_config``.

    Shapes tell the groups. Weights whose zero points are all in the middle are symmetric.

    Raises:
        InputError: another layout than ``gemm``, or other bits than 4.
    """
    from quantcli.core import packing

    version = str(section.get("version") or section.get("format") or "gemm").lower()
    if version != "gemm" or section.get("bits", 4) != 4:
        raise InputError(f"The model's awq weights are {section.get('bits', 4)}-bit {version}.", "4-bit gemm is read.")
    found = {}
    for name in [name for name in infos if name.endswith(".qweight") or name == "qweight"]:
        stem = name.removesuffix("qweight")
        zeros, scales = infos.get(f"{stem}qzeros"), infos.get(f"{stem}scales")
        if scales is None or len(scales.shape) != 2 or zeros is None or zeros.dtype != "I32":
            raise InputError(f"{name} lacks its qzeros or scales, or they are no matrices: the file is damaged.")
        groups, outputs = scales.shape
        inputs = infos[name].rows
        granularity = Granularity("group", max(1, inputs // max(1, groups)))
        if section.get("group_size") not in (None, -1, granularity.size):
            raise InputError(
                f"{stem}weight has a scale for every {granularity.size} columns; config.json says "
                f"{section['group_size']}."
            )
        symmetric = not packing.unpack_int4_even_first(load(f"{stem}qzeros")).any()
        found[f"{stem}weight"] = ((outputs, inputs), Scheme(NumberFormat("int4", granularity, bool(symmetric))))
    return found


def config(schemes: Mapping[str, Scheme], left: Iterable[str], dtype: str) -> dict[str, Any]:
    """``quantization_config`` of a model: one scheme, and the modules left out.

    ``zero_point`` is always true, since zero points are always stored and every kernel then reads them.
    """
    size = next(iter(schemes.values())).weights.granularity.size
    return {
        "quant_method": NAME,
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _excluded(left, list(schemes)),
    }


def _excluded(left: Iterable[str], quantized: list[str]) -> list[str]:
    """Plain parts of names that mean the modules left: transformers looks for them at the end, vLLM anywhere.

    The shortest end of a name that is part of no quantized module's; its whole name where there is none. A name
    that quantized modules lie under is none of this model's layers, and would leave out all of them.
    """
    found: dict[str, None] = {}
    for name in left:
        if any(f".{name}." in f".{other}" for other in quantized):
            continue
        parts = name.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        found[next((end for end in endings if not any(end in other for other in quantized)), name)] = None
    return list(found)
