"""Container changes: equal codes, zero points and scales by independent readers; decoding; refusals; running."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.artifacts import codes_of, config_of, contents, decoded, loaded, logits, reference, tensors_of
from support.quantized_models import KINDS, Artifacts, changed, groups
from torch import Tensor

import quantcli
from quantcli import convert
from quantcli.checkpoint.quantized import QuantizedCheckpoint
from quantcli.cli.app import main
from quantcli.errors import InputError, QuantcliError, UsageError
from quantcli.models import hugging_face
from quantcli.planning.recipe import validate

pytestmark = pytest.mark.usefixtures("no_runtime_check")

NAME = "model.layers.1.mlp.down_proj.weight"


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quantcli.json").read_text())
    return found


def require_equal_codes(one: Path, other: Path) -> None:
    ours, theirs = codes_of(one), codes_of(other)
    assert ours.keys() == theirs.keys() and ours
    for module, parts in ours.items():
        for mine, other_part in zip(parts, theirs[module], strict=True):
            assert torch.equal(mine, other_part), module


# Equal codes.


PAIRS = [
    (source, target)
    for source in ("int4", "int4 asymmetric", "gptq", "gptq asymmetric", "awq", "awq asymmetric")
    for target in ("compressed-tensors", "gptq", "awq")
    if not source.startswith({"compressed-tensors": "int4"}.get(target, target))
]


@pytest.mark.parametrize("model", ["llama", "tied", "bert"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_pair_of_containers(artifact: Artifacts, tmp_path: Path, model: str, source: str, target: str) -> None:
    before, after = artifact(source, model), tmp_path / "after"
    report = convert(before, after, format=target)
    assert config_of(after)["quantization_config"]["quant_method"] == target == report.models[1].format
    require_equal_codes(before, after)
    ours, theirs = decoded(after), decoded(before)
    assert ours.keys() == theirs.keys()
    coded = {f"{module}.weight" for module in codes_of(before)}
    assert all(torch.equal(ours[name], part) for name, part in theirs.items() if name not in coded)
    assert {row.name for row in report.layers if row.scheme} == coded
    convert(after, tmp_path / "back", format=config_of(before)["quantization_config"]["quant_method"])
    require_equal_files(before, tmp_path / "back")


def require_equal_files(one: Path, other: Path) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, part in ours.items():
        assert part.dtype == theirs[name].dtype and torch.equal(part, theirs[name]), name
    assert config_of(one) == config_of(other)


@pytest.mark.parametrize(("source", "target"), [("int8", "gptq"), ("int8 asymmetric", "gptq"), ("gptq int8", "int8")])
def test_eight_bits(artifact: Artifacts, tmp_path: Path, source: str, target: str) -> None:
    convert(artifact(source), tmp_path / "after", format="compressed-tensors" if target == "int8" else target)
    require_equal_codes(artifact(source), tmp_path / "after")


def test_schemes_side_by_side(models: Path, tmp_path: Path) -> None:
    rules = [{"match": "*.down_proj", "scheme": "int8"}, {"match": "*.0.self_attn.*", "skip": True}]
    convert(models / "llama", tmp_path / "mixed", recipe=validate({"scheme": groups("int4", 32), "rules": rules}, "r"))
    convert(tmp_path / "mixed", tmp_path / "gptq", format="gptq")
    section = config_of(tmp_path / "gptq")["quantization_config"]
    assert (section["bits"], section["group_size"]) == (4, 32)
    assert {"bits": 8, "group_size": -1, "sym": True} in section["dynamic"].values()
    require_equal_codes(tmp_path / "mixed", tmp_path / "gptq")
    convert(tmp_path / "gptq", tmp_path / "back", format="compressed-tensors")
    require_equal_files(tmp_path / "mixed", tmp_path / "back")


def test_a_group_as_long_as_a_row_stays_a_group(models: Path, tmp_path: Path) -> None:
    recipe = validate({"scheme": groups("int4", 128), "skip": ["*.down_proj"]}, "recipe")
    convert(models / "llama", tmp_path / "ct", recipe=recipe)
    for number, name in enumerate(("gptq", "awq", "compressed-tensors")):
        convert(tmp_path / ("ct" if number == 0 else str(number - 1)), tmp_path / str(number), format=name)
    require_equal_files(tmp_path / "ct", tmp_path / "2")


def test_scales_in_sixteen_bits_of_another_kind_are_exact(artifact: Artifacts, tmp_path: Path) -> None:
    before = tensors_of(artifact("int4"))[f"{NAME}_scale"]
    assert before.dtype == torch.bfloat16
    convert(artifact("int4"), tmp_path / "gptq", format="gptq")
    after = tensors_of(tmp_path / "gptq")[NAME.replace("weight", "scales")]
    assert after.dtype == torch.float16 and torch.equal(after.T.double(), before.double())


def test_a_single_file(artifact: Artifacts, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    shutil.copyfile(artifact("int4") / "model.safetensors", source)
    convert(source, tmp_path / "gptq.safetensors", format="gptq")
    convert(tmp_path / "gptq.safetensors", tmp_path / "back.safetensors", format="compressed-tensors")
    ours, theirs = load_file(source), load_file(tmp_path / "back.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(part, theirs[name]) for name, part in ours.items())


def test_a_torch_file_with_a_tied_head_stores_it_once(artifact: Artifacts, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(artifact("int4", "tied"), source)
    tensors = tensors_of(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, source / "pytorch_model.bin")
    convert(source, tmp_path / "gptq", format="gptq")
    assert "lm_head.weight" not in tensors_of(tmp_path / "gptq")
    require_equal_codes(artifact("int4", "tied"), tmp_path / "gptq")


def test_shards(artifact: Artifacts, tmp_path: Path) -> None:
    convert(
        artifact("int4"), tmp_path / "gptq", recipe=validate({"format": "gptq", "max_shard_size": "60KB"}, "recipe")
    )
    assert len(list((tmp_path / "gptq").glob("*.safetensors"))) > 2
    require_equal_codes(artifact("int4"), tmp_path / "gptq")
    convert(tmp_path / "gptq", tmp_path / "back", format="compressed-tensors")
    require_equal_files(artifact("int4"), tmp_path / "back")


def test_the_manifest_says_where_codes_come_from(artifact: Artifacts, models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(artifact("int4"), source)
    known = {"calibration": {"samples": 3}, "calibration_fingerprint": {"kind": "tokens", "hashes": ""}}
    (source / "quantcli.json").write_text(json.dumps(manifest(source) | known))
    (source / "quantize_config.json").write_text("{}")
    convert(source, tmp_path / "gptq", format="gptq")
    found = manifest(tmp_path / "gptq")
    before = manifest(source)
    assert found["source"] == {"format": "compressed-tensors"} | {
        key: before[key] for key in ("quantcli", "input_sha256", "scheme", "algorithm")
    }
    assert (found["format"], found["scheme"], found["algorithm"]) == ("gptq", "int4", "mse")
    assert {key: found[key] for key in known} == known
    assert found["layers"][NAME] == {"scheme": "int4, group 32", "algorithm": "mse"}
    assert not (tmp_path / "gptq" / "quantize_config.json").exists()
    foreign = changed(artifact("int4"), tmp_path / "foreign")
    convert(foreign, tmp_path / "of foreign", format="gptq")
    assert manifest(tmp_path / "of foreign")["source"] == {"format": "compressed-tensors"}
    assert "algorithm" not in manifest(tmp_path / "of foreign")["layers"][NAME]


@pytest.mark.parametrize("wish", [{"format": "gptq"}, {"scheme": "bf16"}], ids=["gptq", "bf16"])
def test_equal_work_gives_equal_bytes_after_an_interruption_too(
    artifact: Artifacts, tmp_path: Path, wish: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(artifact("int4"), tmp_path / "wanted", threads=1, **wish)
    read: list[str] = []
    original = QuantizedCheckpoint.tensor
    monkeypatch.setattr(QuantizedCheckpoint, "tensor", lambda self, name: (read.append(name), original(self, name))[1])

    def stop(done: int, total: int) -> None:
        if done > 0.4 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(artifact("int4"), tmp_path / "out", threads=1, progress=stop, **wish)
    assert not (tmp_path / "out").exists() and 2 < len(read) < 13
    first = set(read)
    read.clear()
    with pytest.raises(UsageError, match="begun with another recipe"):
        convert(artifact("int4"), tmp_path / "out", format="awq")
    convert(artifact("int4"), tmp_path / "out", threads=2, **wish)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    # The last one may have been under way.
    assert len(first & set(read)) <= 1 and first | set(read) == {
        f"{module}.weight" for module in codes_of(artifact("int4"))
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wanted"]


def test_dry_run(artifact: Artifacts, tmp_path: Path) -> None:
    report = convert(artifact("int4"), tmp_path / "out", format="gptq", dry_run=True)
    assert not (tmp_path / "out").exists() and report.details["dry_run"]
    done = convert(artifact("int4"), tmp_path / "out", format="gptq")
    assert report.models[1].size_bytes == done.models[1].size_bytes


# Refusals.


def with_lowest_zero_point(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}_zero_point"][0, 0] &= ~15


def tiny_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}_scale"][0, 0] = 2.0**-30


def not_in_eights(tensors: dict[str, Tensor]) -> None:
    for part in ("packed", "scale"):
        tensors[f"{NAME}_{part}"] = tensors[f"{NAME}_{part}"][:100]
    tensors[f"{NAME}_shape"] = torch.tensor([100, 192])


@pytest.mark.parametrize(
    ("kind", "more", "change", "target", "reason"),
    [
        ("nf4", {}, None, "gptq", "gptq carries int4 and int8 weights, not nf4. The same holds for 13 more"),
        ("nf4", {}, None, "compressed-tensors", "carries int4 and int8 weights, not nf4"),
        ("int4", {}, None, "bitsandbytes", "bitsandbytes carries nf4 weights, not int4"),
        ("int8-dynamic", {}, None, "gptq", "gptq keeps inputs as they are"),
        ("int8", {}, None, "awq", "awq carries int4 weights, not int8"),
        ("int8 per tensor", {}, None, "gptq", "per channel or group, not per tensor"),
        ("int4", {"rest": "keep"}, None, "gptq", "its scales are F32, and not exact in F16"),
        ("int4", {}, tiny_scales, "gptq", "its scales are BF16, and not exact in F16"),
        ("int4 asymmetric", {}, with_lowest_zero_point, "gptq", "it has a zero point of 0, and gptq stores zero"),
        ("int4", {}, not_in_eights, "gptq", "100 x 192 does not divide"),
        ("int4", {}, not_in_eights, "awq", "100 does not divide"),
        ("int4", {"rules": [{"match": "lm_head", "scheme": "int8"}]}, None, "gptq", "lm_head.weight cannot go to gptq"),
        ("int4", {"rules": [{"match": "*.0.*", "group_size": 64}]}, None, "awq", "one group size for all"),
        ("gptq", {}, None, "gptq", "The model is stored as gptq already"),
        ("gptq", {}, None, "safetensors", "The format safetensors holds no codes. Use --scheme bf16"),
        ("gptq", {}, None, "ggml", "Unknown format 'ggml'"),
    ],
)
def test_what_a_container_cannot_hold_is_refused_by_name(
    artifact: Artifacts,
    tmp_path: Path,
    kind: str,
    more: dict[str, Any],
    change: Callable[[dict[str, Tensor]], None] | None,
    target: str,
    reason: str,
) -> None:
    source = artifact(kind, **more)
    if change:
        source = changed(source, tmp_path / "source", change)
    with pytest.raises(UsageError, match=reason):
        convert(source, tmp_path / "out", format=target)
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"] == []


def test_a_zero_point_of_zero_fits_awq(artifact: Artifacts, tmp_path: Path) -> None:
    source = changed(artifact("int4 asymmetric"), tmp_path / "source", with_lowest_zero_point)
    convert(source, tmp_path / "awq", format="awq")
    require_equal_codes(source, tmp_path / "awq")
    assert codes_of(tmp_path / "awq")[NAME.removesuffix(".weight")][1][0, 0] == 0


@pytest.mark.parametrize(
    ("wish", "error", "reason"),
    [
        ({"scheme": "int8"}, InputError, r"already quantized \(gptq\). Convert the original weights instead"),
        ({"scheme": "int4", "format": "awq"}, InputError, "already quantized"),
        ({}, InputError, "already quantized .* --format alone changes its container, and --scheme bf16 turns"),
        ({"format": "awq", "group_size": 64}, UsageError, "'group_size' would quantize it anew"),
        ({"format": "awq", "algorithm": "rtn"}, UsageError, "'algorithm' would"),
        ({"format": "awq", "rest": "fp16"}, UsageError, "'rest' would"),
        ({"format": "awq", "skip": ["*.q_proj"]}, UsageError, "'skip' would"),
        ({"format": "awq", "data": "text.txt"}, UsageError, "calibration data would quantize it anew"),
        ({"scheme": "bf16", "data": "text.txt"}, UsageError, "no calibration data"),
        ({"scheme": "bf16", "format": "awq"}, UsageError, "awq carries int4"),
        ({"scheme": "bf16", "group_size": 64}, UsageError, "--group-size does not apply to bf16"),
    ],
)
def test_wishes_that_would_quantize_anew(
    artifact: Artifacts, tmp_path: Path, wish: dict[str, Any], error: type[QuantcliError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        convert(artifact("gptq"), tmp_path / "out", **wish)
    assert not list(tmp_path.iterdir())


def test_damage_is_found_before_anything_is_written(artifact: Artifacts, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[NAME.replace("weight", "scales")][2, 2] = float("nan")

    source = changed(artifact("gptq"), tmp_path / "source", spoil)
    for wish in ({"format": "awq"}, {"scheme": "fp16"}):
        with pytest.raises(InputError, match=f"The scales of {NAME} in .* are not finite"):
            convert(source, tmp_path / "out", **wish)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_statuses(artifact: Artifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(artifact("nf4")), "-o", str(tmp_path / "o"), "--format", "gptq"]) == 2
    assert main(["convert", str(artifact("gptq")), "-o", str(tmp_path / "o"), "--scheme", "int8"]) == 3
    capsys.readouterr()
    assert main(["convert", str(artifact("gptq")), "-o", str(tmp_path / "o"), "--format", "awq"]) == 0
    assert "not quantized before either" in capsys.readouterr().out


# Back to values.


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_become_values_again(artifact: Artifacts, tmp_path: Path, kind: str, scheme: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[scheme]
    source = artifact(kind, rest="keep")
    convert(source, tmp_path / "plain", scheme=scheme)
    found, wanted = tensors_of(tmp_path / "plain"), decoded(source)
    assert found.keys() == wanted.keys()
    for name, part in wanted.items():
        assert found[name].dtype == dtype and torch.equal(found[name], part.to(dtype)), name
    config = config_of(tmp_path / "plain")
    assert "quantization_config" not in config and config["dtype"] == str(dtype).removeprefix("torch.")
    assert torch.isfinite(logits(loaded(tmp_path / "plain", "llama"))).all()
    assert manifest(tmp_path / "plain")["source"]["scheme"] == manifest(source)["scheme"]


@pytest.mark.parametrize(("kind", "model"), [("nf4", "gpt2"), ("int4", "bert"), ("awq", "tied"), ("int4", "mixtral")])
def test_values_of_other_architectures(artifact: Artifacts, tmp_path: Path, kind: str, model: str) -> None:
    source = artifact(kind, model, rest="keep")
    convert(source, tmp_path / "plain", scheme="bf16")
    found = loaded(tmp_path / "plain", model)
    wanted = reference(source, model, tmp_path / "reference").to(torch.bfloat16)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(part, wanted.state_dict()[name]) for name, part in found.state_dict().items())


def test_transformers_is_asked_whether_it_loads_the_values(
    artifact: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    convert(artifact("gptq"), tmp_path / "plain", scheme="bf16")
    assert manifest(tmp_path / "plain")["verified"]["runtime"]["class"] == "LlamaForCausalLM"


def test_values_too_large_for_fp16(tmp_path: Path) -> None:
    save_file({"up.weight": torch.full((64, 64), 1e5)}, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "int4.safetensors", scheme="int4")
    with pytest.raises(InputError, match=r"up\.weight has values too large for F16"):
        convert(tmp_path / "int4.safetensors", tmp_path / "fp16.safetensors", scheme="fp16")
    convert(tmp_path / "int4.safetensors", tmp_path / "bf16.safetensors", scheme="bf16")


def test_memory_limits_apply(artifact: Artifacts, tmp_path: Path) -> None:
    for wish in ({"format": "gptq"}, {"scheme": "bf16"}):
        with pytest.raises(UsageError, match="--max-memory 300 MB is too little"):
            convert(artifact("int4"), tmp_path / "out", max_memory=300_000_000, **wish)
        report = convert(artifact("int4"), tmp_path / str(len(wish)), max_memory=320_000_000, force=True, **wish)
        assert report.details["threads"] >= 1


# Running them.


@pytest.mark.parametrize("model", ["llama", "tied", "bert", "mixtral"])
@pytest.mark.parametrize("kind", ["gptq", "gptq asymmetric", "awq", "awq asymmetric", "int4 asymmetric"])
def test_what_transformers_does_not_load_runs_with_its_values(
    artifact: Artifacts, tmp_path: Path, kind: str, model: str
) -> None:
    source = artifact(kind, model, rest="keep")
    found = hugging_face.load_model(source, causal=model != "bert")
    assert next(found.parameters()).dtype == torch.float32 and not found.training
    wanted = reference(source, model, tmp_path / "plain").float()
    assert torch.equal(logits(found), logits(wanted))


def test_a_missing_weight_would_be_random(artifact: Artifacts, tmp_path: Path) -> None:
    source = changed(artifact("gptq"), tmp_path / "source", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"lacks 1 weights of LlamaForCausalLM, which would be random: model\.norm"):
        hugging_face.load_model(source, causal=True)


def test_asymmetric_weights_beside_quantized_inputs_cannot_be_run(artifact: Artifacts) -> None:
    rules = [{"match": "*.down_proj", "scheme": "int8-dynamic"}]
    with pytest.raises(InputError, match="asymmetric weights beside quantized inputs"):
        hugging_face.load_model(artifact("int4 asymmetric", rules=rules), causal=True)


def test_eval_and_inspect_take_every_container(artifact: Artifacts, models: Path, tmp_path: Path) -> None:
    convert(artifact("int4"), tmp_path / "gptq", format="gptq")
    convert(artifact("int4"), tmp_path / "awq", format="awq")
    ids = np.random.default_rng(0).integers(3, 90, (6, 12))
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    candidates = [artifact("int4"), tmp_path / "gptq", tmp_path / "awq"]
    report = quantcli.evaluate(models / "llama", candidates, data=tmp_path / "data.npz", task="fidelity", by_layer=True)
    sqnr = [row.metrics["sqnr_db"] for row in report.models[1:]]
    assert sqnr[0] == pytest.approx(sqnr[1], abs=1e-3) and sqnr[1] == sqnr[2] and sqnr[0] < 40
    assert [row.format for row in report.models[1:]] == ["compressed-tensors", "gptq", "awq"]
    for place in candidates:
        quantized = {row.name for row in report.layers if row.model == str(place) and row.scheme}
        assert quantized == codes_of(place).keys()
    for place, name in ((tmp_path / "gptq", "gptq"), (tmp_path / "awq", "awq")):
        row = quantcli.inspect(place).models[0]
        assert (row.format, row.scheme, row.details["quantized_layers"]) == (name, "int4", {"int4, group 32": 14})


@pytest.mark.slow
def test_bench_takes_them_too(artifact: Artifacts, models: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 90, (6, 12))
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    timed = quantcli.bench(models / "llama", [artifact("gptq"), artifact("awq")], data=tmp_path / "data.npz", runs=3)
    assert all(row.metrics["latency_ms_p50"] > 0 for row in timed.models)
