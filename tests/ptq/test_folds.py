"""Folds: found in the blocks of transformers' own models, kept exactly, refused where others read the source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from quantcli.blocks.calls import Call
from quantcli.errors import InputError
from quantcli.ptq.folds import Fold, apply_fold, find_folds

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
OPT = {"vocab_size": 96, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "word_embed_proj_dim": 64}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}

ATTENTION = [
    ("input_layernorm", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    ("self_attn.v_proj", "self_attn.o_proj"),
]
MLP = [("mlp.up_proj", "mlp.down_proj")]

#: Model, path of a block, and what can be folded in it.
CASES: dict[str, tuple[Callable[[], nn.Module], str, list[tuple[str, str]]]] = {
    "llama": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2)),
        "model.layers.0",
        [*ATTENTION, ("post_attention_layernorm", "mlp.gate_proj mlp.up_proj"), *MLP],
    ),
    "gemma2: 1 + weight, norms on both sides": (
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=16)),
        "model.layers.0",
        [*ATTENTION, ("pre_feedforward_layernorm", "mlp.gate_proj mlp.up_proj"), *MLP],
    ),
    "bert: norms also feed the residual": (
        lambda: tf.BertModel(tf.BertConfig(**SIZES)),
        "encoder.layer.0",
        [("attention.self.value", "attention.output.dense")],
    ),
    "gpt2: Conv1D, fused attention": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, eos_token_id=2)),
        "transformer.h.0",
        [("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")],
    ),
    "opt: LayerNorm with bias, ReLU passes scales on": (
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, num_attention_heads=4, max_position_embeddings=64)),
        "model.decoder.layers.0",
        [
            ("self_attn_layer_norm", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
            ("self_attn.v_proj", "self_attn.out_proj"),
            ("final_layer_norm", "fc1"),
            ("fc1", "fc2"),
        ],
    ),
    "mixtral: fused experts read the norm": (
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)),
        "model.layers.0",
        ATTENTION,
    ),
    "t5: the decoder's cross attention": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "decoder.block.0",
        [
            ("layer.0.layer_norm", "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v"),
            ("layer.0.SelfAttention.v", "layer.0.SelfAttention.o"),
            ("layer.1.layer_norm", "layer.1.EncDecAttention.q"),
            ("layer.1.EncDecAttention.v", "layer.1.EncDecAttention.o"),
            ("layer.2.layer_norm", "layer.2.DenseReluDense.wi"),
            ("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
        ],
    ),
}


def block_and_call(build: Callable[[], nn.Module], path: str) -> tuple[nn.Module, Call]:
    """A block with random weights everywhere (norms and biases too), and what the model calls it with."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    block = model.get_submodule(path)
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args[0], args[1:], kwargs))

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 96, (2, 12))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if not isinstance(model, tf.BertModel):
        inputs["use_cache"] = False
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return block, calls[0]


def layers(block: nn.Module) -> list[str]:
    weights = {name: getattr(module, "weight", None) for name, module in block.named_modules()}
    return [name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.ndim == 2]


