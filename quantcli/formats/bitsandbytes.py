"""bitsandbytes NF4 as transformers saves and loads it (checked against bitsandbytes 0.50).

QLoRA, arXiv:2305.14314. The weight is flattened; every ``block`` consecutive values share an absmax,
which double quantization stores in 8 bits. torch is imported only where bits are laid out: planning does
without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from quantcli.core.dtypes import TORCH_NAMES
from quantcli.core.scheme import NESTED_BLOCK, Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo, TensorSpec
from quantcli.errors import InputError
from quantcli.formats.base import Storage
from quantcli.formats.module_patterns import module_patterns

if TYPE_CHECKING:
    from torch import Tensor

NAME = "bitsandbytes"
STORAGE = Storage(one_dtype=True)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

ROLES = {
    "embedding": "bitsandbytes replaces only linear layers",
    "conv": "bitsandbytes replaces only linear layers",
    "expert": "transformers 5 fuses experts into 3-D weights, which bitsandbytes cannot carry",
    "experts": "bitsandbytes cannot carry fused 3-D expert weights",
}

#: Rows that bitsandbytes' kernel for AVX512-BF16 multiplies at a time; it has no other way on these processors.
KERNEL_ROWS = 32

#: Room for the JSON that describes one layer; it is padded with spaces, because its length must be
#: known before the offset it holds is.
STATE_BYTES = 320


def supports(scheme: Scheme) -> str | None:
    """Why the scheme cannot be written, or None when it can."""
    weights = scheme.weights
    if weights.dtype != "nf4":
        return f"{NAME} carries nf4 weights, not {weights.dtype}"
    if weights.granularity.kind != "block" or weights.granularity.size not in BLOCK_SIZES:
        return f"{NAME} carries nf4 in blocks of {', '.join(map(str, BLOCK_SIZES))}; not {weights.granularity}"
    if not weights.symmetric or weights.dynamic:
        return f"nf4 weights are symmetric and their scales are stored; not {weights}"
    if scheme.inputs is not None:
        return f"{NAME} keeps inputs as they are"
    return None


def carries(role: str) -> str | None:
    """Why layers of this role stay as they are, or None when they are quantized."""
    return ROLES.get(role)


def fits(shape: tuple[int, ...], scheme: Scheme) -> str | None:
    """Why a matrix does not fit, or None: processors with AVX512-BF16 have kernels for some shapes, and no others."""
    size = scheme.weights.granularity.size or 1
    if shape[0] % KERNEL_ROWS:
        return f"bitsandbytes' kernel for processors takes rows in multiples of {KERNEL_ROWS}, not {shape[0]}"
    if shape[1] % size:
        return f"bitsandbytes' kernel for processors takes columns in blocks of {size}, not {shape[1]}"
    return None


def together(schemes: Iterable[Scheme]) -> str | None:
    """None: every weight carries its own description."""
    return None


def codes_name(weight: str, scheme: Scheme) -> str:
    """The codes take the weight's own name."""
    return weight


