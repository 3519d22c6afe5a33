"""Models of transformers: caches off wherever they are set, tables that are computed, codes that are read as values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantcli.blocks.skeleton import open_skeleton
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.quantized import open_quantized
from quantcli.commands.convert import convert
from quantcli.errors import InputError
from quantcli.models.hugging_face import build_model, decoder_start, disable_caches, load_model
from quantcli.models.stored_parameters import vocabulary_of, with_layers_for_experts

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_caches_are_off_in_nested_configurations() -> None:
    text = transformers.LlamaConfig(**SIZES, intermediate_size=64)
    config = transformers.LlavaConfig(text_config=text, vision_config=transformers.CLIPVisionConfig())
    assert config.text_config.use_cache
    disable_caches(config)
    assert not config.text_config.use_cache


@pytest.mark.usefixtures("no_runtime_check")
def test_nf4_is_evaluated_as_its_codes_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=64))
    model.save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "nf4", scheme="nf4")
    values = DecodedCheckpoint(open_quantized(open_checkpoint(tmp_path / "nf4")))
    loaded = load_model(tmp_path / "nf4", causal=True)
    infos = {info.name: info for info in values.infos()}
    for name, parameter in loaded.named_parameters():
        assert type(loaded.get_submodule(name.rpartition(".")[0])).__module__.partition(".")[0] != "bitsandbytes"
        assert torch.equal(parameter, values.read_rows(infos[name], 0, infos[name].rows).float())


def test_a_bare_class_that_others_give_parts_to_is_not_run_without_them(tmp_path: Path) -> None:
    """The bare Perceiver has no embedding of words: what it is given would have to be embedded already."""
    config = transformers.PerceiverConfig(
        num_latents=4, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=2,
        num_cross_attention_heads=2, qk_channels=16, v_channels=16, max_position_embeddings=8, vocab_size=32,
    )  # fmt: skip
    transformers.PerceiverForMaskedLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, causal=False)
    assert type(model).__name__ == "PerceiverForMaskedLM"
    assert model(inputs=torch.ones(1, 8, dtype=torch.int64)).logits.shape == (1, 8, 32)


def test_tables_that_are_computed_need_no_values_in_the_file(tmp_path: Path) -> None:
    halves = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    config = transformers.MarianConfig(
        vocab_size=64, d_model=16, max_position_embeddings=8, pad_token_id=0, decoder_start_token_id=0,
        **{f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in halves.items()},
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    model.save_pretrained(tmp_path / "marian")
    file = tmp_path / "marian" / "model.safetensors"
    weights = load_file(file)
    save_file({name: each for name, each in weights.items() if "embed_positions" not in name}, file, {"format": "pt"})
    table = open_skeleton(open_checkpoint(tmp_path / "marian")).load("model.encoder.embed_positions").weight
    assert torch.equal(table, model.model.encoder.embed_positions.weight)
    assert len(table.unique()) > 8


def test_a_class_with_one_tower_is_loaded_by_its_own_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = transformers.CLIPConfig(vision_config=seeing, text_config=transformers.CLIPTextConfig(**sizes))
    transformers.CLIPForImageClassification(config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path, causal=False)).__name__ == "CLIPForImageClassification"


@pytest.mark.parametrize("kind", ["CLIP", "DeiT"])
def test_layers_that_an_artifact_lacks_are_not_run_from_empty_codes(tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    configs = {
        "CLIP": transformers.CLIPConfig(vision_config=seeing, text_config=transformers.CLIPTextConfig(**sizes)),
        "DeiT": transformers.DeiTConfig(**sizes, image_size=16, patch_size=8),
    }
    getattr(transformers, f"{kind}ForImageClassification")(configs[kind]).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "int8", scheme="int8", verify="codes")
    picture = {"pixel_values": torch.randn(1, 3, 16, 16)}
    models = [load_model(tmp_path / name, causal=False) for name in ("model", "int8")]
    # One with codes may have a class derived from the library's.
    assert len({(type(model).__module__, type(model).__name__) for model in models}) == 1
    with torch.no_grad():
        expected, found = (model(**picture)[0] for model in models)
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.99


def test_a_decoder_of_several_ids_at_once_starts_by_itself() -> None:
    config = transformers.DiaConfig(
        encoder_config={"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
        decoder_config={"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
    )
    of: Any = lambda config: decoder_start(SimpleNamespace(config=config))  # type: ignore[arg-type]  # noqa: E731
    assert of(config) is None
    assert of(transformers.T5Config(decoder_start_token_id=3)) == 3
    assert of(transformers.LlamaConfig()) is None


def test_experts_are_layers_where_the_library_makes_them_so_for_a_quantized_model() -> None:
    """Their decoded weights are read one by one, as the artifact names them."""
    config = transformers.Llama4TextConfig(
        **SIZES, head_dim=16, num_key_value_heads=2, intermediate_size=64, intermediate_size_mlp=64, num_local_experts=2
    )
    for method, single in (("bitsandbytes", True), ("gptq", False)):
        with torch.device("meta"):
            model = with_layers_for_experts(transformers.Llama4ForCausalLM, method)(config)
        assert type(model).__module__ == transformers.Llama4ForCausalLM.__module__, "by which its renamings are found"
        names = [name for name, _ in model.named_parameters() if ".experts." in name]
        assert any(name.endswith("experts.1.gate_proj.weight") for name in names) == single and names


def test_a_model_with_code_of_its_own_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise RuntimeError('was run')")
    for open_it in (lambda: load_model(tmp_path, causal=False), lambda: build_model(tmp_path)):
        with pytest.raises(InputError, match="has code of its own") as refused:
            open_it()
        assert "package.module:function" in str(refused.value)


def test_ids_are_counted_in_any_class_of_table() -> None:
    config = transformers.IBertConfig(**SIZES, intermediate_size=64)
    assert vocabulary_of(transformers.IBertModel(config)) == 64
    assert vocabulary_of(SimpleNamespace(config=config)) == 64
