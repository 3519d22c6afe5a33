"""Fused experts taken apart: the same function, with a layer for each of the checkpoint's tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from quantcli.algorithms.base import LinearStats
from quantcli.blocks.calls import Call
from quantcli.blocks.skeleton import open_skeleton
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.ptq.observe import observe

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def saved(folder: Path, name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            **SIZES, head_dim=8, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_computes_the_same(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path, name)
    own = open_skeleton(open_checkpoint(tmp_path))
    loaded = own.load("")
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    experts = {info.name for path, info in own.parameters().items() if ".experts." in path}
    assert experts == {info.name for info in open_checkpoint(tmp_path).infos() if ".experts." in info.name}
    assert len(experts) == 12


def test_inputs_of_every_expert_are_seen(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    block = open_skeleton(open_checkpoint(tmp_path)).load("model.layers.0.mlp")
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear) and "experts." in name]
    hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    stats: dict[str, LinearStats] = observe(block, [Call(hidden)], linears, {"gram"})
    # The oracle: the router alone, token by token.
    rows = hidden.reshape(-1, 32)
    chosen = (rows @ block.get_parameter("gate.weight").T).topk(2).indices
    for expert in range(4):
        mine = rows[(chosen == expert).any(1)]
        seen = stats[f"experts.{expert}.w1"]
        assert seen.tokens == len(mine)
        assert seen is stats[f"experts.{expert}.w3"]
        if seen.gram is not None and len(mine):
            torch.testing.assert_close(seen.gram, mine.T @ mine, rtol=1e-2, atol=1e-3)
