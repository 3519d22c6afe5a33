"""The layout: which tensors lie in which files, and a manifest that moves none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.outputs import NORM, WEIGHT, tensors, under_way

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.conversion.checkpoint.layout import plan_layout
from quantcli.core.manifest import Manifest, ManifestLayer
from quantcli.errors import UsageError
from quantcli.planning.plan import Plan
from quantcli.planning.recipe import validate
from quantcli.planning.resolve import resolve

INDEX = "model.safetensors.index.json"


def folder_of(tmp_path: Path, shard: str | None) -> tuple[Checkpoint, Plan]:
    """Four equal layers in a folder, and a plan to cast them."""
    weights = {f"layers.{number}.up.weight": torch.ones(16, 64) for number in range(4)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "torch_dtype": "float32"}))
    checkpoint = open_checkpoint(tmp_path)
    recipe = validate({"scheme": "bf16"} | ({"max_shard_size": shard} if shard else {}), "recipe")
    return checkpoint, resolve(recipe, checkpoint.infos(), checkpoint.config)


@pytest.mark.parametrize(("shard", "counts"), [(None, [4]), ("4096", [2, 2]), ("5000", [2, 2]), ("10", [1, 1, 1, 1])])
def test_shards_hold_what_fits(tmp_path: Path, shard: str | None, counts: list[int]) -> None:
    checkpoint, plan = folder_of(tmp_path, shard)
    layout = plan_layout(plan, checkpoint, tmp_path / "out")
    assert [len(specs) for specs in layout.shards.values()] == counts
    (tmp_path / "out").mkdir()
    destinations = layout.create_files(tmp_path / "out")
    assert destinations.keys() == {info.name for info in checkpoint.infos()}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == layout.nbytes
    assert [len(load_file(file)) for file in files] == counts
    assert (tmp_path / "out" / INDEX).exists() == (len(counts) > 1)
    if len(counts) > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == 4 * 16 * 64 * 2
        assert open_checkpoint(tmp_path / "out").infos()[0].dtype == "BF16"


def test_the_config_tells_the_new_dtype(tmp_path: Path) -> None:
    checkpoint, plan = folder_of(tmp_path, None)
    layout = plan_layout(plan, checkpoint, tmp_path / "out")
    assert layout.config(plan, checkpoint.config) == {"model_type": "x", "torch_dtype": "bfloat16"}
    assert layout.config(plan, {}) == {"dtype": "bfloat16"}
    assert layout.config(plan, None) is None


def test_a_folder_does_not_become_a_file(tmp_path: Path) -> None:
    checkpoint, plan = folder_of(tmp_path, None)
    with pytest.raises(UsageError, match=r"is a folder, so the output is a folder too"):
        plan_layout(plan, checkpoint, tmp_path / "out.safetensors")


def test_a_single_file_takes_its_manifest_without_moving_a_tensor(tmp_path: Path) -> None:
    output = under_way(tmp_path / "out", scheme="bf16")
    for name in (WEIGHT, NORM):
        output.stream(name)
    size = output.file.stat().st_size
    layers = {name: ManifestLayer(scheme="bf16", algorithm="cast", sqnr_db=51.2345) for name in (WEIGHT, NORM)}
    recipe = output.plan.recipe.model_dump(mode="json")
    manifest = Manifest(quantcli="1", input_sha256="0" * 64, recipe=recipe, layers=layers)
    output.layout.write_manifest(output.file.parent, manifest)
    assert output.file.stat().st_size == size
    assert open_checkpoint(output.file).manifest == manifest
    with safe_open(output.file, "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert torch.equal(load_file(output.file)[WEIGHT], tensors()[WEIGHT].bfloat16())


def test_a_manifest_that_is_too_long_is_an_error_and_not_a_damaged_file(tmp_path: Path) -> None:
    output = under_way(tmp_path / "out", scheme="bf16")
    before = output.file.read_bytes()
    with pytest.raises(AssertionError, match="the manifest outgrew its room"):
        output.layout.write_manifest(output.file.parent, Manifest(algorithm="x" * 100_000))
    assert output.file.read_bytes() == before
