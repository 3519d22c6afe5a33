"""Mixtures of experts as a graph can hold them: every expert's layers, and what the library's own code computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from torch import nn

from quantcli import convert
from quantcli.export.experts import take_apart

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtures() -> dict[str, nn.Module]:
    """With gates side by side, and one after the other in turned weights with biases; and without gates."""
    torch.manual_seed(0)
    qwen = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    oss = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    made: dict[str, nn.Module] = {
        "mixtral": tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)),
        "qwen2_moe": tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SIZES, **qwen)),
        "gpt_oss": tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, **oss)),
    }
    for model in made.values():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_all_experts_compute_what_the_chosen_ones_do(name: str) -> None:
    model, ids = mixtures()[name].eval(), torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        wanted = model(ids).logits
        take_apart(model)
        found = model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    layers = [path for path, module in model.named_modules() if "experts." in path and isinstance(module, nn.Linear)]
    assert len(layers) == 2 * 4 * 2
    assert not [path for path, _ in model.named_parameters() if path.endswith(("gate_up_proj", "down_proj"))]


@pytest.mark.slow
def test_the_experts_of_a_graph_are_quantized(models: Path, tmp_path: Path) -> None:
    import onnxruntime

    convert(models / "mixtral", tmp_path / "m.onnx", scheme="int8-dynamic", format="onnx")
    graph = ir.load(tmp_path / "m.onnx").graph
    experts = [value for name, value in graph.initializers.items() if "experts" in name]
    assert sum(value.dtype != ir.DataType.FLOAT and len(value.shape or ()) == 2 for value in experts) >= 2 * 4 * 2
    assert not [value for value in experts if value.dtype == ir.DataType.FLOAT and len(value.shape or ()) > 1]
    ids = torch.arange(5, 29).reshape(2, 12)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 12), np.int64)}
    found = torch.from_numpy(session.run(["logits"], {i.name: feeds[i.name] for i in session.get_inputs()})[0])
    with torch.no_grad():
        wanted = tf.MixtralForCausalLM.from_pretrained(models / "mixtral")(ids).logits
    assert (found - wanted).norm() < 0.1 * wanted.norm()