def _blocks(shape: tuple[int, ...], scheme: Scheme) -> int:
    return -(-prod(shape) // (scheme.weights.granularity.size or 1))


def layout(weight: str, shape: tuple[int, ...], scheme: Scheme, scale_dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that stands for ``weight`` ``[rows, columns]``."""
    blocks = _blocks(shape, scheme)
    specs = {
        weight: TensorSpec("U8", (-(-prod(shape) // 2), 1)),
        f"{weight}.quant_map": TensorSpec("F32", (16,)),
        f"{weight}.quant_state.bitsandbytes__nf4": TensorSpec("U8", (STATE_BYTES,)),
    }
    if not scheme.weights.double_quantized:
        return specs | {f"{weight}.absmax": TensorSpec("F32", (blocks,))}
    return specs | {
        f"{weight}.absmax": TensorSpec("U8", (blocks,)),
        f"{weight}.nested_absmax": TensorSpec("F32", (-(-blocks // NESTED_BLOCK),)),
        f"{weight}.nested_quant_map": TensorSpec("F32", (256,)),
    }


def codes_offset(row: int, columns: int, scheme: Scheme) -> int:
    """Bytes of the stored codes that lie before a row; slabs start at whole blocks, so at whole bytes."""
    return row * columns // 2


def encode_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Stored form of a slab of rows, int8 ``[rows, columns]``."""
    from quantcli.core import packing

    return packing.pack_nibbles_high_first(codes.reshape(-1))


def decode_codes(stored: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Inverse of `encode_codes`: int8 ``[rows, columns]``."""
    from quantcli.core import packing

    flat = stored.reshape(-1)
    count = flat.numel() * 2 // columns * columns
    return packing.unpack_nibbles_high_first(flat, count).reshape(-1, columns)


def encode_scales(weight: str, tensor: QuantizedTensor, scheme: Scheme, scale_dtype: str) -> dict[str, Tensor]:
    """Every other tensor of the layer; ``tensor.codes`` is not looked at."""
    import torch

    from quantcli.core.nf4 import dynamic_codebook, nf4_codebook, quantize_scales

    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": scheme.weights.granularity.size,
        "dtype": TORCH_NAMES[scale_dtype],
        "shape": list(tensor.shape),
    }
    encoded = {f"{weight}.quant_map": nf4_codebook()}
    if scheme.weights.double_quantized:
        codes, absmax, offset = quantize_scales(tensor.scale)
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        encoded |= {
            f"{weight}.absmax": codes,
            f"{weight}.nested_absmax": absmax,
            f"{weight}.nested_quant_map": dynamic_codebook(),
        }
    else:
        encoded[f"{weight}.absmax"] = tensor.scale
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    encoded[f"{weight}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return encoded


def decode_scales(
    weight: str, shape: tuple[int, ...], scheme: Scheme, load: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) of a layer, as `QuantizedTensor` holds it; NF4 has no zero point."""
    absmax = load(f"{weight}.absmax")
    if not scheme.weights.double_quantized:
        return absmax, None
    from quantcli.core.nf4 import dequantize_scales

    state = json.loads(load(f"{weight}.quant_state.bitsandbytes__nf4").numpy().tobytes())
    return dequantize_scales(absmax, load(f"{weight}.nested_absmax"), state["nested_offset"]), None


def find(
    infos: Mapping[str, TensorInfo], section: Mapping[str, Any], load: Callable[[str], Tensor]
) -> dict[str, tuple[tuple[int, int], Scheme]]:
    """Shape and scheme of every quantized weight, by its name; each carries its own description.

    Raises:
        InputError: a description that is damaged, or of another kind than NF4 in bytes.
    """
    found = {}
    for name in infos:
        weight, mark, kind = name.rpartition(".quant_state.bitsandbytes__")
        if not mark:
            continue
        try:
            state = json.loads(load(name).numpy().tobytes())
            rows, columns = (int(side) for side in state["shape"])
            nested = "nested_offset" in state and isfinite(state["nested_offset"])
            granularity = Granularity("block", int(state["blocksize"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{name} does not describe a matrix: {error!r}.") from error
        stored = infos.get(weight)
        if (
            kind != "nf4"
            or stored is None
            or stored.dtype != "U8"
            or state.get("nested_blocksize", 256) != NESTED_BLOCK
        ):
            what = f"{kind} in {stored.dtype if stored else 'nothing'}"
            raise InputError(f"{weight} is stored by bitsandbytes as {what}.", "NF4 in U8 is read.")
        number_format = NumberFormat("nf4", granularity, double_quantized=nested)
        found[weight] = ((rows, columns), Scheme(number_format))
    return found


def config(schemes: Mapping[str, Scheme], left: Iterable[str], dtype: str) -> dict[str, Any]:
    """``quantization_config`` of a model; ``dtype`` is the dtype of what is not quantized."""
    nested = any(scheme.weights.double_quantized for scheme in schemes.values())
    return {
        "quant_method": NAME,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": TORCH_NAMES[dtype],
        "bnb_4bit_quant_storage": "uint8",
        # Older transformers match prefixes, so that mlp.gate would also skip mlp.gate_proj.
        "llm_int8_skip_modules": [f"{pattern}$" for pattern in module_patterns(left, [*schemes, *left])],
    }
