"""GGUF written: bits against the package gguf's, models of every architecture in llama.cpp, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_decoders import DECODERS, save_decoder

import quantcli
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.gguf import architectures, header
from quantcli.checkpoint.gguf.checkpoint import open_gguf
from quantcli.checkpoint.quantized import open_quantized
from quantcli.conversion.checkpoint import llama_cpp
from quantcli.core import numerics
from quantcli.core.scheme import Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor
from quantcli.errors import InputError, UsageError
from quantcli.formats import gguf as form


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of an architecture, made once."""
    root, made = tmp_path_factory.mktemp("decoders"), {}

    def model(name: str) -> Path:
        if name not in made:
            made[name] = save_decoder(name, root / name)
        return made[name]

    return model


def write(folder: Path, output: Path, **wishes: Any) -> Path:
    quantcli.convert(folder, output, format="gguf", verify="codes", force=True, **wishes)
    return output


def random_tensor(number_format: NumberFormat, rows: int = 6, columns: int = 256) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    low, high = numerics.code_range(number_format)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=generator)
    groups = columns // (number_format.granularity.size or columns)
    scale = numerics.stored_scale(
        torch.randn(rows, groups, generator=generator) * 0.1, torch.float16, coarse=not number_format.symmetric
    )
    zero_point = None
    if not number_format.symmetric:
        zero_point = torch.randint(low, high + 1, (rows, groups), dtype=torch.int8, generator=generator)
    return QuantizedTensor(codes, scale, zero_point, (rows, columns), number_format)


