"""Adapters: refused by what their tensors are called, and models that hold such tensors beside their layers not."""

from __future__ import annotations

import pytest
from support.plans import infos

from quantcli.errors import InputError
from quantcli.planning.adapters import refuse_adapter

PEFT = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "names",
    [
        (f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight"),
        (f"{PEFT}.lora_magnitude_vector", "base_model.model.lm_head.weight"),
        (f"{PEFT}.ia3_l",),
        ("base_model.model.wte.lora_embedding_A",),
        ("unet.down_blocks.0.attn.to_q.lora.up.weight", "unet.down_blocks.0.attn.to_q.lora.down.weight"),
        ("lora_unet_mid_block.lora_up.weight", "lora_unet_mid_block.alpha"),
        ("lycoris_a.hada_w1_a", "lycoris_a.hada_w1_b"),
    ],
)
def test_changes_without_their_layers_are_no_model(names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="is part of an adapter") as caught:
        refuse_adapter(infos({name: () if name.endswith("alpha") else (64, 8) for name in names}))
    assert names[0] in caught.value.message
    assert "merge_and_unload" in str(caught.value.hint)


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj.weight", "q_proj.lora_A.weight", "q_proj.lora_B.weight"),
        (f"{PEFT}.base_layer.weight", f"{PEFT}.lora_A.default.weight"),
        ("Wqkv.parametrizations.weight.original", "Wqkv.parametrizations.weight.0.lora_A", "a.weight"),
        ("layers.0.q_a_proj.weight", "layers.0.attn.w_lora.lora.0.weight", "explora_model.weight"),
    ],
)
def test_changes_beside_their_layers_are_a_model(names: tuple[str, ...]) -> None:
    refuse_adapter(infos(dict.fromkeys(names, (64, 8))))
