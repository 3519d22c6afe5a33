"""Plans: what becomes of every tensor, decided from names, shapes and dtypes alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.artifacts import CHECKPOINT_SCHEMES
from support.plans import infos, plan_of

from quantcli.checkpoint import open_checkpoint
from quantcli.conversion.checkpoint.rows import plan_rows
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError, UsageError
from quantcli.planning.plan import LayerPlan, Loader, Plan, left_linear_modules, quantization_config
from quantcli.planning.recipe import Recipe, Rule, validate
from quantcli.planning.resolve import resolve

LINEAR = {"blk.0.up.weight": (256, 128), "blk.0.up.bias": (256,), "blk.0.down.weight": (128, 256)}
WARNING_OF_EXPERTS = "1 expert weights, 94% of the model, are left unquantized: compressed-tensors cannot carry fused"


def layer(plan: Plan, name: str) -> LayerPlan:
    return next(layer for layer in plan.layers if layer.info.name == name)


def labels(plan: Plan) -> dict[str, str]:
    return {layer.info.name: layer.label for layer in plan.quantized}


def refusal(error: type[UsageError | InputError], tensors: list[TensorInfo] | Path, **recipe: Any) -> str:
    with pytest.raises(error) as caught:
        plan_of(tensors, **recipe)
    return str(caught.value)


# What each kind of tensor becomes.


def test_llama(models: Path) -> None:
    plan = plan_of(models / "llama")
    quantized = {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qkvo"}
    quantized |= {f"model.layers.{i}.mlp.{x}_proj.weight" for i in (0, 1) for x in ("gate", "up", "down")}
    assert labels(plan) == dict.fromkeys(quantized, "int4")
    reasons = {layer.info.name: layer.reason for layer in plan.layers if layer.reason}
    assert reasons["model.norm.weight"] == "norm: tiny, and sensitive"
    assert reasons["lm_head.weight"].startswith("output head")
    assert "embedding" in reasons["model.embed_tokens.weight"]
    assert (plan.format, plan.algorithm, plan.dtype) == ("compressed-tensors", "mse", "BF16")


def test_bert_keeps_its_biases(models: Path) -> None:
    plan = plan_of(models / "bert", scheme="int8")
    assert all(name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight")) for name in labels(plan))
    assert len(labels(plan)) == 2 * 6 + 1
    assert layer(plan, "pooler.dense.bias").reason == "bias: tiny, and sensitive"


def test_a_tied_head_that_is_not_stored_is_named_for_the_runtime(models: Path) -> None:
    assert "lm_head" in left_linear_modules(plan_of(models / "tied"))


def test_a_tied_head_that_is_stored_stays_and_a_rule_for_it_is_refused() -> None:
    tensors = infos(LINEAR | {"embed_tokens.weight": (96, 128), "lm_head.weight": (96, 128)})
    plan = plan_of(tensors, {"tie_word_embeddings": True})
    assert layer(plan, "lm_head.weight").reason == "output head, tied to the embedding"
    assert not layer(plan, "lm_head.weight").dropped
    for match in ("lm_head", "lm_*"):
        with pytest.raises(UsageError, match="has to stay as it is: output head, tied to the embedding"):
            plan_of(tensors, {"tie_word_embeddings": True}, rules=[{"match": match, "scheme": "int8"}])


def test_a_head_of_its_own_is_quantized_when_a_rule_asks(models: Path) -> None:
    plan = plan_of(models / "llama", rules=[{"match": "lm_head", "scheme": "int8"}])
    assert labels(plan)["lm_head.weight"] == "int8"
    assert "lm_head" not in left_linear_modules(plan)


def test_a_shared_tensor_of_a_torch_file_is_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(96, 128)
    torch.save(
        {"embed_tokens.weight": weight, "up.weight": torch.randn(64, 128), "lm_head.weight": weight}, tmp_path / "m.pt"
    )
    for scheme in ("int4", "fp16"):
        plan, layout, _ = plan_rows(open_checkpoint(tmp_path / "m.pt"), Recipe(scheme=scheme))
        head = layer(plan, "lm_head.weight")
        assert (head.dropped, head.reason) == (True, "tied to embed_tokens.weight: stored once")
        assert "embed_tokens.weight" in layout.specs and "lm_head.weight" not in layout.specs


@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe"])
def test_routers_stay_in_fp32_while_experts_are_quantized(models: Path, model: str) -> None:
    plan = plan_of(models / model)
    routers = [each for each in plan.layers if each.role == "router"]
    assert len(routers) == (2 if model == "mixtral" else 4)
    assert {(each.reason, each.dtype) for each in routers} == {("router: decides which expert runs", "F32")}
    assert sum(".experts." in name for name in labels(plan)) == 2 * 4 * 3


def test_fused_experts_are_left_with_a_warning() -> None:
    tensors = infos({"mlp.experts.gate_up_proj": (8, 128, 128), "mlp.up.weight": (64, 128)})
    plan = plan_of(tensors)
    assert labels(plan) == {"mlp.up.weight": "int4"}
    assert [warning for warning in plan.warnings if warning.startswith(WARNING_OF_EXPERTS)]
    assert not plan_of(tensors, scheme="fp16").warnings


def test_experts_that_the_runtime_fuses_are_left_with_a_warning(models: Path) -> None:
    plan = plan_of(models / "mixtral", scheme="nf4")
    assert labels(plan).keys() == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qkvo"}
    assert "24 expert weights, 83% of the model, are left unquantized: transformers 5 fuses" in plan.warnings[0]


def test_transposed_conv1d_is_carried_by_nf4_alone(models: Path) -> None:
    message = refusal(InputError, models / "gpt2")
    assert "transposed Conv1D layers; nf4 does" in message
    assert "Use --scheme nf4, whose codes are chosen without data, or from data with --algorithm gptq or awq" in message
    plan = plan_of(models / "gpt2", scheme="nf4")
    weights = {
        f"transformer.h.{i}.{x}.weight"
        for i in (0, 1)
        for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert labels(plan).keys() == weights
    narrow = layer(plan, "transformer.h.0.mlp.c_fc.weight")
    assert (narrow.info.shape, narrow.matrix_shape, narrow.transposed) == ((128, 512), (512, 128), True)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("conv.weight", (16, 16, 3, 3), "compressed-tensors carries only linear layers"),
        ("conv1.weight", (64, 64, 3), "compressed-tensors carries only linear layers"),
        ("embed_tokens.weight", (96, 128), "transformers cannot load a quantized embedding in compressed-tensors"),
        ("norm.weight", (128,), "norm: tiny, and sensitive"),
        ("alpha", (4, 128), "not the weight of a layer"),
        ("scalar", (), "not the weight of a layer"),
        ("empty.weight", (0, 128), "empty"),
    ],
)  # fmt: skip
def test_tensors_that_are_left_say_why(name: str, shape: tuple[int, ...], reason: str) -> None:
    plan = plan_of(infos(LINEAR | {name: shape}))
    assert layer(plan, name).reason == reason
    assert not layer(plan, name).has_codes


def test_integers_are_copied() -> None:
    plan = plan_of(infos(LINEAR | {"ids": (4,)}, ids="I64"), rest="fp16")
    assert (layer(plan, "ids").reason, layer(plan, "ids").dtype) == ("not floating point", "I64")


# Group sizes.


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (192, 64), (96, 32), (48, 16)])
def test_the_largest_group_size_that_divides_is_taken_and_said(columns: int, size: int) -> None:
    plan = plan_of(infos({"up.weight": (64, columns)}))
    scheme = layer(plan, "up.weight").scheme
    assert scheme is not None and scheme.weights.granularity.size == size
    said = [f"1 layers use group {size}: 128 does not divide {columns}."] if size != 128 else []
    assert list(plan.warnings) == said


def test_columns_that_no_group_size_divides_are_left() -> None:
    plan = plan_of(infos(LINEAR | {"odd.weight": (64, 100)}))
    assert layer(plan, "odd.weight").reason == "no group size of 128, 64, 32, 16 divides 100"
    alone = infos({"odd.weight": (64, 100)})
    assert "--scheme int8 has one scale for a row" in refusal(InputError, alone, scheme="int4")
    assert plan_of(alone, scheme="int8").quantized


def test_nf4_falls_back_to_a_block_that_bitsandbytes_has() -> None:
    plan = plan_of(infos({"a.weight": (32, 96), "b.weight": (32, 80), "c.weight": (64, 64)}), scheme="nf4")
    sizes = {each.info.name: each.scheme.weights.granularity.size for each in plan.quantized if each.scheme}
    assert sizes == {"a.weight": 32, "c.weight": 64}


def test_nf4_leaves_what_the_kernels_of_processors_do_not_take() -> None:
    plan = plan_of(infos({"head.weight": (2, 64), "fc.weight": (64, 64), "odd.weight": (64, 40)}), scheme="nf4")
    assert [layer.info.name for layer in plan.quantized] == ["fc.weight"]
    reasons = {layer.info.name: layer.reason for layer in plan.layers}
    assert reasons["head.weight"] == "bitsandbytes' kernel for processors takes rows in multiples of 32, not 2"
    assert "divides 40" in (reasons["odd.weight"] or "")


def test_nf4_keeps_weights_in_one_dtype() -> None:
    """What stands beside codes is multiplied in the dtype that it is stored in: a router in FP32 would not run."""
    shapes = {"moe.experts.0.w1.weight": (64, 64), "moe.gate.weight": (4, 64), "fc.weight": (64, 64), "A_log": (8, 8)}
    dtypes = {layer.info.name: layer.dtype for layer in plan_of(infos(shapes), scheme="nf4").layers}
    assert dtypes["moe.gate.weight"] == "BF16"
    assert dtypes["A_log"] == "F32"
    dtypes = {layer.info.name: layer.dtype for layer in plan_of(infos(shapes), scheme="int8").layers}
    assert dtypes["moe.gate.weight"] == "F32"


def test_shared_experts_have_groups_of_the_size_of_all_experts() -> None:
    # transformers may take the scheme of the shared ones for that of all.
    shapes = {"mlp.experts.0.down.weight": (128, 64), "mlp.shared_experts.up.weight": (64, 128), "q.weight": (128, 128)}
    schemes = {layer.info.name: layer.scheme for layer in plan_of(infos(shapes), scheme="int4").layers}
    sizes = {name: scheme.weights.granularity.size for name, scheme in schemes.items() if scheme}
    assert sizes == dict(zip(shapes, (64, 64, 128), strict=True))


def test_a_plan_heeds_what_the_loader_does() -> None:
    tensors = infos({"a.weight": (64, 64), "b.weight": (64, 64), "c.weight": (64, 64), "d.weight": (64, 64)})
    loader = Loader(
        "Net",
        modules={"a": "renamed"},
        absent=("pooler.dense",),
        leave={"a.weight": "no such weight"},
        unpacked=frozenset({"b.weight"}),
        weights_only=frozenset({"c.weight"}),
    )
    recipe = Recipe(scheme="int8")
    plan = resolve(recipe, tensors, None, loader=loader)
    section = quantization_config(plan)
    assert section is not None
    ignored = [pattern.removeprefix("re:") for pattern in section["ignore"]]
    for name in ("a", "renamed", "pooler.dense"):
        assert any(re.match(pattern, name) for pattern in ignored), name
    assert {group["format"] for group in section["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    assert any("1 weights are left: no such weight" in warning for warning in plan.warnings)

    dynamic = resolve(Recipe(scheme="int8-dynamic"), tensors, None, loader=replace(loader, unpacked=frozenset()))
    inputs = {each.info.name: each.scheme.inputs is not None for each in dynamic.quantized if each.scheme}
    assert inputs == {"b.weight": True, "c.weight": False, "d.weight": True}

    for fits_nf4 in (True, False):
        with pytest.raises(InputError, match="Net reads its weight, and packed codes have none") as caught:
            resolve(Recipe(scheme="int4"), tensors[1:2], None, loader=replace(loader, fits_nf4=fits_nf4))
        assert ("Use --scheme nf4, whose codes" in str(caught.value)) == fits_nf4
        assert "--scheme int8, which is stored in codes that it reads" in str(caught.value)


def test_a_pattern_for_what_is_left_means_nothing_quantized_by_its_loaded_name() -> None:
    # Of two layers with one name in the class, the small one is left.
    tensors = infos({f"layers.{n}.attention.g.weight": (rows, 64) for n, rows in ((0, 64), (1, 4))})
    loader = Loader("Net", modules={f"layers.{n}.attention.g": f"model.layers.{n}.attn.g" for n in (0, 1)})
    plan = resolve(Recipe(scheme="nf4"), tensors, None, loader=loader)
    section = quantization_config(plan)
    assert section is not None
    skipped = section["llm_int8_skip_modules"]
    assert any(re.match(pattern, "model.layers.1.attn.g") for pattern in skipped)
    assert not any(re.match(pattern, "model.layers.0.attn.g") for pattern in skipped)


@pytest.mark.parametrize(
    "recipe",
    [
        {"group_size": 96},
        {"rules": [{"match": "*", "group_size": 96}]},
        {"scheme": {"weights": {"dtype": "int4", "granularity": "group", "group_size": 96}}},
        {"rules": [{"match": "*", "scheme": {"weights": {"dtype": "int4", "granularity": "group", "group_size": 96}}}]},
    ],
    ids=["flag", "rule", "scheme", "scheme of a rule"],
)
def test_a_group_size_that_was_asked_for_and_does_not_divide_is_refused(recipe: dict[str, Any]) -> None:
    message = refusal(UsageError, infos(LINEAR | {"fits.weight": (64, 192)}), **recipe)
    assert "The group size 96 does not divide the columns of 2 layers: blk.0.up, blk.0.down." in message


def test_many_layers_are_counted_rather_than_listed() -> None:
    tensors = infos({f"layer{i}.weight": (64, 100) for i in range(9)})
    assert "of 9 layers: layer0, layer1, layer2, layer3 and 5 more." in refusal(UsageError, tensors, group_size=64)


def test_a_group_size_for_a_scheme_without_groups_is_refused() -> None:
    assert "--group-size does not apply to int8" in refusal(UsageError, infos(LINEAR), scheme="int8", group_size=64)


# Rules.


def test_the_first_rule_that_matches_wins() -> None:
    rules = [{"match": "*.down", "scheme": "int8"}, {"match": "*", "skip": True}]
    assert labels(plan_of(infos(LINEAR), rules=rules)) == {"blk.0.down.weight": "int8"}
    assert labels(plan_of(infos(LINEAR), rules=[*rules[:1], {"match": "*down*", "skip": True}])) == {
        "blk.0.up.weight": "int4",
        "blk.0.down.weight": "int8",
    }


def test_skip_beats_rules_and_matches_tensor_or_layer() -> None:
    for glob in ("blk.0.up", "blk.0.up.weight", "*.up*"):
        plan = plan_of(infos(LINEAR), skip=[glob], rules=[{"match": "*", "scheme": "int8"}])
        assert labels(plan) == {"blk.0.down.weight": "int8"}
        assert layer(plan, "blk.0.up.weight").reason == "skipped as asked"


def test_a_rule_may_choose_algorithm_and_group_size_alone() -> None:
    plan = plan_of(infos(LINEAR), rules=[{"match": "*.up", "algorithm": "rtn", "group_size": 32}])
    up, down = layer(plan, "blk.0.up.weight"), layer(plan, "blk.0.down.weight")
    assert (up.algorithm, str(up.scheme)) == ("rtn", "int4, group 32")
    assert (down.algorithm, str(down.scheme)) == ("mse", "int4, group 128")
    assert plan.algorithm == "mse and rtn"


def test_eight_bits_are_rounded_and_four_bits_searched() -> None:
    plan = plan_of(infos(LINEAR), rules=[{"match": "*.down", "scheme": "int8"}])
    assert [each.algorithm for each in plan.quantized] == ["mse", "rtn"]


@pytest.mark.parametrize("key", ["skip", "rules"])
def test_a_glob_that_matches_nothing_is_refused(key: str) -> None:
    recipe = {"skip": ["blk.0.upp"]} if key == "skip" else {"rules": [{"match": "blk.0.upp", "skip": True}]}
    assert refusal(UsageError, infos(LINEAR), **recipe) == "'blk.0.upp' matches no layer. Did you mean 'blk.0.up'?"
    assert "quantcli inspect MODEL --layers" in refusal(UsageError, infos(LINEAR), skip=["zzzz"])


# What is not quantized.


@pytest.mark.parametrize(
    ("before", "rest", "after"),
    [
        ("F32", "auto", "BF16"), ("F32", "keep", "F32"), ("F32", "fp16", "F16"), ("F32", "bf16", "BF16"),
        ("F16", "auto", "F16"), ("F16", "bf16", "BF16"), ("BF16", "auto", "BF16"), ("BF16", "fp16", "F16"),
        ("F64", "auto", "BF16"),
    ],
)  # fmt: skip
def test_rest(before: str, rest: str, after: str) -> None:
    plan = plan_of(infos(LINEAR, before), rest=rest)
    assert (layer(plan, "blk.0.up.bias").dtype, plan.dtype) == (after, after)


def test_fp32_among_16_bits_is_kept_unless_asked() -> None:
    tensors = infos(LINEAR, "BF16", blk__0__up__bias="F32")
    for scheme in ("int4", "fp16"):
        assert layer(plan_of(tensors, scheme=scheme), "blk.0.up.bias").dtype == "F32"
    assert layer(plan_of(tensors, rest="bf16"), "blk.0.up.bias").dtype == "BF16"
    assert layer(plan_of(tensors, scheme="fp16", rest="fp16"), "blk.0.up.bias").dtype == "F16"


def test_parameters_and_routers_stay_in_fp32_unless_asked() -> None:
    tensors = infos(LINEAR | {"A_log": (16,), "mlp.experts.0.up.weight": (64, 128), "mlp.gate.weight": (4, 128)})
    for name in ("A_log", "mlp.gate.weight"):
        assert layer(plan_of(tensors), name).dtype == "F32"
        assert layer(plan_of(tensors, rest="bf16"), name).dtype == "BF16"


@pytest.mark.parametrize(("scheme", "dtype"), [("fp16", "F16"), ("bf16", "BF16")])
def test_casts_take_every_float_but_what_is_skipped(scheme: str, dtype: str) -> None:
    plan = plan_of(
        infos(LINEAR | {"ids": (4,), "same": (4,)}, ids="I64", same=dtype), scheme=scheme, skip=["blk.0.down"]
    )
    assert {each.info.name: each.dtype for each in plan.layers} == {
        "blk.0.up.weight": dtype, "blk.0.up.bias": dtype, "blk.0.down.weight": "F32", "ids": "I64", "same": dtype,
    }  # fmt: skip
    assert layer(plan, "same").reason == "already so"


@pytest.mark.parametrize("rest", ["auto", "keep", "fp16", "bf16"])
def test_a_cast_model_is_declared_as_what_it_was_cast_to(rest: str) -> None:
    assert plan_of(infos(LINEAR), scheme="fp16", rest=rest).dtype == "F16"


# Refusals.


@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    [
        ("q.weight_packed", "I32", "compressed-tensors"),
        ("q.qweight", "I32", "gptq or awq"),
        ("q.weight.quant_state.bitsandbytes__nf4", "U8", "bitsandbytes"),
        ("q.weight", "F8_E4M3", "fp8"),
    ],
)
def test_what_is_quantized_already_is_refused(name: str, dtype: str, method: str) -> None:
    tensors = infos(LINEAR | {name: (4, 4)}, **{name.replace(".", "__"): dtype})
    assert f"already quantized ({method})" in refusal(InputError, tensors, scheme="fp16")


def test_a_declared_quantization_is_refused() -> None:
    with pytest.raises(InputError, match=r"already quantized \(awq\)"):
        plan_of(infos(LINEAR), {"quantization_config": {"quant_method": "awq"}})


def test_nothing_to_quantize() -> None:
    message = refusal(InputError, infos({"embed_tokens.weight": (96, 128), "norm.weight": (128,)}))
    assert "Nothing in this model can be quantized with int4 as compressed-tensors: 1 x transformers cannot" in message
    assert "no layer has weights" in refusal(InputError, infos({"norm.weight": (128,)}))
    assert "already so" in refusal(InputError, infos(LINEAR, "BF16"), scheme="bf16")


def test_a_scheme_is_needed() -> None:
    with pytest.raises(UsageError, match="Choose one with --scheme: fp16, bf16, int8, int4"):
        resolve(Recipe(), infos(LINEAR), None)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"scheme": "nf4", "format": "compressed-tensors"}, "int8 weights, not nf4. Use --format bitsandbytes."),
        ({"scheme": "int8", "format": "bitsandbytes"}, "nf4 weights, not int8. Use --format compressed-tensors."),
        ({"scheme": "bf16", "format": "compressed-tensors"}, "Use --format safetensors."),
        ({"scheme": "int8-dynamic", "format": "safetensors"}, "Use --format compressed-tensors."),
        ({"format": "compressed_tensors"}, "Unknown format 'compressed_tensors'. Did you mean 'compressed-tensors'?"),
        ({"algorithm": "gtpq"}, "Unknown algorithm 'gtpq'. Did you mean 'gptq'?"),
        ({"algorithm": "gptq"}, "gptq needs calibration data. Name some with --data"),
        ({"scheme": "nf4", "algorithm": "mse"}, "The algorithm mse does not fit: nf4 takes its"),
        ({"rules": [{"match": "*.up", "scheme": "nf4"}]}, "int4 and int8 weights, not nf4"),
        ({"scheme": "nf4", "rules": [{"match": "*.up", "algorithm": "mse"}]}, "The algorithm mse does not fit"),
        ({"rules": [{"match": "*.up", "algorithm": "mes"}]}, "Unknown algorithm 'mes'. Did you mean 'mse'?"),
        ({"scheme": {"weights": {"dtype": "nf4", "granularity": "block", "block_size": 48}}}, "not block 48"),
        ({"scheme": {"weights": {"dtype": "int4", "granularity": "token"}}}, "No format carries it."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_go_together(recipe: dict[str, Any], said: str) -> None:
    assert said in refusal(UsageError, infos(LINEAR), **recipe)


@pytest.mark.parametrize("scheme", CHECKPOINT_SCHEMES)
@pytest.mark.parametrize("model", ["llama", "tied", "bert", "mixtral", "qwen2_moe"])
def test_every_preset_makes_every_model_smaller(models: Path, model: str, scheme: str) -> None:
    checkpoint = open_checkpoint(models / model)
    _, layout, rows = plan_rows(checkpoint, Recipe(scheme=scheme))
    assert layout.nbytes < 0.6 * checkpoint.size_bytes
    assert [row.name for row in rows] == [info.name for info in checkpoint.infos()]
    assert all((row.scheme is None) == (row.reason is not None) for row in rows)


def test_fixed_ranges_of_activations_are_symmetric_in_a_checkpoint_and_need_data(models: Path) -> None:
    checkpoint = open_checkpoint(models / "llama")
    plan, _, _ = plan_rows(checkpoint, Recipe(scheme="int8-static"))
    assert {layer.scheme.inputs for layer in plan.quantized if layer.scheme} == {NumberFormat("int8")}
    rules = [{"match": "*.q_proj", "scheme": "int8-static"}]
    for recipe in (Recipe(scheme="int8-static"), validate({"scheme": "int8", "rules": rules}, "")):
        with pytest.raises(UsageError, match="int8-static needs calibration data"):
            resolve(recipe, checkpoint.infos(), checkpoint.config)
    with pytest.raises(UsageError, match="gptq keeps inputs as they are"):
        plan_rows(checkpoint, Recipe(scheme="int8-static", format="gptq"))
    asymmetric = {"dtype": "int8", "symmetric": False}
    spelled = {"scheme": {"weights": {"dtype": "int8", "granularity": "channel"}, "inputs": asymmetric}}
    with pytest.raises(UsageError, match="symmetric inputs only"):
        plan_rows(checkpoint, validate(spelled, ""))


def test_a_layer_that_has_to_stay_is_refused_where_a_rule_names_it() -> None:
    tensors, name = infos({"encoder.weight": (64, 64), "score.weight": (64, 64), "score.bias": (64,)}), "score.weight"
    loader = Loader("Net", leave={name: "Net keeps it in float32"})
    for match in ("score", name, "sc*"):
        recipe = Recipe(scheme="int8", rules=[Rule(match=match, scheme="int4")])
        with pytest.raises(UsageError, match=r"score.* has to stay as it is: Net keeps it"):
            resolve(recipe, tensors, None, loader=loader)
    found = resolve(Recipe(scheme="int8", rules=[Rule(match="*", scheme="int4")]), tensors, None, loader=loader)
    assert layer(found, name).reason == "Net keeps it in float32"
    assert found.warnings[0] == "The rule for '*' means score as well, which stays as it is: Net keeps it in float32."
    # A search lists layers, and what stays of them is told.
    listed = Recipe(scheme="int8", rules=[Rule(match=["encoder", "score"], scheme="int4")])
    assert "means score as well, which stays" in resolve(listed, tensors, None, loader=loader).warnings[0]
    # What a rule says of a layer's weight, it need not say of its bias.
    assert not resolve(Recipe(scheme="int8", rules=[Rule(match="score", scheme="int8")]), tensors, None).warnings


@pytest.mark.parametrize(
    ("form", "scheme", "said"),
    [
        ("bitsandbytes", "nf4", "kernel for processors takes rows in multiples of 32, not 3"),
        ("gptq", "int8", "gptq packs 4 values into a word, and 3 x 64 does not divide"),
        ("awq", "int4", "awq packs 8 outputs into a word, and 3 does not divide"),
        ("compressed-tensors", "int8", None),
        ("gguf", "int8", None),
    ],
)
def test_a_rule_for_a_layer_that_a_format_has_no_room_for_is_refused(form: str, scheme: str, said: str | None) -> None:
    tensors = infos({"encoder.weight": (64, 64), "score.weight": (3, 64), "conv.weight": (8, 4, 3, 3)})
    recipe = Recipe(scheme=scheme, format=form, rules=[Rule(match="score", scheme=scheme)])
    if said is None:
        assert layer(resolve(recipe, tensors, None), "score.weight").scheme
    else:
        with pytest.raises(UsageError, match=f"A rule names score, which has to stay as it is: .*{said}"):
            resolve(recipe, tensors, None)
    if form != "gguf":
        recipe = Recipe(scheme=scheme, format=form, rules=[Rule(match="conv", scheme=scheme)])
        with pytest.raises(UsageError, match=r"A rule names conv, which has to stay as it is: .*(linear|convolutions)"):
            resolve(recipe, tensors, None)


def test_a_rule_that_others_leave_nothing_to_is_told() -> None:
    tensors = infos({"a.weight": (64, 64), "b.weight": (64, 64)})
    plan = plan_of(tensors, skip=["b"], rules=[{"match": "b", "scheme": "int4"}])
    assert plan.warnings[0].startswith("The rule for 'b' holds for no layer")


def test_a_rule_casts_what_its_author_kept_in_32_bits() -> None:
    tensors = [*infos({"a.weight": (64, 64)}, "BF16"), *infos({"norm.weight": (64,), "b.weight": (4, 4)}, "F32")]
    plan = plan_of(tensors, scheme="fp16", rules=[{"match": "norm", "scheme": "bf16"}])
    assert {entry.info.name: entry.dtype for entry in plan.layers} == {
        "a.weight": "F16", "norm.weight": "BF16", "b.weight": "F32",
    }  # fmt: skip