FORMATS = [
    NumberFormat("int4", Granularity("group", 32)),
    NumberFormat("int4", Granularity("group", 128)),
    NumberFormat("int4", Granularity("group", 64), symmetric=False, coarse=True),
    NumberFormat("int4", Granularity("channel")),
    NumberFormat("int8", Granularity("channel")),
    NumberFormat("int8", Granularity("group", 32)),
]


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_blocks_decode_to_what_codes_and_scales_say(number_format: NumberFormat) -> None:
    tensor = random_tensor(number_format)
    kind = form.type_of(Scheme(number_format))
    blocks = form.to_blocks(tensor)
    values = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(values), numerics.decoded(tensor))
    codes, scales, minima = form.from_blocks(blocks, kind)
    assert torch.equal(form.decode_codes(codes, 256, Scheme(number_format)), tensor.codes)
    assert torch.equal(scales.float(), tensor.scale.repeat_interleave(8 // tensor.scale.shape[1], 1))
    assert (minima is None) == number_format.symmetric


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_bit_for_bit_those_of_gguf(kind: str) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    theirs = torch.from_numpy(gguf.quantize(weight, gguf.GGMLQuantizationType[kind]))
    codes, scales, minima = form.from_blocks(theirs, kind)
    number_format = NumberFormat("int8" if kind == "Q8_0" else "int4", Granularity("group", 32))
    tensor = QuantizedTensor(
        form.decode_codes(codes, 128, Scheme(number_format)), scales.float(), None, (4, 128), number_format
    )
    if minima is None:
        assert torch.equal(form.to_blocks(tensor), theirs)
    else:
        # Minima of other makers are none that zero points give; codes and scales are where ours are.
        ours = form.to_blocks(
            QuantizedTensor(tensor.codes, tensor.scale, torch.zeros_like(scales).char(), (4, 128), number_format)
        )
        assert torch.equal(ours.reshape(4, 4, 20)[:, :, :2], theirs.reshape(4, 4, 20)[:, :, :2])
        assert torch.equal(ours.reshape(4, 4, 20)[:, :, 4:], theirs.reshape(4, 4, 20)[:, :, 4:])


def test_coarse_scales_times_any_step_are_numbers_of_fp16() -> None:
    scale = numerics.stored_scale(torch.rand(10_000) * torch.logspace(-6, 3, 10_000), torch.float16, coarse=True)
    steps = torch.arange(16.0)
    products = scale[:, None] * steps
    assert torch.equal(products.half().float(), products)
    plain = numerics.stored_scale(torch.rand(10_000), torch.float16)[:, None] * steps
    assert not torch.equal(plain.half().float(), plain)


def test_names_are_those_of_the_gguf_package() -> None:
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for each in architectures.ARCHITECTURES:
        names = gguf.get_tensor_name_map(numbers[each.name], 3)
        for ours, theirs in each.blocks.items():
            assert names.get_name(f"model.layers.2.{theirs}.weight", (".weight",)) == f"blk.2.{ours}.weight"
        assert architectures.gguf_name(each, "lm_head.weight") == "output.weight"
    assert {name: (name_, *sizes) for name, (name_, *sizes) in header.TYPES.items()}.items() <= {
        int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()
    }.items()


@pytest.mark.parametrize("name", DECODERS)
def test_llama_cpp_computes_what_torch_does(models: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("xllamacpp")
    output = write(models(name), tmp_path / f"{name}.gguf", scheme="int8")
    answer = llama_cpp.run({"file": str(output), "folder": str(models(name)), "threads": 1})
    assert answer["unequal"] == 0
    assert answer["kl_nats"] < 0.01


def test_a_wrong_order_of_rows_is_found(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(architectures, "stored_rows", lambda values, order: values)
    monkeypatch.setattr(architectures, "original_rows", lambda values, order: values)
    output = write(models("llama"), tmp_path / "wrong.gguf", scheme="int8")
    answer = llama_cpp.run({"file": str(output), "folder": str(models("llama")), "threads": 1})
    assert answer["kl_nats"] > 10 * llama_cpp.MAX_KL_NATS
    with pytest.raises(InputError, match="computes something else than torch"):
        llama_cpp._refuse(answer, llama_cpp.MAX_KL_NATS)


@pytest.mark.parametrize("wishes", [{"scheme": "int4", "group_size": 32}, {"scheme": "int8"}, {"scheme": "fp16"}])
def test_what_is_written_is_read_back(models: Any, tmp_path: Path, wishes: dict[str, Any]) -> None:
    folder = models("llama")
    output = write(folder, tmp_path / "out.gguf", **wishes)
    assert not list(tmp_path.glob(".*")) and list(tmp_path.iterdir()) == [output]
    checkpoint = open_gguf(output)
    assert checkpoint.manifest.scheme == wishes["scheme"]
    assert checkpoint.manifest.verified and checkpoint.manifest.verified["runtime"]["run"] == "none"
    write_again = write(output, tmp_path / "again.gguf", scheme="bf16") if wishes["scheme"] == "fp16" else None
    original = load_file(folder / "model.safetensors")
    quantized = open_quantized(checkpoint, as_values=True)
    if wishes["scheme"] == "fp16":
        assert write_again and not quantized.weights
        names = [info.name for info in checkpoint.infos()]
        assert all(
            torch.equal(checkpoint.load(name).float(), original[name].half().float())
            for name in names
            if original[name].ndim == 2
        )
    else:
        for name in quantized.weights:
            values = numerics.decoded(quantized.tensor(name))
            error = (values - original[name]).norm() / original[name].norm()
            assert error < (0.12 if "layers" in name and wishes["scheme"] == "int4" else 0.01), name


def test_codes_go_from_container_to_container(models: Any, tmp_path: Path) -> None:
    """compressed-tensors to GGUF and GGUF to gptq hold the same codes, also with larger groups and zero points."""
    folder = models("llama")
    first, second, third = tmp_path / "ct", tmp_path / "b.gguf", tmp_path / "c"
    quantcli.convert(folder, first, scheme="int4", group_size=64, verify="codes")
    write(first, second)
    quantcli.convert(second, third, format="gptq", verify="codes")
    known = open_quantized(open_checkpoint(first))
    for path in (second, third):
        found = open_quantized(open_checkpoint(path), as_values=True)
        assert found.weights.keys() == known.weights.keys()
        for name in known.weights:
            assert torch.equal(found.tensor(name).codes, known.tensor(name).codes)
            assert torch.equal(numerics.decoded(found.tensor(name)), numerics.decoded(known.tensor(name)))


def test_codes_that_the_new_container_has_not_become_values(models: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "a.gguf", tmp_path / "b"
    write(models("llama"), source, scheme="int4", group_size=32)
    quantcli.convert(source, output, format="compressed-tensors", verify="codes")
    known, found = open_quantized(open_gguf(source), as_values=True), open_checkpoint(output)
    name = "model.embed_tokens.weight"
    assert name in known.weights and name not in open_quantized(found).weights
    assert torch.equal(found.load(name), numerics.decoded(known.tensor(name)))
    assert len(open_quantized(found).weights) == len(known.weights) - 1


def test_zero_points_are_kept(models: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    weights = {"dtype": "int4", "granularity": "group", "group_size": 32, "symmetric": False}
    recipe.write_text(json.dumps({"scheme": {"weights": weights}}))
    output = write(models("qwen2"), tmp_path / "out.gguf", recipe=recipe)
    checkpoint = open_gguf(output)
    assert checkpoint.types["Q4_1"] == 14
    found = open_quantized(checkpoint, as_values=True).tensor("model.layers.0.mlp.up_proj.weight")
    assert found.zero_point is not None and found.zero_point.unique().numel() > 3


def test_the_manifest_is_there_and_the_target_implies_the_format(models: Any, tmp_path: Path) -> None:
    report = quantcli.convert(models("llama"), tmp_path / "a.gguf", scheme="int8", target="llama.cpp", verify="codes")
    assert report.models[1].format == "gguf"
    assert report.models[1].size_bytes == (tmp_path / "a.gguf").stat().st_size
    assert "not checked by llama.cpp: --verify codes" in report.details["verified"]["runtime"]["summary"]
    report = quantcli.convert(models("llama"), tmp_path / "b.gguf", scheme="int8", dry_run=True)
    assert report.models[1].format == "gguf" and not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("wishes", "error", "said"),
    [
        ({"scheme": "int4", "group_size": 16}, UsageError, "a scale for every 32 values"),
        ({"scheme": "nf4"}, UsageError, "not nf4"),
        ({"scheme": "int8-dynamic"}, UsageError, "keeps inputs"),
        ({"scheme": "int8", "target": "vllm"}, UsageError, "gguf is for llama.cpp"),
    ],
)
def test_what_cannot_be_held_is_refused(
    models: Any, tmp_path: Path, wishes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        write(models("llama"), tmp_path / "out.gguf", **wishes)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "GGUF is written for"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "longrope"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    models: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in models("llama").iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        write(folder, tmp_path / "out.gguf", scheme="int8")


def test_a_tokenizer_that_has_no_name_is_refused(models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in models("llama").iterdir():
        (folder / path.name).symlink_to(path)
    told = json.loads((folder / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="no name for among those known here"):
        write(folder, tmp_path / "out.gguf", scheme="int8")
