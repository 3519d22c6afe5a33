"""Roles: what the names and shapes of a checkpoint tell, against the modules that transformers builds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from quantcli.checkpoint.roles import HEAD_NAMES, LAYER_ROLES, classify, module_of, original_dtype, quantization_of
from quantcli.core.tensors import TensorInfo

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 8,
}  # fmt: skip
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 48}
T5 = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2}
WHISPER = {
    "vocab_size": 300, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 50,
    "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4}

#: Class, its configuration, and the modules that are not what their class alone says.
MODELS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "LlamaForCausalLM": (TEXT, {"lm_head": "head"}),
    "BertModel": (TEXT, {}),
    "BertForMaskedLM": (TEXT, {"cls.predictions.decoder": "tied head"}),
    "RobertaForMaskedLM": (TEXT, {"lm_head.decoder": "tied head"}),
    "AlbertModel": (TEXT | {"embedding_size": 32}, {}),
    "AlbertForMaskedLM": (TEXT | {"embedding_size": 32}, {"predictions.decoder": "tied head"}),
    "DebertaV2Model": (TEXT | {"relative_attention": True, "position_buckets": 16}, {}),
    "GPT2LMHeadModel": (GPT2, {"lm_head": "tied head"}),
    "GPTNeoXForCausalLM": (TEXT, {"lm_head": "head"}),
    "T5ForConditionalGeneration": (T5 | {"num_heads": 4}, {"lm_head": "tied head"}),
    "MixtralForCausalLM": (TEXT | EXPERTS, {"lm_head": "head", "model.layers.1.mlp.gate": "router"}),
    "GptOssForCausalLM": (TEXT | EXPERTS, {"lm_head": "head", "model.layers.1.mlp.router": "router"}),
    "Qwen2MoeForCausalLM": (
        TEXT | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4},
        {
            "lm_head": "head",
            "model.layers.1.mlp.gate": "router",
            "model.layers.1.mlp.shared_expert_gate": "router",
        },
    ),
    "SwitchTransformersForConditionalGeneration": (
        T5 | {"num_heads": 4, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        {"lm_head": "tied head", "encoder.block.1.layer.1.mlp.router.classifier": "router"},
    ),
    "MambaForCausalLM": (TEXT, {"lm_head": "tied head"}),
    "WhisperForConditionalGeneration": (WHISPER, {"proj_out": "tied head"}),
    "ViTModel": (VISION, {}),
    "CLIPModel": ({"text_config": TEXT, "vision_config": VISION}, {}),
    "ConvNextModel": ({"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, {}),
    "Wav2Vec2ForCTC": (
        TEXT | {"vocab_size": 32, "conv_dim": [32, 32], "conv_kernel": [3, 3], "conv_stride": [2, 2]},
        {"lm_head": "head"},
    ),
}  # fmt: skip


@cache
def build(name: str) -> nn.Module:
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**MODELS[name][0]))


def info(name: str, *shape: int, dtype: str = "F32", shares: str | None = None) -> TensorInfo:
    return TensorInfo(name, shape, dtype, 0, Path("model.safetensors"), shares)


def infos_of(model: nn.Module) -> list[TensorInfo]:
    dtypes = {True: "F32", False: "I64"}
    return [
        info(name, *tensor.shape, dtype=dtypes[tensor.is_floating_point()])
        for name, tensor in model.state_dict().items()
    ]


def roles(*infos: TensorInfo, tied: bool = False) -> dict[str, str]:
    return classify(infos, {"tie_word_embeddings": tied})


def role_of(module: nn.Module) -> str | None:
    """What a module's weight is by its class; None for modules that transformers defines for one model."""
    kinds: dict[type | tuple[type, ...], str] = {
        nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding", _ConvNd: "conv",
        (nn.LayerNorm, nn.modules.batchnorm._NormBase): "norm",
    }  # fmt: skip
    if "Norm" in type(module).__name__:
        return "norm"
    return next((role for kind, role in kinds.items() if isinstance(module, kind)), None)


@pytest.mark.parametrize("name", MODELS)
def test_roles_are_the_classes_of_modules(name: str) -> None:
    model, special = build(name), MODELS[name][1]
    modules = dict(model.named_modules())
    found = classify(infos_of(model), model.config.to_dict())
    assert found.keys() == model.state_dict().keys()
    for tensor, role in found.items():
        module, _, parameter = tensor.rpartition(".")
        expected = special.get(module, role_of(modules[module])) if parameter == "weight" else None
        if expected == "linear" and ".experts." in module:
            expected = "expert"
        if parameter == "bias":
            expected = "bias"
        if expected and role != "router":
            assert (tensor, role) == (tensor, expected)
        elif not expected:
            assert role not in ("linear", "conv1d", "conv", "embedding", "head", "norm"), (tensor, role)
    assert all(found[f"{module}.weight"] == role for module, role in special.items())
    routers = {module_of(tensor).rpartition(".mlp.")[2] for tensor, role in found.items() if role == "router"}
    assert routers == {module.rpartition(".mlp.")[2] for module, role in special.items() if role == "router"}


