"""Targets: what a runtime would not load is refused before work, and what is near it is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.artifacts import loaded, logits, reference
from support.plans import infos, plan_of

from quantcli import convert
from quantcli.cli.app import main
from quantcli.errors import UsageError
from quantcli.planning.plan import Loader, Plan, quantization_config
from quantcli.planning.recipe import Recipe, validate
from quantcli.planning.resolve import resolve
from quantcli.planning.targets import completed, for_target, onnxruntime, serving
from quantcli.planning.targets import transformers as rules_of_transformers

CHECKED = {**rules_of_transformers.CHECKED, **serving.CHECKED, **onnxruntime.CHECKED}

Shapes = dict[str, tuple[int, ...]]


def weights(dtype: str, granularity: str, size: int | None = None, *, symmetric: bool = True) -> dict[str, Any]:
    group = {"group_size": size} if size else {}
    return {"weights": {"dtype": dtype, "granularity": granularity, "symmetric": symmetric} | group}


ASYMMETRIC = weights("int4", "group", 64, symmetric=False)
ASYMMETRIC_8 = weights("int8", "channel", symmetric=False)
GPTQ, AWQ = {"format": "gptq"}, {"format": "awq"}
#: int8 weights beside inputs of fixed ranges; what these are, calibration finds out later.
STATIC = {"scheme": "int8-static", "data": True}
ATTENTION = ["*.q_proj", "*.k_proj", "*.v_proj"]


def decoder(blocks: int = 2, head: bool = True) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (96, 128)}
    for block in range(blocks):
        for name in "qkvo":
            shapes[f"model.layers.{block}.self_attn.{name}_proj.weight"] = (128, 128)
        for name, shape in {"gate": (256, 128), "up": (256, 128), "down": (128, 256)}.items():
            shapes[f"model.layers.{block}.mlp.{name}_proj.weight"] = shape
    return shapes | ({"lm_head.weight": (96, 128)} if head else {})


def mixture(count: int = 4, width: int = 256) -> Shapes:
    shapes: Shapes = {"model.layers.0.mlp.gate.weight": (count, 128)}
    for expert in range(count):
        for name, shape in {"gate": (width, 128), "up": (width, 128), "down": (128, width)}.items():
            shapes[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] = shape
    return decoder(1) | {name: shape for name, shape in shapes.items() if ".mlp.gate_proj" not in name}


def planned(shapes: Shapes, target: str | None, config: dict[str, Any] | None = None, **recipe: Any) -> Plan:
    data = recipe.pop("data", False)
    wishes = {"scheme": "int4"} | recipe | ({"target": target} if target else {})
    return resolve(validate(wishes, "recipe.yaml"), infos(shapes), config, data=data)


def refused(plan: Plan) -> str | None:
    """What is said of a plan; None where it may go on. All that every refusal has is checked here."""
    try:
        assert for_target(plan) == plan
    except UsageError as error:
        assert error.hint and error.exit_code == 2
        runtime, _ = plan.recipe.runtime
        assert str(error).startswith(f"--target {plan.recipe.target}: ")
        assert f"(checked on {CHECKED[runtime or '']})." in str(error)
        return str(error)
    return None


def rule(match: str | list[str], **wish: Any) -> dict[str, Any]:
    return {"rules": [{"match": match} | wish]}


SHARED = mixture() | {"model.layers.0.mlp.shared_experts.down_proj.weight": (128, 256)}
FUSED_3D = decoder(1) | {"model.layers.0.mlp.experts.gate_up_proj": (8, 128, 128)}
#: Of each line: the model, the target, the recipe, and what the refusal says, or None where there is none.
CASES: dict[str, tuple[Shapes, str, dict[str, Any], str | None]] = {
    "a checkpoint for onnxruntime": (decoder(), "onnxruntime", {}, "onnxruntime loads ONNX, not compressed-tensors"),
    "a cast for onnxruntime": (decoder(), "onnxruntime", {"scheme": "fp16"}, "loads ONNX, not safetensors"),
    "a cast elsewhere": (decoder(), "vllm", {"scheme": "fp16"}, None),
    "before compressed-tensors": (decoder(), "transformers==4.44", {}, "reads compressed-tensors from 4.45 on"),
    "since compressed-tensors": (decoder(), "transformers==4.45", {}, None),
    "before gptq": (decoder(), "transformers==4.31.0", GPTQ, "reads gptq from 4.32 on"),
    "since gptq": (decoder(), "transformers==4.32.0", GPTQ, None),
    "before awq": (decoder(), "transformers==4.9", AWQ, "reads awq from 4.35 on"),
    "before NF4 could be saved": (decoder(), "transformers==4.36", {"scheme": "nf4"}, "bitsandbytes from 4.37 on"),
    "a cast for any version": (decoder(), "transformers==4.0", {"scheme": "bf16"}, None),
    "NF4 in vLLM": (decoder(), "vllm", {"scheme": "nf4"}, "plug-in vllm-bnb-plugin"),
    "NF4 in vLLM since it went": (decoder(), "vllm==0.28", {"scheme": "nf4"}, "no bitsandbytes of its own since 0.28"),
    "NF4 in an older vLLM": (decoder(), "vllm==0.27.1", {"scheme": "nf4"}, None),
    "NF4 in SGLang": (decoder(), "sglang", {"scheme": "nf4"}, None),
    "NF4 in SGLang with a layer left": (decoder(), "sglang", {"scheme": "nf4", "skip": ["*.0.mlp.down_proj"]},
                                        "model.layers.0.mlp.down_proj: left unquantized, and SGLang would take"),
    # Zero points.
    "asymmetric in transformers": (decoder(), "transformers", {"scheme": ASYMMETRIC}, "CompressedTensorsConfig(deq"),
    "asymmetric in a version": (decoder(), "transformers==5.0", {"scheme": ASYMMETRIC}, "CompressedTensorsConfig(deq"),
    "asymmetric in one layer": (decoder(), "transformers", rule("*.1.mlp.down_proj", scheme=ASYMMETRIC),
                                "model.layers.1.mlp.down_proj: asymmetric, and"),
    "asymmetric in another format": (decoder(), "transformers", GPTQ | {"scheme": ASYMMETRIC}, None),
    "asymmetric in vLLM": (decoder(), "vllm", {"scheme": ASYMMETRIC}, None),
    "asymmetric in SGLang": (decoder(), "sglang", {"scheme": ASYMMETRIC}, None),
    "asymmetric gptq in vLLM": (decoder(), "vllm", GPTQ | {"scheme": ASYMMETRIC}, "vLLM runs symmetric gptq only"),
    "asymmetric gptq in SGLang": (decoder(), "sglang", GPTQ | {"scheme": ASYMMETRIC}, "SGLang runs symmetric gptq"),
    "asymmetric awq in vLLM": (decoder(), "vllm", AWQ | {"scheme": ASYMMETRIC}, None),
    "asymmetric int8 in vLLM": (decoder(), "vllm", {"scheme": ASYMMETRIC_8}, "has zero points for int4 only"),
    "asymmetric int8 in SGLang": (decoder(), "sglang", {"scheme": ASYMMETRIC_8}, "has zero points for int4 only"),
    # Granularity.
    "one scale in vLLM": (decoder(), "vllm", {"scheme": weights("int8", "tensor")}, "scales per channel or group"),
    "one scale in transformers": (decoder(), "transformers", {"scheme": weights("int8", "tensor")}, None),
    "one scale beside quantized inputs": (decoder(), "vllm", {"scheme": weights("int8", "tensor") | {
        "inputs": {"dtype": "int8", "granularity": "token", "dynamic": True}}}, None),
    "groups of 16": (decoder(), "vllm", {"group_size": 16}, "Marlin kernel does not have, which are 32, 64, 128"),
    "groups of 16 in gptq": (decoder(), "sglang", GPTQ | {"group_size": 16}, "SGLang's Marlin kernel does not have"),
    "groups of 256": (decoder(), "sglang", rule("*.down_proj", group_size=256), "layers.0.mlp.down_proj, model.layers"),
    "groups of 16 in transformers": (decoder(), "transformers", {"group_size": 16}, None),
    "groups of 32": (decoder(), "vllm", {"group_size": 32}, None),
    "groups that fell back": ({"up.weight": (64, 48), "down.weight": (64, 64)}, "vllm", {}, "up: groups of a size"),
    "channels": (decoder(), "vllm", {"scheme": "int8"}, None),
    # Layers that become one.
    "k left": (decoder(), "vllm", {"skip": ["*.k_proj"]},
               "model.layers.0.self_attn, model.layers.1.self_attn: q_proj, v_proj int4, group 128, but k_proj unquan"),
    "k left in SGLang": (decoder(), "sglang", {"skip": ["*.k_proj"]}, "SGLang makes one layer of these"),
    "k left in transformers": (decoder(), "transformers", {"skip": ["*.k_proj"]}, None),
    "attention left": (decoder(), "vllm", {"skip": ATTENTION}, None),
    "o left": (decoder(), "sglang", {"skip": ["*.o_proj"]}, None),
    "up in 8 bits": (decoder(), "vllm", rule("*.up_proj", scheme="int8"), "int4, group 128, but up_proj int8"),
    "down in 8 bits": (decoder(), "vllm", rule("*.down_proj", scheme="int8"), None),
    "groups of another size": (decoder(), "vllm", rule("*.q_proj", group_size=32), "q_proj int4, group 32, but k_proj"),
    "other zero points": (decoder(), "vllm", rule("*.gate_proj", scheme=ASYMMETRIC), "group 64, asymmetric, but up_pr"),
    "an encoder's k left": ({f"encoder.layer.0.attention.self.{name}.weight": (128, 128) for name in
                             ("query", "key", "value")}, "vllm", {"skip": ["*.key"]}, "but key unquantized"),
    "w3 left": ({f"layers.0.feed_forward.w{i}.weight": (128, 128) for i in (1, 2, 3)}, "vllm",
                {"skip": ["*.w3"]}, "w1 int4, group 128, but w3 unquantized"),
    "w2 left": ({f"layers.0.feed_forward.w{i}.weight": (128, 128) for i in (1, 2, 3)}, "vllm",
                {"skip": ["*.w2"]}, None),
    "one of two mixers left": ({f"layers.0.linear_attn.in_proj_{name}.weight": (128, 128) for name in
                                ("qkv", "z", "a", "b")}, "sglang", {"skip": ["*.in_proj_z"]}, "but in_proj_z unquant"),
    "one of two gates left": ({f"layers.0.linear_attn.in_proj_{name}.weight": (128, 128) for name in
                               ("qkv", "z", "a", "b")}, "vllm", {"skip": ["*.in_proj_a"]}, "but in_proj_a unquant"),
    "latent attention": ({f"layers.0.self_attn.{name}.weight": (128, 128) for name in
                          ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")}, "vllm", {"skip": ["*.q_a_proj"]},
                         "q_a_proj unquantized, but kv_a_proj_with_mqa int4"),
    # Exceptions that are looked for under another name.
    "attention in 8 bits": (decoder(), "vllm", rule(ATTENTION, scheme="int8"), None),
    "attention in 8 bits in SGLang": (decoder(), "sglang", rule(ATTENTION, scheme="int8"), "under the name qkv_proj"),
    "all but attention in 8 bits": (decoder(), "sglang", rule(["*.o_proj", "*.down_proj"], scheme="int8"), None),
    "attention in 8 bits in gptq": (decoder(), "vllm", GPTQ | rule(ATTENTION, scheme="int8"),
                                    "looks for the exceptions of gptq under the name qkv_proj"),
    "down in 8 bits in gptq": (decoder(), "vllm", GPTQ | rule("*.down_proj", scheme="int8"), None),
    "attention left in gptq": (decoder(), "vllm", GPTQ | {"skip": ATTENTION}, None),
    "attention left in gptq in SGLang": (decoder(), "sglang", GPTQ | {"skip": ATTENTION},
                                         "left unquantized, and SGLang looks for the exceptions of gptq"),
    "attention left in awq in SGLang": (decoder(), "sglang", AWQ | {"skip": ATTENTION}, None),
    "a block's attention left in awq": (decoder(), "sglang", AWQ | {"skip": ["*.0.self_attn.?_proj"]}, "name qkv_proj"),
    "attention left in SGLang": (decoder(), "sglang", {"skip": ATTENTION}, None),
    "mixed gptq in transformers": (decoder(), "transformers", GPTQ | rule("*.down_proj", scheme="int8"),
                                   "the layers have 2 schemes (int4, group 128, int8, channel)"),
    "mixed in transformers": (decoder(), "transformers", rule("*.down_proj", scheme="int8"), None),
    # Heads.
    "a head like all others": (decoder(), "vllm", rule("lm_head", scheme="int4"), "lm_head: an output head with the"),
    "a head like all others in SGLang": (decoder(), "sglang", rule("lm_head", scheme="int4"), "only where its scheme"),
    "a head of its own scheme": (decoder(), "vllm", rule("lm_head", scheme="int8"), None),
    "a quantized head in transformers": (decoder(), "transformers", rule("lm_head", scheme="int4"), None),
    # Experts.
    "fused experts in vLLM": (FUSED_3D, "vllm", {}, "experts.gate_up_proj: experts that stay unquantized"),
    "fused experts in SGLang": (FUSED_3D, "sglang", {"scheme": "int8"}, "experts that stay unquantized"),
    "fused experts in transformers": (FUSED_3D, "transformers", {}, None),
    "fused experts that are skipped": (FUSED_3D, "transformers", {"skip": ["*experts*"]}, None),
    "fused experts cast": (FUSED_3D, "vllm", {"scheme": "bf16"}, None),
    "experts": (mixture(), "vllm", {}, None),
    "experts in SGLang": (mixture(), "sglang", {}, None),
    "experts in transformers": (mixture(), "transformers", {}, None),
    "experts with quantized inputs": (mixture(), "vllm", {"scheme": "int8-dynamic"}, None),
    "experts with fixed ranges of inputs": (mixture(), "vllm", STATIC, "whose inputs have fixed ranges, which vLLM"),
    "fixed ranges of inputs": (decoder(), "vllm", STATIC, None),
    "experts with quantized inputs in SGLang": (mixture(), "sglang", {"scheme": "int8-dynamic"}, "SGLang does not run"),
    "experts beside quantized inputs": (mixture(), "sglang", rule("*.o_proj", scheme="int8-dynamic"), "or beside "),
    "experts with quantized inputs in transformers": (mixture(), "transformers", {"scheme": "int8-dynamic"},
                                                      "experts with quantized inputs, which transformers"),
    "experts when they were modules": (mixture(), "transformers==4.57", {"scheme": "int8-dynamic"}, None),
    "experts left in transformers": (mixture(), "transformers", {"skip": ["*.experts.*"]}, None),
    "an expert left in transformers": (mixture(), "transformers", {"skip": ["*.experts.1.*"]}, "takes those of a comp"),
    "experts left": (mixture(), "vllm", {"skip": ["*.experts.*"]}, None),
    "experts left in gptq": (mixture(), "vllm", GPTQ | {"skip": ["*.experts.*"]}, "takes those of a gptq model"),
    "experts left by NF4": (mixture(), "sglang", {"scheme": "nf4"}, "takes those of a bitsandbytes model"),
    "down projections of experts": (mixture(), "vllm", rule("*.experts.*.down_proj", scheme="int8"),
                                    "model.layers.0.mlp.experts: gate_proj, up_proj int4, group 128, but down_proj i"),
    "narrow experts": (mixture(width=64), "vllm", {}, None),
    "experts in groups of two sizes": (mixture(width=64), "vllm", rule("*.experts.*.up_proj", scheme="int4",
                                       group_size=32), "gate_proj, down_proj int4, group 64, but up_proj int4, group"),
    "groups of two sizes in transformers": (mixture(width=64), "transformers", rule("*.experts.*.up_proj",
                                            scheme="int4", group_size=32), "experts of groups of 32 and groups of 64"),
    "narrow experts in groups that fit": (mixture(width=64), "vllm", {"group_size": 64}, None),
    "narrow experts in transformers": (mixture(width=64), "transformers", {}, None),
    "down projections in transformers": (mixture(), "transformers", rule("*.experts.*.down_proj", scheme="int8"),
                                         "experts of int4 and int8: gate_proj, up_proj int4, group 128, but down_proj"),
    "shared experts in transformers": (SHARED, "transformers", rule("*.shared_experts.*", scheme="int8"), "of int4 an"),
    "a shared expert in transformers": (mixture() | {"model.layers.0.mlp.shared_expert.down_proj.weight": (128, 256)},
                                        "transformers", rule("*.shared_expert.*", scheme="int8"), None),
    "one expert": (mixture(), "transformers", rule("*.experts.0.*", scheme="int8"),
                   "0.gate_proj, 0.up_proj, 0.down_proj int8, channel, but 1.gate_proj, 1.up_proj, 1."),
    "all experts": (mixture(), "transformers", rule("*.experts.*", scheme="int8"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_and_what_is_near(case: str) -> None:
    shapes, target, recipe, said = CASES[case]
    found = refused(planned(shapes, target, **recipe))
    assert found is None if said is None else said in (found or "nothing was refused")


@pytest.mark.parametrize("case", CASES)
def test_without_a_target_nothing_is_refused_but_transformers_is_warned_of(case: str) -> None:
    shapes, _, recipe, _ = CASES[case]
    said = refused(planned(shapes, "transformers", **recipe))
    plan = planned(shapes, None, **recipe)
    warned = for_target(plan)
    assert warned.layers == plan.layers and for_target(warned) == warned
    more = warned.warnings[len(plan.warnings) :]
    assert bool(more) == (said is not None)
    assert all(warning.endswith(f"(checked on {CHECKED['transformers']}).") for warning in more)
    if said:
        assert said.startswith(f"--target transformers: {more[0].removeprefix('In transformers: ')}")


def test_many_layers_are_counted() -> None:
    found = refused(planned(decoder(9), "vllm", skip=["*.k_proj"]))
    assert found and "model.layers.3.self_attn and 5 more: q_proj" in found


# What the runtimes look up, transcribed as simply as can be, beside what is refused.


def looked_up(section: dict[str, Any], runtime: str, prefix: str, parts: tuple[str, ...], fused: str) -> Any:
    """What a runtime takes a fused layer for: its settings, or None for unquantized."""
    parent = prefix.rpartition(".")[0]
    names = [f"{parent}.{part}" for part in parts]
    if section["quant_method"] == "gptq":
        base = {key: section[key] for key in ("bits", "group_size", "sym")}
        modules = [name for group in section.get("modules_in_block_to_quantize", []) for name in group]
        if runtime == "vllm" and modules and not any(module in names[0] for module in modules):
            return None
        for pattern, settings in section.get("dynamic", {}).items():
            if re.match(pattern[2:], prefix):
                return base | settings if pattern.startswith("+:") else None
        return base
    if any(re.match(pattern[3:], names[0]) for pattern in section["ignore"]):
        return None
    targets = [(target, group) for group in section["config_groups"].values() for target in group["targets"]]
    by_class = [group for target, group in targets if target == "Linear"]
    by_parts = [group for target, group in targets if target != "Linear" and re.match(target[3:], names[0])]
    found = [*by_class, *by_parts] if runtime == "sglang" else [*by_parts, *by_class]
    return found[0]["weights"]


def meant(plan: Plan, name: str) -> Any:
    scheme = next(layer.scheme for layer in plan.layers if layer.info.name == f"{name}.weight")
    if scheme is None:
        return None
    bits, size = scheme.weights.bits, scheme.weights.granularity.size
    if plan.format == "gptq":
        return {"bits": bits, "group_size": size or -1, "sym": True}
    kind = {"type": "int", "strategy": "group" if size else "channel", "symmetric": True, "dynamic": False}
    return {"num_bits": bits} | kind | ({"group_size": size} if size else {})


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_experts_are_declared_under_the_names_that_are_looked_up(runtime: str) -> None:
    """As SGLang 0.5.23's ``get_moe_scheme`` does: the first expert's layers by fixed names, whatever the file's."""
    parent = "model.layers.0.block_sparse_moe.experts"
    experts = {f"{parent}.{n}.{leaf}.weight": (128, 128) for n in range(12) for leaf in ("w1", "w2", "w3")}
    shapes = decoder(1) | {"model.layers.0.block_sparse_moe.gate.weight": (12, 128)} | experts
    names = [f"{parent}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]

    def declared_for(target: str, **recipe: Any) -> list[Any]:
        section = quantization_config(planned(shapes, target, **recipe))
        assert section
        left = [any(re.match(pattern[3:], name) for pattern in section["ignore"]) for name in names]
        groups = [
            [g["weights"]["num_bits"] for g in section["config_groups"].values() if any(
                re.match(target[3:], name) for target in g["targets"] if target != "Linear"
            )]
            for name in names
        ]  # fmt: skip
        return [left, groups]

    assert declared_for(runtime, scheme="int8", skip=["*.experts.*"])[0] == [True] * 3
    assert declared_for(runtime, scheme="int8")[0] == [False] * 3
    few = rule("*_proj", scheme="int8") | {"scheme": "int4"}
    assert declared_for(runtime, **few)[1] in ([[4]] * 3, [[]] * 3)
    assert declared_for("transformers", scheme="int8", skip=["*.experts.*"])[0] == [False] * 3


def recipes() -> Iterator[dict[str, Any]]:
    for part in (ATTENTION, ["*.gate_proj", "*.up_proj"], ["*.0.self_attn.?_proj"], ["*.layers.1.*"], ["*.down_proj"]):
        yield {"skip": part}
        yield rule(part, scheme="int8")
        yield rule(part, group_size=32)


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("recipe", [*recipes()], ids=str)
def test_fused_layers_are_refused_where_a_runtime_would_take_them_for_others(
    recipe: dict[str, Any], form: str, runtime: str
) -> None:
    plan = planned(decoder(3), runtime, format=form, **recipe)
    section = quantization_config(plan)
    assert section
    misread = []
    for block in range(3):
        for parent, fused, parts in (
            ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
        ):
            prefix = f"model.layers.{block}.{parent}.{fused}"
            found = looked_up(section, runtime, prefix, parts, fused)
            if found != meant(plan, f"model.layers.{block}.{parent}.{parts[0]}"):
                misread.append(prefix)
    assert bool(misread) == (refused(plan) is not None), misread


# Through the command line, and beside the transformers that is installed.


def test_a_target_is_asked_before_work(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(models / "llama"), "-o", str(tmp_path / "out"), "--scheme", "int4", "--skip", "*.k_proj"]
    for dry in ([], ["--dry-run"]):
        assert main([*command, "--target", "vllm", *dry]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "k_proj unquantized; vLLM makes one layer of these (checked on vLLM" in said
        assert not list(tmp_path.iterdir())
    assert main([*command, "--dry-run"]) == 0
    assert main([*command, "--target", "onnxruntime"]) == 2


@pytest.mark.usefixtures("no_runtime_check")
def test_transformers_fails_on_zero_points_and_loads_the_symmetric_scheme(models: Path, tmp_path: Path) -> None:
    import transformers

    assert CHECKED["transformers"] == f"transformers {transformers.__version__}", "check the rules again"
    for name, symmetric in (("bad", False), ("good", True)):
        recipe = validate({"scheme": weights("int4", "group", 64, symmetric=symmetric)}, "recipe")
        convert(models / "llama", tmp_path / name, recipe=recipe)
        if symmetric:
            assert logits(loaded(tmp_path / name, "llama")).isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                loaded(tmp_path / name, "llama")


@pytest.mark.slow
@pytest.mark.usefixtures("no_runtime_check")
@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    ("recipe", "loads"),
    [
        ({"scheme": "int4"}, True),
        ({"scheme": "int8"}, True),
        ({"scheme": "int8-dynamic"}, False),
        ({"scheme": "int4", "skip": ["*.experts.*"]}, True),
        ({"scheme": "int8"} | rule("*.self_attn.*", scheme="int4"), True),
        ({"scheme": "int8"} | rule("*.experts.0.*", scheme="int4"), False),
        ({"scheme": "int4"} | rule("*.experts.*.[dw][o2]*", scheme="int8"), False),
    ],
    ids=str,
)
def test_experts_load_in_transformers_where_they_are_not_refused(
    models: Path, tmp_path: Path, model: str, recipe: dict[str, Any], loads: bool
) -> None:
    convert(models / model, tmp_path / "out", recipe=validate(recipe, "recipe"), rest="keep")
    plan = plan_of(models / model, target="transformers", **recipe)
    assert (refused(plan) is None) == loads
    try:
        got = logits(loaded(tmp_path / "out", model))
    except (RuntimeError, AssertionError):
        assert not loads
        return
    # What is unpacked wrongly loads without a word.
    plain = logits(reference(tmp_path / "out", model, tmp_path / "plain"))
    assert ((got - plain).abs().max() < 1e-4) == loads


@pytest.mark.slow
def test_int4_experts_pass_the_check(models: Path, tmp_path: Path) -> None:
    report = convert(models / "mixtral", tmp_path / "out", scheme="int4", target="transformers")
    assert report.details["verified"]["runtime"]["checked"] is True


@pytest.mark.parametrize(
    ("target", "asked", "format"),
    [
        ("onnxruntime-genai", None, "onnx"),
        ("onnxruntime-genai==0.18", None, "onnx"),
        ("onnxruntime-genai", "gptq", "gptq"),
        ("onnxruntime", None, None),
        ("transformers.js", None, "onnx"),
    ],
)
def test_a_target_that_loads_onnx_alone_means_that_format(target: str, asked: str | None, format: str | None) -> None:
    """Else a checkpoint that is quantized already would not be told that its codes go to another container."""
    assert completed(Recipe(target=target, format=asked)).format == format


def test_fused_experts_are_refused_by_a_target_that_was_asked() -> None:
    plan = plan_of(infos(FUSED_3D), target="transformers")
    assert for_target(plan) == plan
    asked = replace(plan, loader=Loader("GptOssForCausalLM"))
    with pytest.raises(UsageError, match="fused experts, which GptOssForCausalLM of transformers does not load"):
        for_target(asked)
