"""diffusers pipelines: each model in its own layout, the rest as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli import convert, inspect
from quantcli.errors import InputError, QuantcliError, UsageError

UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", "sample_size": 8}
WEIGHTS = {
    "down_blocks.0.attn.to_q.weight": torch.rand(128, 128),
    "down_blocks.0.attn.to_q.bias": torch.rand(128),
    "conv_in.weight": torch.rand(128, 4, 3, 3),
}


def model(place: Path, config: dict[str, Any], name: str) -> None:
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    save_file(WEIGHTS, place / name)


@pytest.fixture
def pipeline(models: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    model(folder / "unet", UNET, "diffusion_pytorch_model.safetensors")
    model(folder / "vae", UNET | {"_class_name": "AutoencoderKL"}, "diffusion_pytorch_model.safetensors")
    shutil.copytree(models / "bert", folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", "safety_checker": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "BertModel"], "scheduler": ["diffusers", "DDIMScheduler"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("no_runtime_check")
@pytest.mark.parametrize("scheme", ["bf16", "nf4"])
def test_every_model_keeps_its_layout(pipeline: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "out"
    report = convert(pipeline, out, scheme=scheme)
    assert files(out) == files(pipeline) | {"unet/quantcli.json", "text_encoder/quantcli.json"}
    for name in ("vae/diffusion_pytorch_model.safetensors", "model_index.json", "scheduler/scheduler_config.json"):
        assert (out / name).read_bytes() == (pipeline / name).read_bytes()
    config = json.loads((out / "unet" / "config.json").read_text())
    assert config.items() >= UNET.items() and "dtype" not in config
    made = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    if scheme == "bf16":
        assert config == UNET
        assert all(torch.equal(made[name], part.bfloat16()) for name, part in WEIGHTS.items())
    else:
        assert config["quantization_config"]["quant_method"] == "bitsandbytes"
        assert made["down_blocks.0.attn.to_q.weight"].dtype == torch.uint8
    assert {layer.name.partition(".")[0] for layer in report.layers} == {"unet", "text_encoder"}
    assert inspect(out / "unet").models[0].scheme == scheme


def test_what_stays_is_named_plainly(tmp_path: Path) -> None:
    """diffusers compares names, and the last parts of names, where transformers matches patterns."""
    names = ["a.proj_out", "a.to_q", "proj_out", "narrow"]
    tensors = {f"{name}.weight": torch.rand(128 if name != "narrow" else 20, 128) for name in names}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(UNET))
    save_file(tensors, tmp_path / "m" / "diffusion_pytorch_model.safetensors")
    convert(tmp_path / "m", tmp_path / "out", scheme="nf4", skip=["*proj_out"])
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["llm_int8_skip_modules"] == ["a.proj_out", "narrow", "proj_out"]
    with pytest.raises(
        UsageError, match=r"proj_out stays unquantized, and diffusers would take a\.proj_out for"
    ) as caught:
        convert(tmp_path / "m", tmp_path / "other", scheme="nf4", skip=["proj_out"], dry_run=True)
    assert "--skip '*proj_out'" in str(caught.value.hint)


def test_what_diffusers_does_not_load_is_refused_before_work(pipeline: Path, tmp_path: Path) -> None:
    for source in (pipeline, pipeline / "unet"):
        with pytest.raises(UsageError, match="which does not load weights stored as compressed-tensors"):
            convert(source, tmp_path / "out", scheme="int8")
    assert not (tmp_path / "out").exists()


def test_a_plan_writes_nothing_and_data_calibrates_none(pipeline: Path, tmp_path: Path) -> None:
    report = convert(pipeline, tmp_path / "out", scheme="nf4", dry_run=True)
    assert report.models[1].size_bytes and not (tmp_path / "out").exists()
    with pytest.raises(QuantcliError, match="diffusers pipeline"):
        convert(pipeline, tmp_path / "out", scheme="nf4", data=tmp_path / "x.txt")
    with pytest.raises(InputError, match="is a diffusers pipeline, whose models lie in folders of their own"):
        inspect(pipeline)


@pytest.mark.usefixtures("no_runtime_check")
def test_globs_name_a_component_and_the_report_says_what_became_of_each(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantcli.cli.app import main

    skip = ["--skip", "unet.conv_in", "--skip", "vae.*", "--skip", "text_enc*.*"]
    assert main(["convert", str(pipeline), "-o", str(tmp_path / "out"), "--scheme", "nf4", *skip, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (skipped,) = (layer for layer in report["layers"] if layer["name"] == "unet.conv_in.weight")
    assert skipped["reason"].startswith("skipped as asked")
    assert report["copied"] == {
        "vae": "an autoencoder, whose every error is seen in the image",
        "text_encoder": "skipped as asked",
        "scheduler": "it has no weights",
    }
    assert list(report["converted"]) == ["unet"]
    for path in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "out" / path).read_bytes() == (pipeline / path).read_bytes()
    assert main(["convert", str(pipeline), "-o", str(tmp_path / "plan"), "--scheme", "nf4", "--dry-run"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "Components" in table and "vae copied: an autoencoder" in table and "unet nf4" in table


def test_globs_of_a_pipeline_reach_the_components_that_they_mean() -> None:
    from quantcli.commands.convert_pipeline import recipes_for
    from quantcli.planning.recipe import Recipe, Rule

    layers = {"unet": ["conv_in.weight", "mid.to_q.weight"], "text_encoder": ["layers.0.to_q.weight"]}

    def skips(*globs: str) -> dict[str, list[str] | None]:
        found = recipes_for(Recipe(skip=list(globs)), layers, ["vae"])
        return {name: recipe and recipe.skip for name, recipe in found.items()}

    assert skips("unet.conv_in") == {"unet": ["conv_in"], "text_encoder": []}
    assert skips("*to_q") == {"unet": ["*to_q"], "text_encoder": ["*to_q"]}
    assert skips("conv_in") == {"unet": ["conv_in"], "text_encoder": []}
    assert skips("vae.decoder.*", "unet.*") == {"unet": None, "text_encoder": []}
    for glob in ("unet.none", "text_encoder.conv_in", "nothing", "other.x"):
        with pytest.raises(UsageError, match=f"'{glob}' matches no layer. The pipeline's components are unet, .*vae"):
            skips(glob)
    rules = recipes_for(Recipe(rules=[Rule(match=["unet.mid.*", "*layers.0*"], skip=True)]), layers, [])
    assert [recipe.rules[0].match for recipe in rules.values() if recipe] == [["mid.*"], ["*layers.0*"]]


@pytest.mark.usefixtures("no_runtime_check")
@pytest.mark.parametrize("scheme", ["bf16", "nf4"])
def test_diffusers_loads_what_was_made_of_its_pipeline(scheme: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    if scheme == "nf4" and not torch.cuda.is_available():
        pytest.skip("diffusers loads what bitsandbytes quantized on a GPU alone")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(64, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    convert(tmp_path / "pipeline", tmp_path / "out", scheme=scheme, skip=["unet.time_embedding.*"])
    wanted = {"torch_dtype": torch.bfloat16} if scheme == "bf16" else {}
    made = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", **wanted).unet
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = unet.eval()(noise, 3).sample, made.eval()(noise.to(made.dtype), 3).sample.float()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.97
    quantized = {name for name, module in made.named_modules() if type(module).__name__ == "Linear4bit"}
    assert bool(quantized) == (scheme == "nf4") and not any("time_embedding" in name for name in quantized)