def scales(channels: int) -> Tensor:
    return 0.1 + 5 * torch.rand(channels, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_folds_are_found_and_keep_what_the_block_computes(case: str) -> None:
    build, path, wanted = CASES[case]
    block, call = block_and_call(build, path)
    folds = find_folds(block, call, layers(block))
    assert [(fold.source, " ".join(fold.targets)) for fold in folds] == wanted
    with torch.no_grad():
        before = call.run(block)
        for fold in folds:
            weight = block.get_submodule(fold.source).weight.clone()
            apply_fold(block, fold, scales(fold.channels))
            assert not torch.equal(weight, block.get_submodule(fold.source).weight)
        after = call.run(block)
    assert (after - before).abs().max() <= 2e-6 * before.abs().max()


def test_each_target_sees_its_input_divided_by_the_scale() -> None:
    build, path, _ = CASES["llama"]
    block, call = block_and_call(build, path)
    fold = find_folds(block, call, layers(block))[1]
    assert (fold.channels, fold.repeat, fold.head_size) == (32, 2, 16)
    seen: list[Tensor] = []
    block.get_submodule("self_attn.o_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scale = scales(32)
    with torch.no_grad():
        call.run(block)
        apply_fold(block, fold, scale)
        call.run(block)
    # Head 0 of the values is read by heads 0 and 1, head 1 by heads 2 and 3.
    repeated = torch.cat([scale[:16], scale[:16], scale[16:], scale[16:]])
    assert torch.equal(fold.expand(scale), repeated)
    torch.testing.assert_close(seen[1], seen[0] / repeated)


def test_values_of_repeated_heads_are_gathered() -> None:
    fold = Fold("v", ("o",), channels=4, repeat=2, head_size=2)
    values = torch.tensor([1.0, 2, 3, 8, 5, 6, 9, 8])
    assert fold.largest(values).tolist() == [3, 8, 9, 8]
    assert fold.mean(values).tolist() == [2, 5, 7, 7]
    assert fold.expand(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]


def test_a_reader_that_the_plan_skips_is_scaled_too() -> None:
    build, path, _ = CASES["llama"]
    block, call = block_and_call(build, path)
    folds = find_folds(block, call, ["self_attn.q_proj"])
    assert [(fold.source, len(fold.targets)) for fold in folds] == [("input_layernorm", 3)]
    assert find_folds(block, call, []) == []


class Toy(nn.Module):
    """A norm and two layers; a test says how they are called."""

    def __init__(self, forward: Callable[[Toy, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.run = forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self.run(self, hidden)


def toy_folds(forward: Callable[[Toy, Tensor], Tensor]) -> list[tuple[str, ...]]:
    torch.manual_seed(0)
    folds = find_folds(Toy(forward), Call(torch.randn(2, 5, 8)), ["first", "second"])
    return [(fold.source, *fold.targets) for fold in folds]


def test_a_chain_of_layers_is_folded() -> None:
    assert toy_folds(lambda toy, x: toy.second(toy.first(toy.norm(x)))) == [("norm", "first"), ("first", "second")]


def residual(toy: Toy, hidden: Tensor) -> Tensor:
    normed: Tensor = toy.norm(hidden)
    return toy.first(normed) + normed  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda toy, x: toy.first(toy.norm(x)), [("norm", "first")]),
        (lambda toy, x: toy.first(toy.norm(x)) + toy.norm(x), []),
        (residual, []),
        (lambda toy, x: toy.first(nn.functional.gelu(toy.norm(x))), []),
        (lambda toy, x: toy.first(toy.norm(x)) + toy.first(x), []),
        (lambda toy, x: toy.first(toy.norm(x)) + toy.first.weight.sum() * x, []),
        (lambda toy, x: toy.first(toy.norm(x).flip(-1)), []),
        (lambda toy, x: toy.first(toy.norm(x) * 0), []),
    ],
    ids=["plain", "called twice", "residual", "curved", "mixed", "weight read", "permuted", "zero"],
)
def test_only_what_every_reader_can_take_is_folded(
    forward: Callable[[Toy, Tensor], Tensor], found: list[tuple[str, ...]]
) -> None:
    assert toy_folds(lambda toy, x: forward(toy, x) + toy.second(x.sin())) == found


def test_a_layer_that_the_call_did_not_reach_might_read_the_source() -> None:
    assert toy_folds(lambda toy, x: toy.first(toy.norm(x))) == []


def test_shared_weights_are_not_folded() -> None:
    toy = Toy(lambda toy, x: toy.second(toy.first(toy.norm(x))))
    toy.second.weight = toy.first.weight
    assert find_folds(toy, Call(torch.randn(2, 5, 8)), ["first", "second"]) == []


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_cannot_divide_is_refused_before_anything_changes(value: float) -> None:
    toy = Toy(lambda toy, x: toy.first(toy.norm(x)))
    before = {name: parameter.clone() for name, parameter in toy.named_parameters()}
    scale = torch.ones(8)
    scale[3] = value
    with pytest.raises(ValueError, match="the scale of norm is not positive and finite"):
        apply_fold(toy, Fold("norm", ("first",), 8, 1, 8), scale)
    assert all(torch.equal(before[name], parameter) for name, parameter in toy.named_parameters())


def test_a_block_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(InputError, match=r"block of this model \(Toy\) returns dict, not a tensor"):
        find_folds(Toy(lambda toy, x: {"hidden": x}), Call(torch.randn(2, 5, 8)), ["first"])  # type: ignore[arg-type, return-value]