@pytest.mark.parametrize("name", MODELS)
def test_roles_do_not_change_where_a_tied_head_is_not_stored(name: str) -> None:
    model = build(name)
    tied = {tensor for tensor, role in classify(infos_of(model), model.config.to_dict()).items() if role == "tied head"}
    stored = [tensor for tensor in infos_of(model) if tensor.name not in tied]
    assert "tied head" not in classify(stored, model.config.to_dict()).values()
    assert {module_of(tensor) for tensor in tied} <= set(HEAD_NAMES)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Qwen2MoeForCausalLM"])
def test_fused_experts(name: str) -> None:
    found = classify(infos_of(build(name)), None)
    experts = {tensor.rpartition(".experts.")[2] for tensor, role in found.items() if role == "experts"}
    assert experts == {"gate_up_proj", "down_proj"}


def test_experts_one_by_one() -> None:
    """Mixtral, and Qwen2-MoE with its shared expert, as their files name them."""
    found = roles(
        info("model.layers.0.mlp.gate.weight", 512, 64),
        info("model.layers.0.mlp.experts.0.gate_proj.weight", 512, 64),
        info("model.layers.0.mlp.experts.511.down_proj.weight", 64, 512),
        info("model.layers.0.mlp.shared_expert.gate_proj.weight", 512, 64),
        info("model.layers.0.mlp.shared_expert_gate.weight", 1, 64),
        info("model.layers.1.mlp.gate.weight", 64, 64),
        info("model.layers.1.mlp.gate_proj.weight", 64, 64),
    )
    assert list(found.values()) == ["router", "expert", "expert", "linear", "router", "linear", "linear"]


def test_fused_experts_as_older_files_have_them() -> None:
    found = roles(
        info("a.block_sparse_moe.input_linear.weight", 8, 128, 64),  # GraniteMoe
        info("a.block_sparse_moe.router.layer.weight", 8, 64),
        info("b.self_attention.experts.input_linear.weight", 8, 128, 64),  # JetMoe
        info("b.self_attention.experts.router.layer.weight", 8, 64),
        info("b.self_attention.kv_proj.weight", 128, 64),
        info("c.ffn.experts.mlp.w1", 1024, 64),  # DBRX
        info("c.ffn.router.layer.weight", 8, 64),
        info("d.mlp.experts.gate_up_proj", 4, 8, 8),  # a tiny model for tests
        info("d.mlp.shared_experts.down_proj", 2, 8, 8),
    )
    expected = ["experts", "router", "experts", "router", "linear", "parameter", "router", "experts", "experts"]
    assert list(found.values()) == expected


def test_three_dimensions_are_not_always_experts() -> None:
    found = roles(
        info("embeddings.position_embeddings", 1, 197, 768),
        info("query_tokens", 1, 32, 768),
        info("positions.position_embeddings", 64, 64, 1152),
        info("attention.q", 1024, 64, 64),
        info("pos_conv_embed.conv.weight", 64, 48, 128),
        info("audio.conv1.weight", 64, 80, 3),
        info("decoder.0.weight", 64, 80, 7),
        info("patch_embedding.weight", 64, 3, 14, 14),
    )
    assert list(found.values()) == ["parameter"] * 4 + ["conv"] * 4


@pytest.mark.parametrize(
    ("tied", "shares", "role"),
    [(False, None, "head"), (True, None, "tied head"), (False, "model.embed_tokens.weight", "tied head")],
)
def test_head_of_a_llama(tied: bool, shares: str | None, role: str) -> None:
    found = roles(
        info("model.embed_tokens.weight", 300, 64),
        info("model.layers.0.self_attn.q_proj.weight", 64, 64),
        info("model.layers.0.mlp.up_proj.weight", 300, 64 * 2),
        info("model.layers.0.input_layernorm.weight", 64),
        info("lm_head.weight", 300, 64, shares=shares),
        tied=tied,
    )
    assert list(found.values()) == ["embedding", "linear", "linear", "norm", role]


def test_head_is_told_by_shape_or_by_name() -> None:
    found = roles(
        info("tok_emb.weight", 300, 64),
        info("pos_emb.weight", 512, 64),
        info("blocks.0.attn.weight", 64, 64),
        info("blocks.0.attn.bias", 64),
        info("blocks.0.mlp.weight", 300, 64),  # a head is not one of many blocks
        info("pooler.weight", 64, 64),
        info("readout.weight", 300, 64),
        info("lm_head.weight", 310, 32),
    )
    assert list(found.values()) == ["embedding", "embedding", "linear", "bias", "linear", "linear", "head", "head"]
    assert roles(info("embed_out.weight", 300, 64)) == {"embed_out.weight": "head"}


@pytest.mark.parametrize(
    "module",
    [
        "wte", "shared", "embed_tokens", "embeddings.word_embeddings", "tok_embeddings", "pos_emb", "rel_pos_emb",
        "emb", "decoder.embed_tokens.3", "relative_attention_bias", "CodepointEmbedder_0", "mask_tokens",
    ],
)  # fmt: skip
def test_embeddings(module: str) -> None:
    assert roles(info(f"model.{module}.weight", 8, 4)) == {f"model.{module}.weight": "embedding"}
    assert roles(info(f"{module}.weight", 8, 4), info(f"{module}.bias", 8))[f"{module}.weight"] == "linear"


