"""Reading artifacts without quantcli: by the libraries that define their formats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantcli.core.scheme import PRESETS

CLASSES = {"bert": "AutoModel"}

#: The presets that a checkpoint can be written in without data.
CHECKPOINT_SCHEMES = [name for name in PRESETS if name != "int8-static"]


def bitsandbytes_rounds() -> bool:
    """Whether bitsandbytes multiplies by NF4 weights in bfloat16 here: it does on processors that can."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: part for file in sorted(folder.glob("*.safetensors")) for name, part in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(folder: Path) -> dict[str, Tensor]:
    """Every weight of an artifact, as the library that defines its format decodes it."""
    config = config_of(folder).get("quantization_config")
    tensors = tensors_of(folder)
    if config is None:
        return tensors
    if config["quant_method"] in ("gptq", "awq"):
        return decode_transposed(tensors, config["quant_method"])
    decode = decode_bitsandbytes if config["quant_method"] == "bitsandbytes" else decode_compressed_tensors
    marks = r"(.+\.)weight(?:_scale|\.quant_state\.bitsandbytes__nf4)"
    prefixes = [match[1] for match in map(re.compile(marks).fullmatch, tensors) if match]
    for prefix in prefixes:
        names = [name for name in tensors if name.startswith(prefix + "weight")]
        layer = {name.removeprefix(prefix): tensors.pop(name) for name in names}
        tensors[prefix + "weight"] = decode(layer, prefix[:-1], config)
    return tensors


def decode_transposed(tensors: dict[str, Tensor], method: str) -> dict[str, Tensor]:
    """gptq and awq, whose libraries cannot be installed beside the others: by shifts and masks, as they do it."""
    for name in [name for name in tensors if name.endswith(".qweight")]:
        stem = name.removesuffix("qweight")
        codes, zeros, scales = codes_of_transposed(tensors, stem, method)
        groups = tensors.get(f"{stem}g_idx", torch.arange(len(codes)) // (len(codes) // len(scales))).long()
        weight = (codes - zeros[groups]) * scales[groups]
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(stem + part, None)
        tensors[f"{stem}weight"] = weight.T.contiguous()
    return tensors


def codes_of_transposed(tensors: dict[str, Tensor], stem: str, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes ``[I, O]``, zero points ``[I / g, O]`` and scales ``[I / g, O]`` of a layer, float32."""
    packed, packed_zeros, scales = (tensors[stem + part] for part in ("qweight", "qzeros", "scales"))
    outputs = scales.shape[1]
    bits = 32 * packed_zeros.shape[1] // outputs
    if method == "awq":
        shifts = [4 * [0, 2, 4, 6, 1, 3, 5, 7].index(i) for i in range(8)]
        codes = torch.stack([packed >> shift & 15 for shift in shifts], -1).flatten(1)
        zeros = torch.stack([packed_zeros >> shift & 15 for shift in shifts], -1).flatten(1)
    else:
        shifts = list(range(0, 32, bits))
        codes = torch.stack([packed >> shift & (1 << bits) - 1 for shift in shifts], 1).flatten(0, 1)
        # Version 1 stores zero points less one.
        zeros = torch.stack([packed_zeros >> shift & (1 << bits) - 1 for shift in shifts], -1).flatten(1) + 1
    return codes.float(), zeros.float(), scales.float()


def codes_of(folder: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Unsigned codes ``[O, I]``, zero points and scales ``[O, I / g]`` of an artifact's int4 and int8, by module."""
    return codes_in(tensors_of(folder), config_of(folder)["quantization_config"]["quant_method"])


def codes_in(tensors: dict[str, Tensor], method: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The same of tensors whose format is known."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    found = {}
    for name, packed in tensors.items():
        if name.endswith(".qweight"):
            parts = codes_of_transposed(tensors, name.removesuffix("qweight"), method)
            codes, zeros, scales = (part.T.contiguous() for part in parts)
            found[name.removesuffix(".qweight")] = codes, zeros, scales
        if name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed")
            shape, scales = tensors[f"{stem}_shape"].tolist(), tensors[f"{stem}_scale"].float()
            scales = scales if scales.ndim == 2 else scales.reshape(1, 1)
            bits = 32 * packed.shape[1] // shape[1]
            half, zeros = float(1 << (bits - 1)), torch.zeros_like(scales)
            if f"{stem}_zero_point" in tensors:
                zeros = unpack_from_int32(tensors[f"{stem}_zero_point"], bits, scales.shape, packed_dim=0).float()
            codes = unpack_from_int32(packed, bits, shape).float()
            found[stem.removesuffix(".weight")] = codes + half, zeros + half, scales
    return found


def decoded_file(file: Path, method: str) -> dict[str, Tensor]:
    """Every weight of a bare file, which no configuration describes; not of bitsandbytes."""
    tensors = load_file(file)
    stored = re.compile(r"weight_(packed|shape|scale|zero_point)|qweight|qzeros|scales|g_idx")
    plain = {name: part for name, part in tensors.items() if not stored.fullmatch(name.rpartition(".")[2])}
    for name in plain.keys() & {key.removesuffix("_scale") for key in tensors if key.endswith("_scale")}:
        plain[name] = plain[name] * tensors[f"{name}_scale"].float()
    for module, (codes, zeros, scales) in codes_in(tensors, method).items():
        size = codes.shape[1] // scales.shape[1]
        plain[f"{module}.weight"] = (codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
    return plain


def decode_bitsandbytes(layer: dict[str, Tensor], module: str, config: dict[str, Any]) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed = layer.pop("weight")
    values: Tensor = dequantize_4bit(packed, QuantState.from_dict(layer, torch.device("cpu")))
    return values


def decode_compressed_tensors(layer: dict[str, Tensor], module: str, config: dict[str, Any]) -> Tensor:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    groups = QuantizationConfig.model_validate(config).config_groups.values()
    scheme = next(group for group in groups if any(t == "Linear" or match_name(module, t) for t in group.targets))
    values: Tensor = BaseCompressor.get_value_from_registry(scheme.format).decompress(layer, scheme)["weight"]
    return values


def loaded(folder: Path, model: str, **options: Any) -> nn.Module:
    """An artifact as a user loads it; nothing may be missing or left over."""
    import transformers

    loader = getattr(transformers, CLASSES.get(model, "AutoModelForCausalLM"))
    network, info = loader.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return network.eval()


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(input_ids=torch.arange(48).reshape(4, 12))[0].float()


def reference(artifact: Path, model: str, place: Path) -> nn.Module:
    """The original architecture with the weights that an artifact's files stand for."""
    weights = decoded(artifact)
    if model == "gpt2" and (artifact / "config.json").read_text().find("bitsandbytes") > 0:
        weights = {name: part.T if re.search(r"c_\w+\.weight", name) else part for name, part in weights.items()}
    place.mkdir()
    save_file(
        {name: part.contiguous() for name, part in weights.items()}, place / "model.safetensors", {"format": "pt"}
    )
    config = config_of(artifact)
    config.pop("quantization_config", None)
    (place / "config.json").write_text(json.dumps(config))
    return loaded(place, model)


def quantize_inputs(network: nn.Module, artifact: Path) -> nn.Module:
    """Give the layers that were quantized inputs of 8 bits per token, as int8-dynamic means it."""

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return ((inputs[0] / scale).round().clamp(-128, 127) * scale, *inputs[1:])

    for name in tensors_of(artifact):
        if name.endswith(".weight_scale"):
            network.get_submodule(name.removesuffix(".weight_scale")).register_forward_pre_hook(rounded)
    return network
