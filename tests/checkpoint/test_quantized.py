"""Quantized checkpoints as inputs: their values against the libraries that define them, and what is damaged."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.artifacts import decoded, tensors_of
from support.quantized_models import KINDS, Artifacts, changed
from torch import Tensor

from quantcli import convert, formats
from quantcli.algorithms import rtn
from quantcli.checkpoint import quantized
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint, decoded_checkpoint
from quantcli.checkpoint.quantized import open_quantized
from quantcli.core import numerics
from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.errors import InputError
from quantcli.planning.recipe import Recipe

#: A weight of every llama artifact.
NAME = "model.layers.1.mlp.down_proj.weight"
STEM = NAME.removesuffix("weight")


def view(folder: Path) -> DecodedCheckpoint:
    return DecodedCheckpoint(open_quantized(open_checkpoint(folder)))


def values(checkpoint: DecodedCheckpoint) -> dict[str, Tensor]:
    return {info.name: checkpoint.load(info.name) for info in checkpoint.infos()}


@pytest.mark.parametrize("rest", ["keep", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_formats_own_decoder(artifact: Artifacts, kind: str, rest: str) -> None:
    folder = artifact(kind, rest=rest)
    found, wanted = values(view(folder)), decoded(folder)
    assert found.keys() == wanted.keys()
    coded = open_quantized(open_checkpoint(folder)).weights
    assert len(coded) == 14
    for name, part in wanted.items():
        # Their decoders return the dtype of the scales, or of the model; ours float32.
        assert found[name].dtype == (torch.float32 if name in coded else part.dtype)
        torch.testing.assert_close(found[name].to(part.dtype), part, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["int4", "gptq", "awq", "nf4", "nf4-double", "int8-dynamic"])
@pytest.mark.parametrize("model", ["llama", "tied", "bert"])
def test_names_and_shapes_are_the_originals(artifact: Artifacts, models: Path, kind: str, model: str) -> None:
    checkpoint = view(artifact(kind, model))
    original = open_checkpoint(models / model)
    assert {info.name: info.shape for info in checkpoint.infos()} == {i.name: i.shape for i in original.infos()}
    assert checkpoint.config is not None and "quantization_config" not in checkpoint.config
    for info in original.infos():
        error = (checkpoint.load(info.name).float() - original.load(info.name)).norm()
        assert error < 0.2 * original.load(info.name).norm() + 1e-6, info.name


def test_transposed_weights_are_turned_back(artifact: Artifacts, models: Path) -> None:
    checkpoint, original = view(artifact("nf4", "gpt2")), open_checkpoint(models / "gpt2")
    assert {info.name: info.shape for info in checkpoint.infos()} == {i.name: i.shape for i in original.infos()}
    turned = decoded(artifact("nf4", "gpt2", rest="keep"))
    own = view(artifact("nf4", "gpt2", rest="keep"))
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        assert torch.equal(own.load(name), turned[name].T)


def test_transposed_weights_of_a_part_are_turned_back(artifact: Artifacts, models: Path, tmp_path: Path) -> None:
    """GPT-2 says what a model of pictures sees, whose other part has linear layers under the same names."""
    folder = artifact("nf4", "gpt2")
    config = json.loads((folder / "config.json").read_text())
    section = config.pop("quantization_config")
    whole = {"model_type": "vision-encoder-decoder", "decoder": config, "quantization_config": section}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = tensors_of(folder)
    tensors |= {f"encoder.{name}": part.clone() for name, part in tensors.items() if ".h.0.mlp.c_fc." in name}
    named = {name if name.startswith("encoder.") else f"decoder.{name}": part for name, part in tensors.items()}
    save_file(named, tmp_path / "model.safetensors")
    shapes = {info.name: info.shape for info in view(tmp_path).infos()}
    for info in open_checkpoint(models / "gpt2").infos():
        assert shapes[f"decoder.{info.name}"] == info.shape
    assert shapes["encoder.transformer.h.0.mlp.c_fc.weight"] == shapes["decoder.transformer.h.0.mlp.c_fc.weight"][::-1]


def test_every_model_of_turned_layers_is_known() -> None:
    """By what the installed transformers imports where: a new one would be read as it is not."""
    models = Path(transformers.__file__).parent / "models"
    files = (
        file for file in models.glob("*/modeling_*.py") if re.search(r"import .*\bConv1D\b", file.read_text("utf-8"))
    )
    turned = {file.parent.name for file in files}
    known = {name.replace("-gpt", "").removesuffix("_decoder") for name in quantized._CONV1D_MODELS}
    assert turned and turned <= known


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_codes_of_turned_weights_are_turned_back(models: Path, tmp_path: Path, name: str) -> None:
    scheme = Scheme(NumberFormat("int4", Granularity("group", 32)))
    form, tensors, wanted = formats.quantized_format(name), {}, {}
    for key, part in tensors_of(models / "gpt2").items():
        if not key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensors[key] = wanted[key] = part
            continue
        coded = rtn.run(part.T.contiguous(), scheme.weights, torch.float16)
        tensors[form.codes_name(key, scheme)] = form.encode_codes(coded.codes, scheme)
        tensors |= form.encode_scales(key, coded, scheme, "F16")
        wanted[key] = numerics.decoded(coded).T
    section = {"quant_method": name, "bits": 4, "group_size": 32}
    config = json.loads((models / "gpt2" / "config.json").read_text()) | {"quantization_config": section}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({key: part.contiguous() for key, part in tensors.items()}, tmp_path / "model.safetensors")
    found = view(tmp_path)
    assert {key: part.shape for key, part in values(found).items()} == {k: part.shape for k, part in wanted.items()}
    assert all(torch.equal(part, wanted[key].float()) for key, part in values(found).items())
    info = next(info for info in found.infos() if info.name.endswith("h.0.mlp.c_proj.weight"))
    assert torch.equal(found.read_rows(info, 5, 9), wanted[info.name][5:9])


def test_a_section_of_the_language_model_within(artifact: Artifacts, tmp_path: Path) -> None:
    folder = changed(artifact("int4"), tmp_path / "inner")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"hidden_size": 1, "quantization_config": config.pop("quantization_config")}
    (folder / "config.json").write_text(json.dumps(config))
    found = view(folder)
    assert len(open_quantized(open_checkpoint(folder)).weights) == 14
    assert found.config is not None and found.config["text_config"] == {"hidden_size": 1}


def test_what_says_that_it_is_not_sparse_changes_nothing(artifact: Artifacts, tmp_path: Path) -> None:
    folder = changed(artifact("int4"), tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    for kind, is_read in (("dense", True), ("sparse-24-bitmask", False)):
        config["quantization_config"]["sparsity_config"] = {"format": kind, "global_sparsity": 0.1}
        (folder / "config.json").write_text(json.dumps(config))
        with contextlib.nullcontext() if is_read else pytest.raises(InputError, match="a sparsity_config, which is"):
            assert len(view(folder).infos()) == len(view(artifact("int4")).infos())


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8"])
def test_a_bare_file_of_plain_int8_tells_of_its_inputs(models: Path, tmp_path: Path, scheme: str) -> None:
    source = models / "llama" / "model.safetensors"
    convert(source, tmp_path / "out.safetensors", scheme=scheme)
    found = open_quantized(open_checkpoint(tmp_path / "out.safetensors"))
    assert {str(weight.scheme.inputs) for weight in found.weights.values()} == {
        "int8, token, dynamic" if scheme == "int8-dynamic" else "None"
    }
    error = (DecodedCheckpoint(found).load(NAME) - open_checkpoint(source).load(NAME)).norm()
    assert error < 0.02 * open_checkpoint(source).load(NAME).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole(artifact: Artifacts, kind: str) -> None:
    checkpoint = view(artifact(kind))
    info = next(info for info in checkpoint.infos() if info.name == NAME)
    whole = checkpoint.load(NAME)
    for start, stop in ((0, 1), (3, 50), (127, 128), (0, 128)):
        assert torch.equal(checkpoint.read_rows(info, start, stop), whole[start:stop])


def test_it_says_what_is_known_of_its_making(artifact: Artifacts, models: Path, tmp_path: Path) -> None:
    origin = view(artifact("gptq")).origin()
    assert origin == {
        "format": "gptq", "quantcli": origin["quantcli"], "input_sha256": open_checkpoint(models / "llama").sha256(),
        "scheme": "int4", "algorithm": "mse",
    }  # fmt: skip
    foreign = changed(artifact("gptq"), tmp_path / "foreign")
    assert view(foreign).origin() == {"format": "gptq"}
    assert open_quantized(open_checkpoint(foreign)).scheme == "int4"


@pytest.mark.parametrize("kind", ["int4", "gptq", "gptq int8", "awq asymmetric", "nf4"])
def test_a_bare_file_tells_its_kind_by_its_tensors(artifact: Artifacts, tmp_path: Path, kind: str) -> None:
    folder = artifact(kind)
    checkpoint = DecodedCheckpoint(open_quantized(open_checkpoint(folder / "model.safetensors")))
    assert {name: part.tolist() for name, part in values(checkpoint).items()} == {
        name: part.tolist() for name, part in values(view(folder)).items()
    }


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[STEM + name]

    return apply


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[STEM + name] = change(tensors.get(STEM + name, torch.zeros(1)))

    return apply


def fewer_rows(part: Tensor) -> Tensor:
    return part[:-1]


def with_nan(part: Tensor) -> Tensor:
    spoiled = part.clone().float()
    spoiled.view(-1)[3] = float("nan")
    return spoiled.to(part.dtype)


def state(**changes: Any) -> Callable[[Tensor], Tensor]:
    def change(part: Tensor) -> Tensor:
        text = json.dumps(json.loads(part.numpy().tobytes()) | changes).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return change


STATE = "weight.quant_state.bitsandbytes__nf4"
DAMAGED = [
    ("int4", drop("weight_scale"), f"{NAME}_scale is missing"),
    ("int8-dynamic", drop("weight_scale"), f"{NAME}_scale is missing"),
    ("int4", drop("weight_packed"), "stored as a form that is not known"),
    ("int4", drop("weight_shape"), "lacks its shape"),
    ("int4", put("weight_shape", lambda part: part + 1), r"does not hold 129 x 193 codes"),
    ("int4", put("weight_packed", lambda part: part.float()), "is packed in F32"),
    ("int4", put("weight_scale", fewer_rows), r"weight_scale is BF16 \[127, 6\], .* needs \[128, 6\]"),
    ("int4 asymmetric", put("weight_zero_point", fewer_rows), r"I32 \[15, 6\], .* needs I32 \[16, 6\]"),
    ("int4 asymmetric", put("weight_zero_point", lambda part: part.float()), "F32 .* needs I32"),
    ("int4", put("weight_g_idx", lambda _: torch.arange(192)), "does not give each of 192 columns .* one of 6 groups"),
    ("int8-dynamic", put("weight_zero_point", lambda _: torch.ones(128, 1)), "int8 with zero points"),
    ("gptq", drop("scales"), "lacks its qzeros or scales"),
    ("gptq", drop("qzeros"), "lacks its qzeros or scales"),
    ("gptq", drop("qweight"), "belongs to no weight that is whole"),
    ("gptq", put("scales", lambda part: part[0]), "they are no matrices"),
    ("gptq", put("qzeros", lambda part: part.long()), "4 and 8 bits in I32 are read"),
    ("gptq", put("qzeros", lambda part: part[:, :12]), "3-bit codes"),
    ("gptq", put("qzeros", fewer_rows), r"qzeros is I32 \[5, 16\], .* needs I32 \[6, 16\]"),
    ("gptq", put("scales", lambda part: part.int()), "scales is I32"),
    ("gptq", put("g_idx", lambda part: part.flip(0) + 1), "does not give each of 192 columns .* one of 6 groups"),
    ("gptq", put("g_idx", fewer_rows), r"g_idx is I32 \[191\]"),
    ("awq", drop("scales"), "lacks its qzeros or scales"),
    ("awq", drop("qzeros"), "lacks its qzeros or scales"),
    ("awq", put("qweight", fewer_rows), "a scale for every 31 columns; config.json says 32"),
    ("nf4", drop("weight.absmax"), "weight.absmax is missing"),
    ("nf4", put("weight.absmax", fewer_rows), r"absmax is F32 \[383\]"),
    ("nf4-double", drop("weight.nested_absmax"), "nested_absmax is missing"),
    ("nf4", drop(STATE), "belongs to no weight that is whole"),
    ("nf4", put(STATE, lambda part: part[:9]), "does not describe a matrix"),
    ("nf4", put(STATE, state(shape=[3, 4, 5])), "does not describe a matrix"),
    ("nf4", put(STATE, state(blocksize=0)), "does not describe a matrix"),
    ("nf4-double", put(STATE, state(nested_blocksize=128)), "stored by bitsandbytes as"),
    ("nf4-double", put(STATE, state(nested_offset=None)), "does not describe a matrix"),
    ("nf4", put("weight", lambda part: part.char()), "as nf4 in I8"),
]


@pytest.mark.parametrize(("kind", "damage", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_parts_are_named(
    artifact: Artifacts, tmp_path: Path, kind: str, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        open_quantized(open_checkpoint(changed(artifact(kind), tmp_path / "damaged", damage)))
    assert STEM in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("int4", "weight_scale"), ("gptq", "scales"), ("awq", "scales"), ("nf4", "weight.absmax")],
)
def test_scales_that_are_not_finite(artifact: Artifacts, tmp_path: Path, kind: str, part: str) -> None:
    damaged = changed(artifact(kind), tmp_path / "damaged", put(part, with_nan))
    coded = open_quantized(open_checkpoint(damaged))
    with pytest.raises(InputError, match=f"The scales of {NAME} in .* are not finite: the model is damaged"):
        coded.tensor(NAME)


def set_all(**values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(section: dict[str, Any]) -> None:
        section |= values

    return apply


def in_group(**values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(section: dict[str, Any]) -> None:
        for group in section["config_groups"].values():
            group.update(values)

    return apply


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("gptq", set_all(checkpoint_format="marlin"), "'marlin'"),
        ("awq", set_all(version="gemv"), "4-bit gemv"),
        ("awq", set_all(bits=3), "3-bit gemm"),
        ("gptq", set_all(quant_method="hqq"), "as hqq, which quantcli does not read. Read are compressed-tensors"),
        ("int4", set_all(transform_config={"R1": {}}), "has a transform_config"),
        ("int4", set_all(kv_cache_scheme={"num_bits": 8}), "has a kv_cache_scheme"),
        ("int4", in_group(input_activations={"num_bits": 8}), "its inputs are quantized as well"),
        ("int4", in_group(weights={"group_size": 48}), "for every 32 columns; config.json says 48"),
        ("int8-dynamic", set_all(config_groups={}), "no config.json says how its layer's inputs"),
        ("int4", set_all(quant_method="gptq", format="gptq"), "declared as gptq, but holds no weight"),
    ],
)
def test_what_cannot_be_read_is_named(
    artifact: Artifacts, tmp_path: Path, kind: str, config: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_quantized(open_checkpoint(changed(artifact(kind), tmp_path / "other", config=config)))


def test_other_tools_leave_some_things_out(artifact: Artifacts, tmp_path: Path) -> None:
    def older(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    def undeclared(section: dict[str, Any]) -> None:
        del section["checkpoint_format"]

    folder = changed(artifact("gptq"), tmp_path / "older", older, undeclared)
    assert torch.equal(view(folder).load(NAME), view(artifact("gptq")).load(NAME))


def test_one_scale_for_all_may_be_a_scalar(artifact: Artifacts, tmp_path: Path) -> None:
    folder = changed(artifact("int8 per tensor"), tmp_path / "scalar", put("weight_scale", lambda part: part[0]))
    assert torch.equal(view(folder).load(NAME), view(artifact("int8 per tensor")).load(NAME))


def test_fixed_ranges_of_inputs_belong_to_the_weight(artifact: Artifacts, tmp_path: Path) -> None:
    def static(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name.replace("weight_scale", "input_scale")] = torch.ones(1)
            tensors[name.replace("weight_scale", "input_zero_point")] = torch.zeros(1, dtype=torch.int8)

    fixed = {"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": False}
    folder = changed(artifact("int8-dynamic"), tmp_path / "static", static, in_group(input_activations=fixed))
    coded = open_quantized(open_checkpoint(folder))
    inputs = coded.weights[NAME].scheme.inputs
    assert inputs is not None and not inputs.dynamic and not inputs.symmetric and inputs.granularity.kind == "tensor"
    assert {name: part.tolist() for name, part in values(DecodedCheckpoint(coded)).items()} == {
        name: part.tolist() for name, part in values(view(artifact("int8-dynamic"))).items()
    }
    del (damaged := tensors_of(folder))[f"{STEM}input_scale"]
    save_file(damaged, folder / "model.safetensors")
    with pytest.raises(InputError, match="input_scale is missing"):
        open_quantized(open_checkpoint(folder))


def test_zero_points_decide_what_is_symmetric(artifact: Artifacts) -> None:
    for kind in ("int4", "gptq", "awq"):
        for name, symmetric in ((kind, True), (f"{kind} asymmetric", False)):
            weights = open_quantized(open_checkpoint(artifact(name))).weights
            assert {weight.scheme.weights.symmetric for weight in weights.values()} == {symmetric}


def shuffled(groups: int, size: int) -> Tensor:
    """A group for each column, each group as large as the others, in an order of no kind."""
    order = torch.randperm(groups * size, generator=torch.Generator().manual_seed(3))
    return (torch.arange(groups * size) // size)[order].to(torch.int32)


def plain_values(codes: Tensor, scale: Tensor, zero_point: Tensor, groups: Tensor) -> Tensor:
    """What codes of a matrix ``[O, I]`` stand for, in float64, one column after the other."""
    columns = [
        (codes[:, column].double() - zero_point[:, group].double()) * scale[:, group].double()
        for column, group in enumerate(groups.tolist())
    ]
    return torch.stack(columns, 1)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes of words that hold them along the first axis."""
    shifts = torch.arange(0, 32, bits)
    parts = (words.long().unsqueeze(1) >> shifts.reshape(1, -1, 1)) & (2**bits - 1)
    return parts.reshape(-1, words.shape[1])


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", ["gptq", "gptq asymmetric", "gptq int8"])
def test_gptq_of_both_versions_and_in_the_order_of_activations(
    artifact: Artifacts, tmp_path: Path, kind: str, ordered: bool, version: str
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            if ordered:
                groups = len(tensors[name.replace("g_idx", "scales")])
                tensors[name] = shuffled(groups, len(tensors[name]) // groups)

    folder = changed(artifact(kind), tmp_path / "made", change, set_all(checkpoint_format=version, desc_act=ordered))
    held = tensors_of(folder)
    bits = 8 if kind == "gptq int8" else 4
    zeros = unpacked(held[f"{STEM}qzeros"].T, bits).T + (version == "gptq")
    wanted = plain_values(
        unpacked(held[f"{STEM}qweight"], bits).T, held[f"{STEM}scales"].T, zeros.T, held[f"{STEM}g_idx"]
    )
    found = decoded_checkpoint(open_checkpoint(folder))
    assert found.is_read_only == (version == "gptq_v2" or (ordered and kind != "gptq int8"))
    torch.testing.assert_close(found.load(NAME).double(), wanted, rtol=1e-6, atol=0)
    info = next(info for info in found.infos() if info.name == NAME)
    assert torch.equal(found.read_rows(info, 5, 9), found.load(NAME)[5:9])
    assert not [info.name for info in found.infos() if "g_idx" in info.name]


def test_compressed_tensors_in_the_order_of_activations(artifact: Artifacts, tmp_path: Path) -> None:
    order = shuffled(6, 32)
    for kind in ("int4", "int4 asymmetric"):
        plain = decoded_checkpoint(open_checkpoint(artifact(kind)))
        codes, held = plain._quantized.tensor(NAME), tensors_of(artifact(kind))
        zero_point = torch.zeros_like(codes.scale) if codes.zero_point is None else codes.zero_point
        wanted = plain_values(codes.codes, held[f"{NAME}_scale"], zero_point, order)
        folder = changed(artifact(kind), tmp_path / kind, put("weight_g_idx", lambda _: order))
        found = decoded_checkpoint(open_checkpoint(folder))
        assert found.is_read_only
        torch.testing.assert_close(found.load(NAME).double(), wanted, rtol=1e-6, atol=0)
    unfilled = changed(artifact("int4"), tmp_path / "unfilled", put("weight_g_idx", lambda _: -torch.ones(192).int()))
    found = decoded_checkpoint(open_checkpoint(unfilled))
    assert not found.is_read_only
    assert torch.equal(found.load(NAME), view(artifact("int4")).load(NAME))


def test_what_is_in_an_order_of_its_own_is_quantized_anew_and_not_carried_over(
    artifact: Artifacts, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{STEM}g_idx"] = shuffled(6, 32)

    folder = changed(artifact("gptq"), tmp_path / "made", change, set_all(desc_act=True))
    with pytest.raises(InputError, match=f"groups of {NAME} follow the order of activations"):
        convert(folder, tmp_path / "out", format="compressed-tensors")
    report = convert(folder, tmp_path / "out", scheme="int8")
    assert report.models[1].metrics["sqnr_db_min"] > 30
    assert [warning for warning in report.warnings if "quantized before" in warning]


def test_version_2_keeps_its_codes_in_another_container(artifact: Artifacts, tmp_path: Path) -> None:
    folder = changed(artifact("gptq asymmetric"), tmp_path / "made", config=set_all(checkpoint_format="gptq_v2"))
    convert(folder, tmp_path / "out", format="awq")
    assert torch.equal(view(tmp_path / "out").load(NAME), decoded_checkpoint(open_checkpoint(folder)).load(NAME))


def test_groups_that_do_not_divide_in_a_bare_file(artifact: Artifacts, tmp_path: Path) -> None:
    folder = changed(artifact("awq"), tmp_path / "damaged", put("qweight", fewer_rows))
    with pytest.raises(InputError, match=f"{NAME} has 191 columns, and scales for groups of 31"):
        open_quantized(open_checkpoint(folder / "model.safetensors"))


def test_nothing_quantized_and_unknown_kinds(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantized as nothing"):
        open_quantized(open_checkpoint(models / "llama"))
    codes = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    save_file(
        {"a.weight": codes, "b.weight": codes.clone(), "b.weight_scale": torch.ones(1)}, tmp_path / "m.safetensors"
    )
    with pytest.raises(InputError, match=r"a.weight \(F8_E4M3\) has no scale"):
        decoded_checkpoint(open_checkpoint(tmp_path / "m.safetensors"))


def test_weights_are_decoded_once_for_neighbouring_rows(artifact: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = view(artifact("gptq"))
    read: list[str] = []
    load = checkpoint._quantized.tensor
    monkeypatch.setattr(checkpoint._quantized, "tensor", lambda name: (read.append(name), load(name))[1])
    info = next(info for info in checkpoint.infos() if info.name == NAME)
    for start in range(0, 128, 8):
        checkpoint.read_rows(info, start, start + 8)
    assert read == [NAME]
    assert checkpoint.held_bytes >= tensors_of(artifact("gptq"))[f"{STEM}qweight"].nbytes


def test_rows_of_a_few_columns_in_a_bare_file_are_of_eight_bits(tmp_path: Path) -> None:
    weight = torch.randn(48, 2, generator=torch.Generator().manual_seed(0))
    save_file({"narrow.weight": weight}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "out.safetensors", scheme="int8")
    decoded = decoded_checkpoint(open_checkpoint(tmp_path / "out.safetensors"))
    [info] = decoded.infos()
    assert (decoded.read_rows(info, 0, 48) - weight).abs().max() < weight.abs().max() * 0.01


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("columns", [2, 3, 4, 5])
def test_rows_of_a_few_columns_are_read_with_the_bits_they_were_written_with(
    tmp_path: Path, scheme: str, columns: int, no_runtime_check: None
) -> None:
    """Codes of four and of eight bits take one word then, and only the configuration tells them apart."""
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(0))
    (tmp_path / "model").mkdir()
    save_file({"narrow.weight": weight}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "none", "architectures": ["None"]}))
    recipe = Recipe.model_validate(
        {"scheme": {"weights": {"dtype": scheme, "granularity": "channel"}}, "algorithm": "rtn"}
    )
    convert(tmp_path / "model", tmp_path / "out", recipe=recipe)
    decoded = decoded_checkpoint(open_checkpoint(tmp_path / "out"))
    [info] = [info for info in decoded.infos() if info.name == "narrow.weight"]
    error = (decoded.read_rows(info, 0, 48) - weight).abs().max()
    assert error < weight.abs().max() * (0.01 if scheme == "int8" else 0.1)
