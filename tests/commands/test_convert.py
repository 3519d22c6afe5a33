"""Conversion: what is written loads, means what was meant, and is the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.artifacts import (
    CHECKPOINT_SCHEMES,
    bitsandbytes_rounds,
    config_of,
    contents,
    decoded,
    loaded,
    logits,
    quantize_inputs,
    reference,
    tensors_of,
)
from torch import Tensor

from quantcli import convert
from quantcli.checkpoint.positional import PositionalFile
from quantcli.cli.app import main
from quantcli.core import compiled
from quantcli.errors import UsageError, VerificationError
from quantcli.planning.recipe import Recipe, validate

INT8_TENSOR = {"scheme": {"weights": {"dtype": "int8"}}}
ASYMMETRIC = {"weights": {"dtype": "int4", "granularity": "group", "group_size": 32, "symmetric": False}}
MIXED = {
    "scheme": "int4",
    "rules": [
        {"match": "*.down_proj", "scheme": "int8"},
        {"match": "*.0.self_attn.*", "skip": True},
        {"match": "*.1.mlp.up_proj", "group_size": 32},
        {"match": "lm_head", "scheme": "int8-dynamic"},
    ],
}

pytestmark = pytest.mark.usefixtures("no_runtime_check")


# What is written loads, and computes what its codes say.


def tolerance(scheme: str) -> float:
    """What outputs may differ by, in relation to their spread, where they are computed in another order."""
    if scheme == "int8-dynamic":
        return 0.02  # the rounding of inputs
    # bitsandbytes orders its sums in another way; all else is the same.
    return (0.05 if bitsandbytes_rounds() else 0.02) if scheme.startswith("nf4") else 0.0


@pytest.mark.parametrize("scheme", CHECKPOINT_SCHEMES)
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_every_preset_loads_and_computes_what_its_codes_say(
    models: Path, tmp_path: Path, model: str, scheme: str
) -> None:
    convert(models / model, tmp_path / "out", scheme=scheme)
    wanted = reference(tmp_path / "out", model, tmp_path / "plain")
    if scheme == "int8-dynamic":
        wanted = quantize_inputs(wanted, tmp_path / "out")
    got = logits(loaded(tmp_path / "out", model))
    torch.testing.assert_close(got, logits(wanted), rtol=0, atol=tolerance(scheme) * float(got.std()))
    original = logits(loaded(models / model, model))
    error = float((got - original).norm() / original.norm())
    assert 0 < error < {"fp16": 0.002, "bf16": 0.01, "int8": 0.02, "int8-dynamic": 0.04}.get(scheme, 0.3)


@pytest.mark.parametrize(("model", "scheme"), [("tied", "int8"), ("tied", "nf4"), ("gpt2", "nf4"), ("gpt2", "bf16")])
def test_tied_and_transposed_weights_load(models: Path, tmp_path: Path, model: str, scheme: str) -> None:
    convert(models / model, tmp_path / "out", scheme=scheme)
    got = logits(loaded(tmp_path / "out", model))
    wanted = logits(reference(tmp_path / "out", model, tmp_path / "plain"))
    torch.testing.assert_close(got, wanted, rtol=0, atol=max(0.02, tolerance(scheme)) * float(got.std()))
    original = logits(loaded(models / model, model))
    assert float((got - original).norm() / original.norm()) < 0.3


@pytest.mark.parametrize("recipe", [MIXED, INT8_TENSOR], ids=["mixed", "int8 per tensor"])
def test_recipes_load(models: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    convert(models / "llama", tmp_path / "out", recipe=validate(recipe, "recipe"), skip=["lm_head"])
    got = logits(loaded(tmp_path / "out", "llama"))
    assert torch.equal(got, logits(reference(tmp_path / "out", "llama", tmp_path / "plain")))


def test_a_mixed_recipe_is_declared_layer_by_layer(models: Path, tmp_path: Path) -> None:
    convert(models / "llama", tmp_path / "out", recipe=validate(MIXED, "recipe"))
    tensors = tensors_of(tmp_path / "out")
    layer = "model.layers.{}.{}.weight{}".format
    assert tensors[layer(0, "self_attn.q_proj", "")].dtype == torch.bfloat16
    assert tensors[layer(0, "mlp.up_proj", "_packed")].shape == (192, 128 // 8)
    assert tensors[layer(0, "mlp.down_proj", "_packed")].shape == (128, 192 // 4)
    assert tensors[layer(1, "mlp.up_proj", "_scale")].shape == (192, 128 // 32)
    assert tensors["lm_head.weight"].dtype == torch.int8
    config = config_of(tmp_path / "out")["quantization_config"]
    assert (config["format"], len(config["config_groups"])) == ("mixed-precision", 4)
    assert logits(loaded(tmp_path / "out", "llama")).isfinite().all()


def test_an_asymmetric_recipe_loads_dequantized(models: Path, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    report = convert(models / "llama", tmp_path / "out", recipe=validate({"scheme": ASYMMETRIC}, "recipe"))
    assert "dequantize=True" in report.warnings[-1]
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    got = logits(loaded(tmp_path / "out", "llama", **options))
    assert torch.equal(got, logits(reference(tmp_path / "out", "llama", tmp_path / "plain")))


@pytest.mark.slow
def test_transformers_is_asked_whether_it_would_load_the_result(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for model, scheme in (("llama", "int4"), ("gpt2", "nf4")):
        report = convert(models / model, tmp_path / model, scheme=scheme)
        assert report.details["verified"]["runtime"]["checked"] is True


# What the report and the manifest say.


def power(values: Tensor) -> float:
    return float(values.double().square().sum())


@pytest.mark.parametrize("recipe", [*CHECKPOINT_SCHEMES, INT8_TENSOR, {"scheme": ASYMMETRIC}], ids=str)
def test_sqnr_is_that_of_the_decoded_weights(models: Path, tmp_path: Path, recipe: str | dict[str, Any]) -> None:
    wish = {"scheme": recipe} if isinstance(recipe, str) else recipe
    report = convert(models / "bert", tmp_path / "out", recipe=validate(wish, "recipe"), rest="keep")
    before, after = tensors_of(models / "bert"), decoded(tmp_path / "out")
    quantized = [row for row in report.layers if row.scheme]
    assert len(quantized) >= 13
    for row in quantized:
        noise = power(after[row.name].double() - before[row.name].double())
        expected = 10 * torch.tensor(power(before[row.name]) / noise).log10().item() if noise else None
        assert row.sqnr_db == pytest.approx(expected, abs=2e-3), row.name


def test_the_report_keeps_its_contract(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(models / "llama"), tmp_path / "out"
    assert main(["convert", model, "-o", str(out), "--scheme", "int4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [report[key] for key in ("schema_version", "command", "gates")] == [1, "convert", []]
    source, artifact = report["models"]
    for row in (source, artifact):
        assert row.keys() >= {"path", "sha256", "role", "format", "scheme", "size_bytes", "metrics"}
    assert (source["path"], source["role"]) == (model, "reference")
    assert (source["format"], source["scheme"]) == ("safetensors", "fp32")
    for row, folder in ((source, models / "llama"), (artifact, out)):
        assert row["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (artifact["path"], artifact["role"]) == (str(out), "candidate")
    assert (artifact["format"], artifact["scheme"]) == ("compressed-tensors", "int4")
    assert source["size_bytes"] == (models / "llama" / "model.safetensors").stat().st_size
    assert artifact["size_bytes"] == (out / "model.safetensors").stat().st_size
    assert artifact["metrics"]["size_ratio"] == pytest.approx(artifact["size_bytes"] / source["size_bytes"])
    rows = report["layers"]
    assert all(row.keys() >= {"name", "scheme", "sqnr_db", "bytes_before", "bytes_after"} for row in rows)
    assert [row["name"] for row in rows] == list(tensors_of(models / "llama"))
    assert sum(row["bytes_before"] for row in rows) == sum(t.nbytes for t in tensors_of(models / "llama").values())
    assert sum(row["bytes_after"] for row in rows) == sum(t.nbytes for t in tensors_of(out).values())
    assert artifact["metrics"]["sqnr_db_min"] == min(row["sqnr_db"] for row in rows if row["sqnr_db"])
    assert all((row["scheme"] is None) == bool(row["reason"]) for row in rows)
    assert any(row["reason"].endswith("cast F32 to BF16") for row in rows if row["reason"])


def test_config_and_companions(models: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(models / "llama", source)
    carried = ["tokenizer.json", "merges.txt", "LICENSE", "1_Pooling/config.json", "chat_template.jinja"]
    stray = ["optimizer.pt", ".cache/x.json", "model.onnx", "quantcli.json"]
    for name in (*carried, *stray):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f'{{"is": "{name}"}}')
    convert(source, out, scheme="int8")
    written = contents(out)
    assert written.keys() == {*carried, "config.json", "generation_config.json", "model.safetensors", "quantcli.json"}
    assert all(written[name] == (source / name).read_bytes() for name in (*carried, "generation_config.json"))
    assert b"optimizer" not in written["quantcli.json"] and json.loads(written["quantcli.json"])["scheme"] == "int8"
    before, after = config_of(source), config_of(out)
    section = after.pop("quantization_config")
    assert after == before | {"dtype": "bfloat16"}
    assert (section["quant_method"], section["format"]) == ("compressed-tensors", "pack-quantized")


@pytest.mark.parametrize(
    ("scheme", "rest", "dtype"),
    [("fp16", None, "float16"), ("bf16", "keep", "bfloat16"), ("int8", "keep", "float32"), ("nf4", "fp16", "float16")],
)
def test_config_declares_the_dtype(models: Path, tmp_path: Path, scheme: str, rest: str | None, dtype: str) -> None:
    convert(models / "tied", tmp_path / "out", scheme=scheme, rest=rest)
    config = config_of(tmp_path / "out")
    assert config["dtype"] == dtype
    assert ("quantization_config" in config) == (scheme in ("int8", "nf4"))
    if scheme == "nf4":
        assert config["quantization_config"]["bnb_4bit_compute_dtype"] == dtype


def test_the_manifest(models: Path, tmp_path: Path) -> None:
    report = convert(models / "llama", tmp_path / "out", scheme="int4", skip=["*.q_proj"])
    manifest = json.loads((tmp_path / "out" / "quantcli.json").read_text())
    assert manifest.keys() == {
        "quantcli", "input_sha256", "format", "scheme", "algorithm", "recipe", "reproducible", "layers", "verified"
    }  # fmt: skip
    digest = subprocess.run(["sha256sum", models / "llama" / "model.safetensors"], capture_output=True, check=True)
    assert manifest["input_sha256"] == digest.stdout.decode().split()[0] == report.models[0].sha256
    assert Recipe.model_validate(manifest["recipe"]) == Recipe(scheme="int4", skip=["*.q_proj"])
    errors = {row.name: row.sqnr_db for row in report.layers if row.scheme}
    stated = {name: entry["sqnr_db"] for name, entry in manifest["layers"].items() if "scheme" in entry}
    assert stated == pytest.approx(errors, abs=1e-4)
    assert manifest["layers"]["model.layers.0.self_attn.q_proj.weight"]["reason"] == "skipped as asked"
    assert manifest["verified"]["codes"] == "equal"
    assert manifest["verified"]["tensors"] == len(report.layers)
    assert manifest["reproducible"] == {"mse": "everywhere"}


# The same work gives the same bytes.


def test_neither_place_nor_time_is_in_the_output(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "elsewhere" / "copy")
    os.utime(tmp_path / "elsewhere" / "copy" / "model.safetensors", (0, 0))
    convert(models / "llama", tmp_path / "first", scheme="int4")
    convert(tmp_path / "elsewhere" / "copy", tmp_path / "elsewhere" / "second", scheme="int4")
    assert contents(tmp_path / "first") == contents(tmp_path / "elsewhere" / "second")


@pytest.mark.parametrize(
    ("model", "scheme"),
    [("llama", "int4"), ("llama", "int8-dynamic"), ("bert", "nf4"), ("gpt2", "nf4-double"), ("bert", "fp16")],
)
def test_threads_and_slabs_do_not_show(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, scheme: str
) -> None:
    convert(models / model, tmp_path / "whole", scheme=scheme, threads=1)
    monkeypatch.setattr("quantcli.conversion.checkpoint.writer.SLAB_ELEMENTS", 5000)
    monkeypatch.setattr("quantcli.conversion.checkpoint.writer.CHUNK_ELEMENTS", 1500)
    for threads in (1, 3):
        convert(models / model, tmp_path / str(threads), scheme=scheme, threads=threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert contents(tmp_path / "1") == contents(tmp_path / "whole")


def test_slabs_cut_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Columns that only smaller blocks than 64 divide, and rows that no slab below holds whole.
    odd = {"a.weight": torch.randn(192, 16), "b.weight": torch.randn(96, 96), "c.weight": torch.randn(64, 48)}
    save_file(odd, tmp_path / "odd.safetensors")
    convert(tmp_path / "odd.safetensors", tmp_path / "whole", scheme="nf4")
    monkeypatch.setattr("quantcli.conversion.checkpoint.writer.SLAB_ELEMENTS", 700)
    monkeypatch.setattr("quantcli.conversion.checkpoint.writer.CHUNK_ELEMENTS", 330)
    convert(tmp_path / "odd.safetensors", tmp_path / "slabs", scheme="nf4")
    assert contents(tmp_path / "slabs") == contents(tmp_path / "whole")


def sharded(models: Path, folder: Path, name: str = "llama") -> Path:
    """The same model in files of about 200 kB."""
    loaded(models / name, name).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_the_number_of_input_shards_does_not_show(models: Path, tmp_path: Path) -> None:
    sharded(models, tmp_path / "sharded")
    convert(models / "llama", tmp_path / "one", scheme="int4")
    convert(tmp_path / "sharded", tmp_path / "many", scheme="int4")
    convert(tmp_path / "sharded" / "model.safetensors.index.json", tmp_path / "index", scheme="int4")
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert one["model.safetensors"] == many["model.safetensors"]
    assert many == contents(tmp_path / "index")
    first, second = (json.loads(each["quantcli.json"]) for each in (one, many))
    assert first.pop("input_sha256") != second.pop("input_sha256")
    assert first == second


def test_output_shards(models: Path, tmp_path: Path) -> None:
    limit = 60_000
    convert(models / "llama", tmp_path / "one", scheme="int8")
    convert(models / "llama", tmp_path / "many", recipe=Recipe(scheme="int8", max_shard_size=limit))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] and len(files) > 4
    parts = {name: load_file(tmp_path / "many" / name) for name in files}
    assert {tensor: name for name, part in parts.items() for tensor in part} == index["weight_map"]
    sizes = {name: sum(tensor.nbytes for tensor in part.values()) for name, part in parts.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) and max(sizes.values()) <= limit
    whole, split = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert whole.keys() == split.keys() and all(torch.equal(whole[name], split[name]) for name in whole)
    assert torch.equal(logits(loaded(tmp_path / "many", "llama")), logits(loaded(tmp_path / "one", "llama")))


# Single files and torch files.


def test_one_file_becomes_one_file(models: Path, tmp_path: Path) -> None:
    source, out = models / "bert" / "model.safetensors", tmp_path / "small.safetensors"
    report = convert(source, out, scheme="int4")
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]
    assert report.models[1].size_bytes == out.stat().st_size
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["quantcli"])
    assert (metadata["format"], manifest["scheme"], manifest["format"]) == ("pt", "int4", "compressed-tensors")
    assert len(manifest["layers"]) == len(report.layers)
    convert(models / "bert", tmp_path / "folder", scheme="int4")
    same, wanted = load_file(out), tensors_of(tmp_path / "folder")
    assert same.keys() == wanted.keys() and all(torch.equal(same[name], wanted[name]) for name in same)


def test_one_file_may_become_a_folder(models: Path, tmp_path: Path) -> None:
    convert(models / "bert" / "model.safetensors", tmp_path / "out", scheme="int8")
    assert sorted(contents(tmp_path / "out")) == ["model.safetensors", "quantcli.json"]


def test_a_torch_file_gives_the_same_weights(models: Path, tmp_path: Path) -> None:
    torch.save(tensors_of(models / "bert"), tmp_path / "pytorch_model.bin")
    convert(tmp_path / "pytorch_model.bin", tmp_path / "torch.safetensors", scheme="int4")
    convert(models / "bert" / "model.safetensors", tmp_path / "plain.safetensors", scheme="int4")
    got, wanted = load_file(tmp_path / "torch.safetensors"), load_file(tmp_path / "plain.safetensors")
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)


@pytest.mark.parametrize("scheme", ["fp16", "int4", "nf4"])
def test_odd_tensors_of_a_torch_file(tmp_path: Path, scheme: str) -> None:
    base = torch.randn(256, 256)
    odd = {
        "transposed.weight": base.T,
        "sliced.weight": base[64:, ::2],
        "expanded.weight": torch.randn(1, 128).expand(64, 128),
        "empty.weight": torch.empty(0, 128),
        "scalar": torch.tensor(0.5),
        "long": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "double": torch.linspace(-1, 1, 7, dtype=torch.float64),
    }
    torch.save(odd, tmp_path / "odd.pt")
    convert(tmp_path / "odd.pt", tmp_path / "odd.safetensors", scheme=scheme, rest="fp16")
    # The same tensors, laid out plainly: the codes must not depend on strides.
    save_file({name: part.contiguous() for name, part in odd.items()}, tmp_path / "plain_in.safetensors")
    convert(tmp_path / "plain_in.safetensors", tmp_path / "plain.safetensors", scheme=scheme, rest="fp16")
    got, wanted = load_file(tmp_path / "odd.safetensors"), load_file(tmp_path / "plain.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) and got[name].dtype == wanted[name].dtype for name in got)
    for name in ("long", "flags", "empty.weight"):
        assert torch.equal(got[name], odd[name]) and got[name].dtype == odd[name].dtype
    for name in ("scalar", "double"):
        assert torch.equal(got[name], odd[name].half())
    if scheme == "fp16":
        assert torch.equal(got["sliced.weight"], odd["sliced.weight"].half())


def test_tied_weights_of_a_torch_folder_are_stored_once_and_load(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(models / "tied", source, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(loaded(models / "tied", "tied").state_dict(), source / "pytorch_model.bin")
    convert(source, tmp_path / "out", scheme="int8")
    convert(models / "tied", tmp_path / "wanted", scheme="int8")
    got, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wanted")
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)
    assert not list((tmp_path / "out").glob("*.bin"))


# The output's place.


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_progress_rises_to_the_total(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr("quantcli.conversion.checkpoint.writer.SLAB_ELEMENTS", 5000)
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    convert(models / model, tmp_path / "out", scheme="nf4", threads=3, progress=progress)
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {done[-1]} == {sum(tensor.nbytes for tensor in tensors_of(models / model).values())}
    assert list(done) == sorted(done) and len(done) > 20


def test_dry_run_writes_nothing(models: Path, tmp_path: Path) -> None:
    planned = convert(models / "llama", tmp_path / "out", scheme="int4", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = convert(models / "llama", tmp_path / "out", scheme="int4")
    assert planned.models[1].size_bytes == done.models[1].size_bytes
    assert [(row.name, row.scheme, row.bytes_after) for row in planned.layers] == [
        (row.name, row.scheme, row.bytes_after) for row in done.layers
    ]
    assert all(row.sqnr_db is None for row in planned.layers)


@pytest.mark.parametrize(("model", "output"), [("bert", "out"), ("bert/model.safetensors", "out.safetensors")])
def test_an_existing_output_is_replaced_only_by_force(models: Path, tmp_path: Path, model: str, output: str) -> None:
    out = tmp_path / output
    convert(models / model, out, scheme="int8")
    if out.is_dir():
        (out / "stray").touch()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"exists. Use --force"):
        convert(models / model, out, scheme="int4")
    assert contents(tmp_path) == before
    convert(models / model, out, scheme="int4", force=True)
    convert(models / model, tmp_path / "wanted" / output, scheme="int4")
    wanted = contents(tmp_path / "wanted")
    shutil.rmtree(tmp_path / "wanted")
    assert contents(tmp_path) == wanted


def test_an_output_that_overlaps_the_input_is_refused(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "a" / "model"
    sharded(models, source)
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(source)
    index = source / "model.safetensors.index.json"
    shard = source / "model-00001-of-00006.safetensors"
    pairs = [(source, source), (source, source / "out"), (source, tmp_path / "a"), (source, tmp_path / "link" / "out")]
    for given, out in [*pairs, (index, source), (index, source / "out"), (shard, source), (shard, shard)]:
        with pytest.raises(UsageError, match="overlap"):
            convert(given, out, scheme="int8", force=True)
    assert contents(tmp_path) == before


def test_a_folder_cannot_become_a_file(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names a file"):
        convert(models / "bert", tmp_path / "out.safetensors", scheme="int8")


def test_too_little_memory_is_refused_with_the_figure(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--max-memory 200 MB is too little: \S+ needs 3\d\d MB in all"):
        convert(models / "llama", tmp_path / "out", scheme="int8", max_memory=200_000_000)
    assert list(tmp_path.iterdir()) == []


def test_threads_are_given_up_for_memory(models: Path, tmp_path: Path) -> None:
    roomy = convert(models / "llama", tmp_path / "a", scheme="int8", threads=64, max_memory=10**9)
    tight = convert(models / "llama", tmp_path / "b", scheme="int8", threads=64, max_memory=317_000_000)
    assert roomy.details["threads"] == 64 and 1 <= tight.details["threads"] < 10
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_compiled_loops_are_used_where_they_pay_and_there_is_room(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba", reason="the extra 'fast' is not installed")
    used: list[str] = []
    monkeypatch.setattr(compiled, "use", lambda: used.append("loops"))

    def loops(name: str, **options: Any) -> bool:
        used.clear()
        convert(models / "llama", tmp_path / name, threads=1, verify="codes", **options)
        return bool(used)

    assert not loops("few", scheme="nf4")
    monkeypatch.setattr(compiled, "WORTHWHILE_NF4", 1)
    assert loops("many", scheme="nf4") and loops("roomy", scheme="nf4", max_memory=10**9)
    assert not loops("tight", scheme="nf4", max_memory=420_000_000)
    assert not loops("integers", scheme="int4", group_size=32)


def test_file_modes_follow_the_umask(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(models / "bert", source)
    (source / "sub").mkdir()
    for name in ("config.json", "sub/extra.json"):  # no model type: no check by transformers
        (source / name).write_text("{}")
        (source / name).chmod(0o600)
    command = [sys.executable, "-m", "quantcli", "convert", source, "-o", tmp_path / "out", "--scheme", "int8"]
    subprocess.run(command, check=True, capture_output=True, umask=0o027)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert len(modes) == 6


# Verification.


@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic", "nf4-double", "bf16"])
def test_a_flipped_bit_is_noticed(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    write, clean = PositionalFile.write, iter(range(0))

    def flip(self: PositionalFile, offset: int, data: bytes | memoryview) -> None:
        changed = bytearray(data)
        if next(clean, None) is None and changed:
            changed[len(changed) // 2] ^= 1
            monkeypatch.setattr(PositionalFile, "write", write)
        write(self, offset, changed)

    for nth in range(1, 12):  # the first write is the header
        clean = iter(range(nth))
        monkeypatch.setattr(PositionalFile, "write", flip)
        with pytest.raises(VerificationError):
            convert(models / "bert", tmp_path / "out", scheme=scheme, threads=1)
        assert list(tmp_path.iterdir()) == []


def test_peak_memory_is_that_of_this_process_alone(models: Path, tmp_path: Path) -> None:
    ballast = torch.ones(1 << 28)  # 1 GiB, which a child process must not be charged with
    command = [sys.executable, "-m", "quantcli", "convert", str(models / "llama"), "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "-s", "int8", "--target", "vllm", "--json"], capture_output=True, check=True)
    assert 50e6 < json.loads(done.stdout)["peak_rss_bytes"] < ballast.nbytes / 2
