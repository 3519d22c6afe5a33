"""What lies beside a model's weights: all of it travels, but other copies of the weights, which are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli import convert
from quantcli.checkpoint.hugging_face import neighbours, pooling_file, sentence_model


def folder_with(place: Path, *names: str, **sizes: int) -> Path:
    """A folder with a model of a thousand bytes and files of these names."""
    for name in ("model.safetensors", *names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"0" * sizes.get(name.replace("/", "_").replace(".", "_"), 1000))
    return place


def found(folder: Path) -> tuple[list[str], list[str]]:
    result = neighbours(folder, [folder / "model.safetensors"])
    return [path.as_posix() for path in result.copied], list(result.left)


def test_files_travel_whatever_they_are(tmp_path: Path) -> None:
    names = ("config.json", "spiece.model", "tokenizer.spm", "assets/a.png", "data.csv", "extra/index.pkl")
    assert found(folder_with(tmp_path, *names)) == (sorted(names), [])


def test_other_copies_of_the_weights_are_left_and_named(tmp_path: Path) -> None:
    copies = ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth")
    folder = folder_with(tmp_path, *copies, "training_args.bin", "model.safetensors.index.json", "int8/quantcli.json")
    copied, left = found(folder)
    assert copied == []
    assert left == ["pytorch_model.bin", "tf_model.h5", "training_args.bin", "int8/", "onnx/", "original/"]
    (warning,) = neighbours(folder, [folder / "model.safetensors"]).warnings
    assert warning.endswith("pytorch_model.bin, tf_model.h5, training_args.bin, int8/ and 2 more.")


def test_what_weights_are_kept_in_may_be_another_thing(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "spk_dict.pt", "filters.npz", spk_dict_pt=100, filters_npz=100)
    assert found(folder) == (["filters.npz", "spk_dict.pt"], [])
    folder_with(folder, "optimizer.pt")
    assert found(folder) == (["filters.npz"], ["optimizer.pt", "spk_dict.pt"])


def test_an_adapter_beside_a_model_travels(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin")
    assert found(folder) == (["adapter_config.json", "adapter_model.safetensors"], ["pytorch_model.bin"])
    assert "An adapter lies beside" in neighbours(folder, [folder / "model.safetensors"]).warnings[1]


def test_small_weights_in_a_subfolder_travel_and_hidden_ones_do_not(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "head/model.safetensors", ".git/config", head_model_safetensors=100)
    assert found(folder) == (["head/model.safetensors"], [])


def test_a_part_of_a_sentence_transformers_model_knows_what_is_around_it(tmp_path: Path) -> None:
    part = folder_with(tmp_path / "0_Transformer", "config.json")
    (tmp_path / "3_Pool").mkdir()
    (tmp_path / "3_Pool" / "config.json").write_text("{}")
    assert (pooling_file(part), sentence_model(part)) == (None, None)
    (tmp_path / "modules.json").write_text("no JSON")
    assert sentence_model(part) is None and neighbours(part, [part / "model.safetensors"]).part_of is None
    kinds = {
        "0_Transformer": "sentence_transformers.models.Transformer",
        "3_Pool": "sentence_transformers.models.Pooling",
    }
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in kinds.items()]))
    assert pooling_file(part) == pooling_file(tmp_path) == tmp_path / "3_Pool" / "config.json"
    (warning,) = neighbours(part, [part / "model.safetensors"]).warnings
    assert warning.startswith(f"This is one part of the sentence-transformers model in {tmp_path}:")
    assert sentence_model(folder_with(tmp_path / "other")) is None


def test_modules_of_sentence_transformers_travel_whole(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sentences"
    shutil.copytree(models / "bert", folder)
    modules = ["", "1_Pooling", "2_Dense"]
    listed = [{"idx": index, "name": str(index), "path": path, "type": "x"} for index, path in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    for path in modules[1:]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps({"in_features": 128}))
    dense = {"linear.weight": torch.rand(2048, 2048)}  # larger than the model
    save_file(dense, folder / "2_Dense" / "model.safetensors")
    report = convert(folder, tmp_path / "out", scheme="int8")
    assert torch.equal(
        load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")["linear.weight"], dense["linear.weight"]
    )
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not [warning for warning in report.warnings if "Left behind" in warning]


@pytest.mark.usefixtures("no_runtime_check")
def test_a_conversion_names_what_it_leaves(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "bert", folder)
    (folder / "pytorch_model.bin").write_bytes(b"0")
    report = convert(folder, tmp_path / "out", scheme="bf16", dry_run=True)
    assert [warning for warning in report.warnings if "Left behind" in warning and "pytorch_model.bin" in warning]
