"""Scaled floating-point checkpoints as sources: values against the libraries that define them, and float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.artifacts import tensors_of
from torch import Tensor

from quantcli import convert, inspect
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import DecodedFloats, decoded_checkpoint
from quantcli.checkpoint.quantized import open_quantized
from quantcli.errors import InputError

E4M3 = torch.float8_e4m3fn
#: Of every model below: a weight whose sides blocks of 128 x 128 do not divide.
NAME = "model.layers.0.mlp.up_proj.weight"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape: int, high: int = 256, low: int = 0, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def folder_of(place: Path, tensors: dict[str, Tensor], section: dict[str, Any], **config: Any) -> Path:
    place.mkdir()
    save_file({name: part.contiguous() for name, part in tensors.items()}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"quantization_config": section, "dtype": "bfloat16"} | config))
    return place


def opened(folder: Path) -> DecodedFloats:
    found = decoded_checkpoint(open_checkpoint(folder))
    assert isinstance(found, DecodedFloats)
    return found


def spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """A scale for every value, in float64."""
    rows, columns = (torch.arange(side) // size for side, size in zip(shape, block, strict=True))
    return scale.double()[rows][:, columns]


def rows_agree(found: DecodedFloats, name: str) -> Tensor:
    """The whole weight, whose rows are the same wherever they begin."""
    info, whole = next(info for info in found.infos() if info.name == name), found.load(name)
    for start, stop in ((0, 1), (0, info.rows), (info.rows // 2 - 1, info.rows), (info.rows // 2, info.rows // 2 + 1)):
        assert torch.equal(found.read_rows(info, start, stop), whole[start:stop])
    return whole


def fp8_blocks(folder: Path, shape: tuple[int, int] = (300, 200), size: int = 128) -> tuple[Path, Tensor, Tensor]:
    codes = (random(*shape) * 50).to(E4M3)
    scale = random(-(-shape[0] // size), -(-shape[1] // size), seed=1).abs() * 1e-3
    tensors = {NAME: codes, f"{NAME}_scale_inv": scale, "model.norm.weight": torch.ones(200, dtype=torch.bfloat16)}
    section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [size, size]}
    return folder_of(folder, tensors, section), codes, scale


@pytest.mark.parametrize("size", [128, 64])
def test_blocks_of_fp8(tmp_path: Path, size: int) -> None:
    folder, codes, scale = fp8_blocks(tmp_path / "m", size=size)
    found = opened(folder)
    wanted = codes.double() * spread(scale, (size, size), (300, 200))
    torch.testing.assert_close(rows_agree(found, NAME).double(), wanted, rtol=1e-7, atol=0)
    assert [(info.name, info.dtype) for info in found.infos()] == [("model.norm.weight", "BF16"), (NAME, "F32")]
    assert found.config == {"dtype": "bfloat16"}


def test_blocks_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder, codes, scale = fp8_blocks(tmp_path / "m", (256, 384))
    oracle = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    assert torch.equal(opened(folder).load(NAME), oracle)


def test_golden_bytes_of_fp8_blocks(tmp_path: Path) -> None:
    # 0x38 is 1, 0x3C 1.5, 0xC0 -2, 0x7E 448, 0x01 the smallest, 2 ** -9.
    codes = torch.tensor([[0x38, 0x3C, 0xC0], [0x7E, 0x01, 0x00]], dtype=torch.uint8).view(E4M3)
    section = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    folder = folder_of(tmp_path / "m", {NAME: codes, f"{NAME}_scale_inv": torch.tensor([[0.5, 3.0]])}, section)
    assert opened(folder).load(NAME).tolist() == [[0.5, 0.75, -6.0], [224.0, 2.0**-10, 0.0]]


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False} | more
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("strategy", "scales", "more"),
    [
        ("tensor", (1,), {}),
        ("channel", (256, 1), {}),
        ("group", (256, 6), {"group_size": 64}),
        ("block", (2, 3), {"block_structure": [128, 128]}),
    ],
)
def test_fp8_of_compressed_tensors(
    tmp_path: Path, strategy: str, scales: tuple[int, ...], more: dict[str, Any]
) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    codes, scale = (random(256, 384) * 50).to(E4M3), random(*scales, seed=1).abs()
    tensors = {NAME: codes, f"{NAME}_scale": scale, NAME.replace("weight", "input_scale"): torch.ones(1)}
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    found = opened(folder_of(tmp_path / "m", tensors, compressed(strategy, **more)))
    arguments = QuantizationArgs(**compressed(strategy, **more)["config_groups"]["group_0"]["weights"])
    oracle = dequantize(codes, scale, args=arguments, dtype=torch.float32)
    assert torch.equal(rows_agree(found, NAME), oracle)
    assert [info.name for info in found.infos()] == [NAME]


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25]), torch.full((300, 1), 0.25)])
def test_one_scale_for_all_or_for_each_row(tmp_path: Path, scale: Tensor) -> None:
    codes = (random(300, 200) * 50).to(E4M3)
    for name, method in (("scale", "fbgemm_fp8"), ("scale_inv", "fp8")):
        folder = folder_of(tmp_path / name, {NAME: codes, f"{NAME}_{name}": scale}, {"quant_method": method})
        assert torch.equal(rows_agree(opened(folder), NAME), codes.float() * 0.25)


def test_fused_experts_of_fp8(tmp_path: Path) -> None:
    name, codes = "model.layers.0.mlp.experts.gate_up_proj", (random(3, 256, 200) * 50).to(E4M3)
    scale = random(3, 2, 2, seed=1).abs()
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = opened(folder_of(tmp_path / "m", {name: codes, f"{name}_scale_inv": scale}, section))
    wanted = [codes[e].double() * spread(scale[e], (128, 128), (256, 200)) for e in range(3)]
    torch.testing.assert_close(rows_agree(found, name).double(), torch.stack(wanted), rtol=1e-7, atol=0)


def fp4_values(packed: Tensor) -> Tensor:
    """Codes of E2M1 in pairs, one at a time, low half first."""
    flat = [half for byte in packed.view(torch.uint8).flatten().tolist() for half in (byte & 15, byte >> 4)]
    values = [(-1 if code & 8 else 1) * E2M1[code & 7] for code in flat]
    return torch.tensor(values, dtype=torch.float64).reshape(*packed.shape[:-1], -1)


def test_mxfp4_of_gpt_oss_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = random_bytes(3, 1030, 4, 16), random_bytes(3, 1030, 4, low=100, high=140, seed=1)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": random(3, 1030).bfloat16()}
    found = opened(folder_of(tmp_path / "m", tensors, {"quant_method": "mxfp4"}))
    whole = rows_agree(found, name)
    assert {info.name: (info.dtype, info.shape) for info in found.infos()} == {
        name: ("F32", (3, 128, 1030)), f"{name}_bias": ("BF16", (3, 1030)),
    }  # fmt: skip
    assert torch.equal(whole.bfloat16(), convert_moe_packed_tensors(blocks.clone(), scales.clone()))
    wanted = fp4_values(blocks) * (scales.double() - 127).exp2().unsqueeze(-1)
    assert torch.equal(whole.double(), wanted.flatten(-2).transpose(1, 2))


def test_golden_bytes_of_mxfp4(tmp_path: Path) -> None:
    blocks = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 1, 16) * 16 + 15
    for exponent, factor in ((0, 2.0**-127), (127, 1.0), (130, 8.0), (251, 2.0**124)):
        tensors = {"e_blocks": blocks, "e_scales": torch.tensor([[[exponent]]], dtype=torch.uint8)}
        found = opened(folder_of(tmp_path / str(exponent), tensors, {"quant_method": "mxfp4"})).load("e")
        assert found.shape == (1, 32, 1)
        assert found[0, ::2, 0].tolist() == [-6.0 * factor] * 16
        assert found[0, 1::2, 0].tolist() == [sign * value * factor for sign in (1, -1) for value in E2M1]


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "mxfp8", "fp4 beside fp8"])
def test_powers_and_pairs(tmp_path: Path, kind: str) -> None:
    packed, powers = random_bytes(64, 48), random_bytes(64, 3, low=110, high=130, seed=1)
    section = compressed("group")
    if kind == "nvfp4":
        scale, over_all = (random(64, 6, seed=1).abs() * 100).to(E4M3), torch.tensor([37.5])
        tensors = {f"{NAME}_packed": packed, f"{NAME}_scale": scale, f"{NAME}_global_scale": over_all}
        tensors[NAME.replace("weight", "input_global_scale")] = torch.ones(1)
        wanted = fp4_values(packed) * spread(scale.double() / 37.5, (1, 16), (64, 96))
    elif kind == "mxfp8":
        codes = (random(64, 96) * 50).to(E4M3)
        tensors = {NAME: codes, f"{NAME}_scale": powers}
        wanted = codes.double() * spread((powers.double() - 127).exp2(), (1, 32), (64, 96))
    else:
        tensors = {f"{NAME}_packed": packed, f"{NAME}_scale": powers}
        if kind == "fp4 beside fp8":
            section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
            tensors = {NAME: packed.view(torch.int8), f"{NAME}_scale_inv": powers.view(torch.float8_e8m0fnu)}
        wanted = fp4_values(packed) * spread((powers.double() - 127).exp2(), (1, 32), (64, 96))
    found = rows_agree(opened(folder_of(tmp_path / "m", tensors, section)), NAME)
    torch.testing.assert_close(found.double(), wanted, rtol=3e-7, atol=0)


def test_a_plain_cast_to_eight_bits(tmp_path: Path) -> None:
    tensors = {NAME: (random(64, 32) * 50).to(E4M3), "a.bias": random(64).to(torch.float8_e5m2), "n.weight": random(8)}
    tensors["query_norm.scale"] = random(8).to(E4M3)  # which is a norm's weight
    save_file(tensors, tmp_path / "cast.safetensors")
    found = opened(tmp_path / "cast.safetensors")
    assert {name: found.load(name).tolist() for name in tensors} == {n: t.float().tolist() for n, t in tensors.items()}
    # Something that scales, whatever it is called, makes it another thing.
    save_file(tensors | {"a.scale_weight": torch.ones(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(InputError, match="has no scale, or is one of no weight"):
        opened(tmp_path / "scaled.safetensors")


@pytest.mark.parametrize("section", [{"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}])
def test_nvfp4_of_modelopt(tmp_path: Path, section: dict[str, Any]) -> None:
    packed, scale = random_bytes(64, 48), (random(64, 6, seed=1).abs() * 100).to(E4M3)
    tensors = {NAME: packed, f"{NAME}_scale": scale, f"{NAME}_scale_2": torch.tensor(0.02)}
    tensors[NAME.replace("weight", "input_scale")] = torch.ones(1)
    found = opened(folder_of(tmp_path / "m", tensors, section))
    wanted = fp4_values(packed) * spread(scale.double() * 0.02, (1, 16), (64, 96))
    torch.testing.assert_close(rows_agree(found, NAME).double(), wanted, rtol=1e-6, atol=0)
    tensors[NAME.replace("weight", "pre_quant_scale")] = torch.ones(96)
    with pytest.raises(InputError, match="pre_quant_scale scales the inputs of a layer"):
        opened(folder_of(tmp_path / "awq", tensors, section))
    integers = {NAME: packed, f"{NAME}_scale": torch.ones(64, 3)}
    with pytest.raises(InputError, match=r"F32 \[64, 3\], which do not divide"):
        opened(folder_of(tmp_path / "int4", integers, {"quant_method": "modelopt"}))


def test_int8_of_bitsandbytes(tmp_path: Path) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes, largest = random_bytes(64, 48).view(torch.int8), random(64, seed=1).abs()
    tensors = {NAME: codes, NAME.replace("weight", "SCB"): largest, f"{NAME}_format": torch.tensor(0).byte()}
    for name, section in (("new", {"quant_method": "bitsandbytes"}), ("old", {"load_in_8bit": True})):
        found = opened(folder_of(tmp_path / name, tensors, section))
        assert [info.name for info in found.infos()] == [NAME]
        torch.testing.assert_close(rows_agree(found, NAME), int8_vectorwise_dequant(codes, largest))


def test_values_of_rotated_weights_are_not_the_layers(tmp_path: Path) -> None:
    tensors = {NAME: (random(64, 32) * 50).to(E4M3), f"{NAME}_scale": torch.ones(64, 1)}
    section = compressed("channel") | {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}
    with pytest.raises(InputError, match="has a transform_config, which is not read"):
        opened(folder_of(tmp_path / "m", tensors, section))
    opened(folder_of(tmp_path / "plain", tensors, section | {"transform_config": {}, "kv_cache_scheme": {"a": 1}}))


def damaged(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        folder, _, _ = fp8_blocks(place / "whole")
        tensors = tensors_of(folder)
        change(tensors)
        section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        return folder_of(place / "damaged", tensors, section)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged(lambda t: t.pop(f"{NAME}_scale_inv")), r"up_proj.weight \(F8_E4M3\) has no scale"),
        (damaged(lambda t: t.pop(NAME)), r"weight_scale_inv \(F32\) has no scale, or is one of no weight"),
        (damaged(lambda t: t.update({f"{NAME}_scale_inv": torch.ones(7, 2)})), r"F32 \[7, 2\], which do not divide"),
        (damaged(lambda t: t.update({f"{NAME}_scale_inv": torch.ones(3, 2).int()})), r"I32 \[3, 2\], which do not"),
        (damaged(lambda t: t.update({f"{NAME}_zero_point": torch.ones(3, 2)})), "zero points, and that is not read"),
        (damaged(lambda t: t.update({"e_blocks": torch.ones(1, 1, 1, 16).byte()})), "e_scales is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(make(tmp_path))


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    folder, codes, scale = fp8_blocks(tmp_path / "m")
    scale[1, 1] = float("nan")
    save_file({NAME: codes, f"{NAME}_scale_inv": scale}, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"The scales of {NAME} are not finite"):
        opened(folder).load(NAME)
    tensors = {"e_blocks": torch.ones(1, 1, 1, 16).byte(), "e_scales": torch.full((1, 1, 1), 255).byte()}
    with pytest.raises(InputError, match="The scales of e are not finite"):
        opened(folder_of(tmp_path / "e", tensors, {"quant_method": "mxfp4"})).load("e")


def fp8_llama(models: Path, place: Path) -> tuple[Path, dict[str, Tensor]]:
    """The tiny llama with blocks of FP8, and its values."""
    tensors, values = {}, {}
    for name, part in tensors_of(models / "llama").items():
        if "proj" not in name:
            tensors[name] = values[name] = part.bfloat16()
            continue
        height, width = (-(-side // 64) for side in part.shape)
        scale = random(height, width, seed=2).abs() + 0.5
        large = spread(scale, (64, 64), part.shape).float() * part.abs().max() / 448
        scale = scale * part.abs().max() / 448
        tensors[name] = (part / large).to(E4M3)
        tensors[f"{name}_scale_inv"] = scale
        values[name] = (tensors[name].double() * spread(scale, (64, 64), part.shape)).float()
    config = json.loads((models / "llama" / "config.json").read_text())
    section = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    return folder_of(place, tensors, section, **(config | {"dtype": "bfloat16"})), values


@pytest.mark.usefixtures("no_runtime_check")
def test_a_conversion_to_16_bits_is_a_cast_of_the_values(models: Path, tmp_path: Path) -> None:
    folder, values = fp8_llama(models, tmp_path / "fp8")
    convert(folder, tmp_path / "out", scheme="bf16")
    made = tensors_of(tmp_path / "out")
    assert made.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(made[name], value.bfloat16()), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.usefixtures("no_runtime_check")
@pytest.mark.parametrize("scheme", ["int4", "int8", "nf4", "int8-dynamic"])
def test_fp8_to_any_scheme_is_as_from_its_values(models: Path, tmp_path: Path, scheme: str) -> None:
    folder, values = fp8_llama(models, tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(values, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    for source, place in ((folder, "a"), (plain, "b")):
        convert(source, tmp_path / place, scheme=scheme)
    made, wanted = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    manifest = json.loads((tmp_path / "a" / "quantcli.json").read_text())
    assert manifest["source"] == {"format": "fp8"}


@pytest.mark.usefixtures("no_runtime_check")
@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_float32_beside_16_bits_is_kept(models: Path, tmp_path: Path, scheme: str) -> None:
    folder, values = fp8_llama(models, tmp_path / "fp8")
    kept = {"model.layers.0.mlp.gate.e_score_correction_bias": torch.tensor([9.013, 9.026])}
    save_file(tensors_of(folder) | kept, folder / "model.safetensors")
    skipped = "model.layers.0.mlp.up_proj"
    convert(folder, tmp_path / "out", scheme=scheme, skip=[skipped] if scheme == "int8" else [])
    made = tensors_of(tmp_path / "out")
    assert torch.equal(made[next(iter(kept))], kept[next(iter(kept))])
    # Values of codes are in float32 by no one's choice.
    assert torch.equal(made[f"{skipped}.weight"], values[f"{skipped}.weight"].bfloat16())


def test_inspect_names_what_it_is(models: Path, tmp_path: Path) -> None:
    folder, _ = fp8_llama(models, tmp_path / "fp8")
    row = inspect(folder, schemes=["int4"]).models[0]
    assert (row.format, row.scheme) == ("fp8", "fp8, block 64 x 64")
    assert inspect(folder, schemes=["int4"]).details["schemes"][0]["applies"]
    with pytest.raises(InputError, match="quantized as fp8, and no other container holds its weights as they are"):
        open_quantized(open_checkpoint(folder))