@pytest.mark.parametrize(
    "module", ["patch_embed", "embedding_projection", "entity_embedding_dense", "unembed", "embed.proj", "member"]
)
def test_not_embeddings(module: str) -> None:
    assert roles(info(f"model.{module}.weight", 8, 4)) == {f"model.{module}.weight": "linear"}


def test_conv1d_is_told_by_its_bias() -> None:
    found = roles(
        info("h.0.attn.c_attn.weight", 64, 192),
        info("h.0.attn.c_attn.bias", 192),
        info("h.0.attn.c_proj.weight", 64, 64),  # square: as mlp.c_proj
        info("h.0.attn.c_proj.bias", 64),
        info("h.0.mlp.c_proj.weight", 256, 64),
        info("h.0.mlp.c_proj.bias", 64),
        info("h.0.adapter.weight", 64, 64),  # square, no sibling: as most
        info("h.0.adapter.bias", 64),
        info("h.0.gate.weight", 64, 64),  # no bias
        info("classifier.weight", 3, 64),
        info("classifier.bias", 3),
    )
    weights = [role for name, role in found.items() if name.endswith("weight")]
    assert weights == ["conv1d", "conv1d", "conv1d", "conv1d", "linear", "linear"]


def test_linear_layers_are_not_transposed() -> None:
    found = roles(
        info("0.weight", 128, 64), info("0.bias", 128), info("2.weight", 64, 64), info("2.bias", 64),
        info("odd.weight", 5, 7), info("odd.bias", 6),
    )  # fmt: skip
    assert {role for name, role in found.items() if name.endswith("weight")} == {"linear"}


def test_what_is_no_layer() -> None:
    found = roles(
        info("norm.weight", 64),
        info("norm.bias", 64),
        info("norm.running_mean", 64),
        info("norm.num_batches_tracked", dtype="I64"),
        info("position_ids", 1, 512, dtype="I64"),
        info("codes.weight", 64, 64, dtype="I8"),
        info("experts.gate_up_proj_bias", 4, 64),
        info("logit_scale"),
        info("scale.weight"),
        info("A_log", 64, 8),
        info("none.weight", 0, 64),
    )
    expected = ["norm", "bias", "parameter", "buffer", "buffer", "buffer", "bias"] + ["parameter"] * 3 + ["empty"]
    assert list(found.values()) == expected
    assert not set(expected) & set(LAYER_ROLES)
    assert classify([], None) == {}


def test_norms_under_the_names_of_tensorflow() -> None:
    """BERT's own files and those of ESM name them so; a scale of a layer that is called gamma is none."""
    found = roles(info("a.LayerNorm.gamma", 64), info("a.LayerNorm.beta", 64), info("blocks.0.ls1.gamma", 64))
    assert list(found.values()) == ["norm", "bias", "parameter"]


@pytest.mark.parametrize(
    ("infos", "config", "expected"),
    [
        ([info("a.weight", 2, 2)], {"dtype": "bfloat16"}, None),
        ([info("a.weight", 2, 2)], {"quantization_config": {"quant_method": "awq"}}, "awq"),
        # It is what some exporters leave behind of a section, and says nothing.
        ([info("a.weight", 2, 2)], {"quantization_config": {}}, None),
        ([info("a.weight_packed", 2, 2, dtype="I32")], None, "compressed-tensors"),
        ([info("a.qweight", 2, 2, dtype="I32")], None, "gptq or awq"),
        ([info("a.weight.quant_state.bitsandbytes__nf4", 2, dtype="U8")], None, "bitsandbytes"),
        ([info("a.weight", 2, 2, dtype="F8_E4M3")], None, "fp8"),
    ],
)
def test_quantized_already(infos: list[TensorInfo], config: Any, expected: str | None) -> None:
    assert quantization_of(infos, config) == expected


def test_original_dtype_is_what_most_elements_have() -> None:
    assert original_dtype([]) == "F32"
    many = [info(str(number), 1, dtype="F32") for number in range(9)]
    assert original_dtype([*many, info("a", 10, dtype="BF16"), info("b", 99, dtype="I8")]) == "BF16"


@pytest.mark.parametrize(
    ("module", "shape", "role"),
    [
        ("model.layers.2.eh_proj", (64, 128), "draft"),
        ("model.layers.2.shared_head.head", (300, 64), "draft"),
        ("mtp.fc", (64, 128), "draft"),
        ("model.mtp_layers.0.input_proj", (64, 128), "draft"),
        ("mtp.layers.0.self_attn.q_proj", (64, 64), "linear"),
        ("mtp.layers.0.mlp.down_proj", (64, 192), "linear"),
        ("model.layers.2.mlp.down_proj", (64, 128), "linear"),
    ],
)
def test_what_leads_into_multi_token_prediction_is_told_from_its_layers(
    module: str, shape: tuple[int, ...], role: str
) -> None:
    found = roles(info("model.embed_tokens.weight", 300, 64), info(f"{module}.weight", *shape))
    assert found[f"{module}.weight"] == role
