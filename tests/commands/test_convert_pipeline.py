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
