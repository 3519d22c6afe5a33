"""Shared fixtures: tiny models of several architectures, saved as transformers saves them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantcli.conversion.checkpoint.proof import Skipped

if TYPE_CHECKING:
    from support.quantized_models import Artifacts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Inside a GitHub step every report would go to its summary.
os.environ.pop("GITHUB_STEP_SUMMARY", None)


#: Sizes of BART's encoder, and of its decoder.
BART_HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in each subfolder: llama, tied, bert, gpt2, t5, bart, vit, mixtral, qwen2_moe.

    To be left as they are.
    """
    import torch
    import transformers as tf

    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    gpt2 = {"vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
    t5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    halves = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in BART_HALF.items()}
    bart = {"vocab_size": 96, "d_model": 64, "max_position_embeddings": 64} | halves
    vit = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    built = {
        "llama": tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2)),
        "tied": tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, tie_word_embeddings=True)),
        "bert": tf.BertModel(tf.BertConfig(**sizes)),
        "gpt2": tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2)),
        "t5": tf.T5ForConditionalGeneration(tf.T5Config(**t5, decoder_start_token_id=0)),
        "bart": tf.BartForConditionalGeneration(tf.BartConfig(**bart)),
        "vit": tf.ViTForImageClassification(tf.ViTConfig(**vit, image_size=32, patch_size=8)),
        "mixtral": tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=4, num_key_value_heads=2)),
        "qwen2_moe": tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**sizes, **experts, num_key_value_heads=2)),
    }
    root = tmp_path_factory.mktemp("models")
    for name, model in built.items():
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def artifact(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Makes quantized artifacts of the models, by kind."""
    from support.quantized_models import Artifacts

    return Artifacts(models, tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(autouse=True)
def float32_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are calibrated in float32, as on processors without bfloat16 products, so that figures are exact."""
    if "bfloat16_products" not in request.fixturenames:
        monkeypatch.setattr("quantcli.system.devices.has_bfloat16", lambda _: False)


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are calibrated with bfloat16 products, however slow they are here."""
    monkeypatch.setattr("quantcli.system.devices.has_bfloat16", lambda _: True)


@pytest.fixture
def no_runtime_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the child process in which a runtime loads the artifact: it takes seconds."""
    monkeypatch.setattr(
        "quantcli.conversion.checkpoint.transformers_check._reason_to_skip", lambda *_: Skipped("left out by a test")
    )
    monkeypatch.setattr(
        "quantcli.conversion.checkpoint.llama_cpp.reason_to_skip", lambda *_: ("left out by a test", True)
    )
