"""Models whose parameters stay in the checkpoint until they are asked for, compared with transformers' own loading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import tiny_architectures
from support.artifacts import tensors_of
from support.plain_blocks import LISTS, network
from torch import Tensor, nn
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

from quantcli.blocks import skeleton
from quantcli.blocks.skeleton import Skeleton, open_skeleton
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.errors import InputError


def skeleton_of(folder: Path) -> Skeleton:
    return open_skeleton(open_checkpoint(folder))


def changed(
    source: Path, place: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: object
) -> Path:
    """A copy of a model with other tensors and configuration."""
    place.mkdir()
    save_file(edit(tensors_of(source)), place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    return place


def renamed(pattern: str, replacement: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {re.sub(pattern, replacement, name): part for name, part in tensors.items()}


@pytest.mark.parametrize("name", [*LISTS, "tied"])
def test_values_are_those_that_transformers_loads(models: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "_READ_ELEMENTS", 1000)  # several reads for a tensor
    reference, own = network(models / name), skeleton_of(models / name)
    assert type(own.module) is type(reference) and not own.module.training
    assert all(parameter.is_meta for parameter in own.module.parameters())
    expected = dict(reference.named_buffers())
    buffers = dict(own.module.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[key], value) for key, value in expected.items())
    loaded = dict(own.load("").named_parameters(remove_duplicate=False))
    for key, value in reference.named_parameters(remove_duplicate=False):
        assert torch.equal(loaded[key], value) and loaded[key].dtype == torch.float32, key


def test_half_precision_becomes_float32(models: Path, tmp_path: Path) -> None:
    folder = changed(models / "llama", tmp_path / "half", lambda t: {key: part.bfloat16() for key, part in t.items()})
    block = skeleton_of(folder).load("model.layers.1")
    weight = block.get_parameter("mlp.up_proj.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors_of(folder)["model.layers.1.mlp.up_proj.weight"].float())


def test_a_part_is_loaded_and_dropped(models: Path) -> None:
    own = skeleton_of(models / "llama")
    block = own.load("model.layers.1")
    assert not any(parameter.is_meta for parameter in block.parameters())
    others = [name for name, each in own.module.named_parameters() if not each.is_meta]
    assert others and all(name.startswith("model.layers.1.") for name in others)
    own.drop("model.layers.1")
    assert all(parameter.is_meta for parameter in own.module.parameters())
    assert block is own.module.get_submodule("model.layers.1")


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "config"),
    [
        ("bert", r"^", "bert.", {}),
        ("bert", r"LayerNorm\.weight$", "LayerNorm.gamma", {}),
        ("bert", r"LayerNorm\.bias$", "LayerNorm.beta", {}),
        ("tied", r"^model\.", "", {}),
        ("vit", r"^vit\.", "", {}),
        ("llama", r"$", "", {"architectures": ["LlamaModel"]}),
    ],
    ids=["with prefix", "gamma", "beta", "without prefix", "old names without prefix", "base of a headed one"],
)
def test_other_names(
    models: Path, tmp_path: Path, name: str, pattern: str, replacement: str, config: dict[str, object]
) -> None:
    folder = changed(models / name, tmp_path / "m", renamed(pattern, replacement), **config)
    parameters = skeleton_of(folder).parameters()
    reference = dict(network(folder).named_parameters(remove_duplicate=False))
    tensors = tensors_of(folder)
    assert parameters.keys() == reference.keys()
    assert all(torch.equal(reference[key], tensors[info.name]) for key, info in parameters.items())


def test_a_rename_that_leads_nowhere_is_not_made(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [WeightRenaming("model.norm", "norm"), WeightRenaming("q_proj", "query")]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: rules)
    found = skeleton_of(models / "llama").parameters()
    assert all(name == info.name for name, info in found.items()) and len(found) == 21


def test_what_a_block_holds_is_named_as_in_the_checkpoint(models: Path) -> None:
    found = skeleton_of(models / "vit").parameters("vit.layers.0")
    assert found["vit.layers.0.attention.q_proj.weight"].name == "vit.encoder.layer.0.attention.attention.query.weight"
    assert all(name.startswith("vit.layers.0.") for name in found)


def without(glob: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: part for key, part in tensors.items() if not re.search(glob, key)}


def test_missing_weights_are_refused(models: Path, tmp_path: Path) -> None:
    folder = changed(models / "llama", tmp_path / "a", without(r"layers\.1\.mlp\.(up|down)"))
    with pytest.raises(InputError, match=r"lacks 2 weights of LlamaForCausalLM: .*\.1\.mlp\.up_proj\.weight"):
        skeleton_of(folder)
    with pytest.raises(InputError, match=r"lacks 1 weights of LlamaForCausalLM: lm_head\.weight"):
        skeleton_of(changed(models / "llama", tmp_path / "b", without("lm_head")))
    skeleton_of(changed(models / "bert", tmp_path / "c", without("pooler")))  # not needed


def test_shapes_that_do_not_fit_are_refused(models: Path, tmp_path: Path) -> None:
    folder = changed(models / "llama", tmp_path / "m", renamed("$", ""), intermediate_size=96)
    with pytest.raises(InputError, match=r"gate_proj\.weight has the shape \[192, 128\]; .* says \[96, 128\]"):
        skeleton_of(folder)


def test_a_bare_file_cannot_be_run(models: Path) -> None:
    with pytest.raises(InputError, match=r"bare file.*Name the Hugging Face folder"):
        open_skeleton(open_checkpoint(models / "llama" / "model.safetensors"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read."""
    names: list[str] = []
    original = Checkpoint.read_rows

    def read_rows(self: Checkpoint, info: object, start: int, stop: int) -> Tensor:
        names.append(info.name)  # type: ignore[attr-defined]
        return original(self, info, start, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read_rows", read_rows)
    return names


def test_what_is_around_blocks_is_read_when_it_is_called(models: Path, read: list[str]) -> None:
    own = skeleton_of(models / "llama")
    inner = own.module.get_submodule("model")
    with own.loading_others(["model.layers.0", "model.layers.1"]):
        ids = torch.arange(5)
        with pytest.raises((NotImplementedError, RuntimeError)):  # at the first block, which is not loaded
            own.module(ids[None])
        for _ in range(2):
            embedded = inner.get_submodule("embed_tokens")(ids)
        assert read == ["model.embed_tokens.weight"]
        assert torch.equal(embedded, tensors_of(models / "llama")["model.embed_tokens.weight"][:5])
        inner.get_submodule("norm")(embedded)
        assert read == ["model.embed_tokens.weight", "model.norm.weight"]
    assert all(parameter.is_meta for parameter in own.module.parameters())
    with pytest.raises((NotImplementedError, RuntimeError)):
        inner.get_submodule("embed_tokens")(ids).sum().item()


def test_a_module_that_reads_its_childs_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)).eval()
    save_file({key: part.clone() for key, part in model.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        bare = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)).eval()
    own = Skeleton(bare, open_checkpoint(tmp_path / "model.safetensors"))
    inputs = torch.randn(2, 3, 8)
    with own.loading_others([]), torch.no_grad():
        torch.testing.assert_close(bare[0](inputs, inputs, inputs)[0], model[0](inputs, inputs, inputs)[0])


@pytest.mark.parametrize(("case", "made"), [("causal:inkling2_text", "gate_up_proj"), ("vl:qwen3_vl_moe", "down_proj")])
def test_parameters_that_the_library_interleaves_or_turns_are_made_as_it_does(
    tmp_path: Path, case: str, made: str
) -> None:
    tiny_architectures.build(case, tmp_path / "model")
    skeleton = open_skeleton(open_checkpoint(tmp_path / "model"))
    stored = {name.rpartition(".")[2] for name in skeleton.parameters()}
    assert made not in stored
    loaded = type(skeleton.module).from_pretrained(tmp_path / "model", dtype=torch.float32)  # type: ignore[attr-defined]
    expected = dict(loaded.named_parameters())
    ours = dict(skeleton.load("").named_parameters())
    assert ours.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in ours.items())
    skeleton.drop()
    assert all(parameter.is_meta for parameter in skeleton.module.parameters())
