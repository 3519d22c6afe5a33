"""transformers asked what it makes of a checkpoint, before work and after it, on tiny models of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_architectures
from transformers.models.falcon.modeling_falcon import FalconLinear

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.quantized import open_quantized
from quantcli.commands.convert import convert
from quantcli.conversion.checkpoint import loader_run, loader_survey
from quantcli.conversion.checkpoint.loader_survey import _computes_plainly, survey
from quantcli.errors import InputError, UsageError
from quantcli.planning.plan import Plan
from quantcli.planning.recipe import Recipe, Rule
from quantcli.planning.resolve import resolve
from quantcli.system.child import ChildFailedError, Service

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 128}


def saved(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    return folder


def surveyed(folder: Path, scheme: str) -> tuple[Plan, dict[str, Any]]:
    """A plan, and what the library makes of it."""
    checkpoint = open_checkpoint(folder)
    plan = resolve(Recipe(scheme=scheme), checkpoint.infos(), checkpoint.config)
    coded = {
        layer.info.name: {
            "role": layer.role,
            "asked": False,
            "packed": plan.format == "compressed-tensors" and layer.scheme.inputs is None,
            "inputs": layer.scheme.inputs is not None,
        }
        for layer in plan.layers
        if layer.has_codes and layer.scheme
    }
    names = {layer.info.name: layer.info.shape for layer in plan.layers}
    request = {"folder": str(folder), "tensors": names, "coded": coded, "format": plan.format, "dtype": "bfloat16"}
    return plan, survey(request)


def test_heads_are_known_by_the_name_that_is_loaded(tmp_path: Path) -> None:
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDE))
    _, answer = surveyed(saved(model, tmp_path / "neox"), "int8")
    assert answer["modules"] == {"embed_out": "lm_head"}
    assert not answer["leave"]
    assert not answer["unpacked"]


def test_weights_that_the_class_lacks_are_left_and_layers_that_the_file_lacks_named(tmp_path: Path) -> None:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**WIDE))
    folder = saved(model, tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    weights["extra.dense.weight"] = torch.randn(64, 64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _, answer = surveyed(folder, "int8")
    assert list(answer["leave"]) == ["extra.dense.weight"]
    assert "has no such weight" in answer["leave"]["extra.dense.weight"]
    assert answer["absent"] == ["cls.predictions.decoder"]

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}), encoding="utf-8")
    assert "pooler.dense" in surveyed(folder, "int8")[1]["absent"]


@pytest.mark.parametrize(
    ("kind", "task", "heads"),
    [
        ("Bert", "SequenceClassification", ["classifier.weight"]),
        ("Roberta", "TokenClassification", ["classifier.weight"]),
        ("Roberta", "SequenceClassification", ["classifier.out_proj.weight"]),
        ("Bert", "QuestionAnswering", ["qa_outputs.weight"]),
        ("Llama", "SequenceClassification", ["score.weight"]),
    ],
)
def test_what_gives_labels_stays_as_output_heads_do(tmp_path: Path, kind: str, task: str, heads: list[str]) -> None:
    config = getattr(transformers, f"{kind}Config")(**WIDE, num_labels=2 if "Question" in task else 5)
    folder = saved(getattr(transformers, f"{kind}For{task}")(config), tmp_path / "model")
    left = surveyed(folder, "int8")[1]["leave"]
    assert list(left) == heads
    assert "output head" in left[heads[0]]


def test_a_rule_that_names_what_gives_labels_is_obeyed_or_refused(tmp_path: Path) -> None:
    model = transformers.RobertaForTokenClassification(transformers.RobertaConfig(**WIDE, num_labels=64))
    folder = saved(model, tmp_path / "model")
    for scheme, spelled in (("int8", "int8"), ("int4", "int4 group 64")):
        named = Recipe(scheme="int8", rules=[Rule(match="classifier", scheme=scheme)])
        report = convert(folder, tmp_path / "out", recipe=named, dry_run=True)
        assert {row.name: row.scheme for row in report.layers}["classifier.weight"] == spelled
    report = convert(folder, tmp_path / "out", scheme="int8", dry_run=True)
    assert {row.name: row.scheme for row in report.layers}["classifier.weight"] is None
    named = Recipe(scheme="nf4", rules=[Rule(match="classifier", scheme="nf4")])
    convert(folder, tmp_path / "out", recipe=named)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert type(loaded.classifier).__name__ == "Linear4bit"
    config = transformers.RobertaConfig(**WIDE, num_labels=3)
    folder = saved(transformers.RobertaForTokenClassification(config), tmp_path / "few")
    with pytest.raises(UsageError, match=r"A rule names classifier, which has to stay as it is: .* not 3"):
        convert(folder, tmp_path / "out", recipe=named)


def test_a_class_that_is_not_loaded_with_codes_is_refused_before_work_with_a_way_out(tmp_path: Path) -> None:
    """The library's quantizer fails at a rule that splits a tensor, also where the model has no such tensor."""
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8
    )
    folder = saved(transformers.Dinov2WithRegistersForImageClassification(config), tmp_path / "dino")
    with pytest.raises(InputError, match=r"would split mlp\.weights_in\.weight") as refused:
        convert(folder, tmp_path / "out", scheme="int8", dry_run=True)
    assert "Use --scheme nf4" in str(refused.value)
    convert(folder, tmp_path / "out", scheme="nf4")

    # Where the layer is there, its codes have names that the rule takes.
    config.use_swiglu_ffn = True
    folder = saved(transformers.Dinov2WithRegistersForImageClassification(config), tmp_path / "swiglu")
    convert(folder, tmp_path / "swiglu-int8", scheme="int8")


def test_layers_that_are_read_by_the_initialization_are_found(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, feed_forward_proj="relu"
    )
    folder = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "t5")
    plan, answer = surveyed(folder, "int8")
    assert set(answer["unpacked"]) == {layer.info.name for layer in plan.quantized} and answer["fits_nf4"]
    assert not surveyed(folder, "int8-dynamic")[1]["unpacked"]
    left = surveyed(folder, "nf4")[1]["leave"]
    names = [f"{part}.DenseReluDense.wo.weight" for part in ("decoder.block.0.layer.2", "encoder.block.0.layer.1")]
    assert sorted(left) == names
    assert all("keeps it in float32" in reason for reason in left.values())


def test_a_class_of_linear_layers_of_its_own_is_no_way_to_nf4(tmp_path: Path) -> None:
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL))
    _, answer = surveyed(saved(model, tmp_path / "falcon"), "int4")
    assert answer["unpacked"] and not answer["fits_nf4"]


def test_a_layer_whose_weight_is_read_but_which_is_not_called_is_found_by_use(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=64, state_size=16, num_hidden_layers=1, time_step_rank=32
    )
    folder = saved(transformers.MambaForCausalLM(config), tmp_path / "mamba")
    left = surveyed(folder, "nf4")[1]["leave"]
    assert list(left) == ["backbone.layers.0.mixer.dt_proj.weight"]
    assert "reads its weight without calling" in next(iter(left.values()))


def test_a_linear_layer_with_code_of_its_own_is_left(tmp_path: Path) -> None:
    tiny_architectures.build("causal:deepseek_v4", tmp_path / "grouped")
    left = surveyed(tmp_path / "grouped", "int8")[1]["leave"]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in left} >= {"wo_a"}
    assert any("DeepseekV4GroupedLinear" in reason for reason in left.values())


def test_layers_to_the_dtype_of_whose_weights_inputs_are_cast_are_left(tmp_path: Path) -> None:
    """Four-bit codes lie in bytes, to which no input can be cast; int8's layers have their dtype back when they run."""
    tiny_architectures.build("seq2seq:longt5", tmp_path / "cast")
    left = surveyed(tmp_path / "cast", "nf4")[1]["leave"]
    assert {name.split(".")[-2] for name, reason in left.items() if "casts to the dtype" in reason} == {"wo"}
    assert not any("casts to the dtype" in why for why in surveyed(tmp_path / "cast", "int8")[1]["leave"].values())


@pytest.mark.parametrize("runs", [True, False])
def test_what_cannot_be_watched_is_read_in_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    """Where no inputs can be made up that the model runs on, its code tells whether it casts to a weight's dtype."""
    if not runs:
        monkeypatch.setattr(loader_survey, "candidates", lambda *_: iter(()))
    tiny_architectures.build("hand:pix2struct", tmp_path / "cast")
    left = surveyed(tmp_path / "cast", "nf4")[1]["leave"]
    assert {name.split(".")[-2] for name in left} == {"wo"}


def test_a_class_that_does_not_run_in_bfloat16_keeps_its_dtype(tmp_path: Path) -> None:
    tiny_architectures.build("causal:xlnet", tmp_path / "wide")
    assert not surveyed(tmp_path / "wide", "int8")[1]["runs_narrow"]
    report = convert(tmp_path / "wide", tmp_path / "nf4", scheme="nf4")
    assert any("is float32: XLNetLMHeadModel does not run in 16 bits" in warning for warning in report.warnings)
    assert load_file(tmp_path / "nf4" / "model.safetensors")["transformer.word_embedding.weight"].dtype == torch.float32
    assert report.details["verified"]["runtime"]["ran"]["by_forward"] > 0


def test_what_the_class_calls_its_head_is_one_whatever_its_name(tmp_path: Path) -> None:
    tiny_architectures.build("causal:reformer", tmp_path / "head")
    left = surveyed(tmp_path / "head", "int8")[1]["leave"]
    assert [name for name, why in left.items() if why.startswith("output head")] == ["lm_head.decoder.weight"]


def test_a_linear_class_of_its_own_code_that_computes_the_same_is_no_other(tmp_path: Path) -> None:
    tiny_architectures.build("causal:falcon", tmp_path / "plain")
    assert not any("FalconLinear" in why for why in surveyed(tmp_path / "plain", "int8")[1]["leave"].values())
    assert any("FalconLinear" in why for why in surveyed(tmp_path / "plain", "nf4")[1]["leave"].values())


def test_a_weight_that_is_renamed_by_its_whole_name_is_left(tmp_path: Path) -> None:
    tiny_architectures.build("vl:unlimited_ocr", tmp_path / "renamed")
    left = surveyed(tmp_path / "renamed", "int8")[1]["leave"]
    assert [name for name, why in left.items() if "would not rename its codes" in why] == [
        "model.projector.layers.weight"
    ]


class Clipped(torch.nn.Linear):
    """What it is given is limited first."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return super().forward(given.clamp(-1000, 1000))


def test_a_linear_class_that_computes_something_else_is_told_by_trying_it() -> None:
    assert _computes_plainly(FalconLinear)
    assert _computes_plainly(torch.nn.Linear)
    assert not _computes_plainly(Clipped)


def test_weights_that_are_changed_in_place_are_left_in_four_bits(tmp_path: Path) -> None:
    tiny_architectures.build("causal:rwkv", tmp_path / "changed")
    left = surveyed(tmp_path / "changed", "nf4")[1]["leave"]
    changed = {name.split("blocks.0.")[-1] for name, why in left.items() if "changes its weight" in why}
    assert {"attention.output.weight", "feed_forward.value.weight"} <= changed


@pytest.mark.parametrize(("case", "narrow"), [("hy_v4", False), ("ctrl", False), ("xlstm", False), ("opt", True)])
def test_whether_a_class_runs_in_16_bits_is_told_by_operands_buffers_and_scales(
    tmp_path: Path, case: str, narrow: bool
) -> None:
    """Scales that a class keeps wide by name, a buffer that it casts as it runs, a product of two dtypes."""
    tiny_architectures.build(f"causal:{case}", tmp_path / case)
    assert surveyed(tmp_path / case, "int8")[1]["runs_narrow"] == narrow


def test_a_bfloat16_model_whose_scales_stay_wide_is_stored_wide(tmp_path: Path) -> None:
    tiny_architectures.build("causal:hy_v4", tmp_path / "model")
    stored = {name: part.bfloat16() for name, part in load_file(tmp_path / "model" / "model.safetensors").items()}
    save_file(stored, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    report = convert(tmp_path / "model", tmp_path / "int8", scheme="int8")
    assert any("is float32: HYV4ForCausalLM does not run in 16 bits" in warning for warning in report.warnings)
    assert report.details["verified"]["runtime"]["ran"]["by_forward"] > 8


def test_what_the_loader_reads_is_offered_nf4_and_int8(tmp_path: Path) -> None:
    tiny_architectures.build("causal:modernbert-decoder", tmp_path / "read")
    options = {"algorithm": "gptq", "data": tmp_path / "data.npz"}
    with pytest.raises(InputError, match=r"reads its weight.* --scheme nf4, .*gptq or awq; or --scheme int8, which"):
        convert(tmp_path / "read", tmp_path / "int4", scheme="int4", **options)  # type: ignore[arg-type]
    for scheme in ("nf4", "int8"):
        report = convert(tmp_path / "read", tmp_path / scheme, scheme=scheme, **options)  # type: ignore[arg-type]
        assert report.details["verified"]["runtime"]["ran"]["by_forward"] > 8


def test_what_is_read_but_not_called_is_found_behind_a_mask(tmp_path: Path) -> None:
    tiny_architectures.build("masked:mobilebert", tmp_path / "read")
    left = surveyed(tmp_path / "read", "nf4")[1]["leave"]
    assert "reads its weight without calling" in left["cls.predictions.dense.weight"]


def test_a_weight_that_another_module_reads_is_left(tmp_path: Path) -> None:
    tiny_architectures.build("masked:neomme", tmp_path / "tied")
    left = surveyed(tmp_path / "tied", "int8")[1]["leave"]
    assert "ties it to unembedding_projection" in left["model.embed_tokens.embedding_projection.weight"]


def test_weights_that_are_joined_or_split_by_rows_are_stored_as_they_are_loaded(tmp_path: Path) -> None:
    tiny_architectures.build("masked:nomic_bert", tmp_path / "split")
    stored = load_file(tmp_path / "split" / "model.safetensors")
    made = surveyed(tmp_path / "split", "int8")[1]["rearranged"]
    q, k = (f"nomic_bert.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    assert made[k] == {"sources": ["nomic_bert.encoder.layers.0.attn.Wqkv.weight"], "runs": [(0, 128, 1, 128)]}

    report = convert(tmp_path / "split", tmp_path / "int8", scheme="int8")
    assert any("stored as transformers holds them" in warning for warning in report.warnings)
    assert report.details["verified"]["runtime"]["ran"]["by_forward"] == 15
    written = DecodedCheckpoint(open_quantized(open_checkpoint(tmp_path / "int8")))
    whole = stored["nomic_bert.encoder.layers.0.attn.Wqkv.weight"]
    for number, name in enumerate((q, k)):
        assert (written.load(name) - whole[128 * number : 128 * (number + 1)]).abs().max() < 0.02

    left = convert(tmp_path / "split", tmp_path / "skip", scheme="int8", skip=["*Wqkv"], dry_run=True)
    assert not any("stored as transformers" in warning for warning in left.warnings)


def test_convolutions_that_are_joined_do_not_keep_the_rest_from_loading(tmp_path: Path) -> None:
    tiny_architectures.build("causal:bailing_hybrid", tmp_path / "joined")
    for options in ({"scheme": "int4"}, {"scheme": "int4", "algorithm": "gptq", "data": tmp_path / "data.npz"}):
        report = convert(tmp_path / "joined", tmp_path / "out", force=True, **options)  # type: ignore[arg-type]
        assert report.details["verified"]["runtime"]["ran"]["by_forward"] > 8
    # g_proj of one layer is quantized and of another not, and both are renamed.
    report = convert(tmp_path / "joined", tmp_path / "nf4", scheme="nf4")
    assert report.details["verified"]["runtime"]["ran"]["by_forward"] > 8


def test_fused_experts_that_run_as_layers_are_calibrated_as_such(tmp_path: Path) -> None:
    tiny_architectures.build("causal:llama4", tmp_path / "fused")
    options = {"scheme": "int4", "algorithm": "gptq", "data": tmp_path / "data.npz"}
    convert(tmp_path / "fused", tmp_path / "out", **options)  # type: ignore[arg-type]
    layers = open_checkpoint(tmp_path / "out").manifest.layers
    assert layers["model.layers.1.feed_forward.experts.3.down_proj.weight"].algorithm == "gptq"


def test_experts_that_are_joined_keep_their_inputs(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=2)
    folder = saved(transformers.MixtralForCausalLM(config), tmp_path / "mixtral")
    _, answer = surveyed(folder, "int8-dynamic")
    assert len(answer["weights_only"]) == 6
    assert all(".experts." in name for name in answer["weights_only"])
    assert not answer["leave"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(**WIDE, num_key_value_heads=4)
    return saved(transformers.LlamaForCausalLM(config).to(torch.bfloat16), tmp_path / "llama")


def proven(llama: Path, scheme: str, tmp_path: Path, **loaded: str) -> dict[str, Any]:
    artifact = tmp_path / scheme
    convert(llama, artifact, scheme=scheme)
    _, answer = surveyed(llama, scheme)
    request = {"artifact": str(artifact), "original": str(llama), "threads": 1, "keep": {}}
    return loader_run.prove(request | {"loaded": answer["loaded"] | loaded, "joined": answer["joined"]})


@pytest.mark.usefixtures("no_runtime_check")
@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic", "nf4"])
def test_an_artifact_is_run_and_every_layer_compared(llama: Path, tmp_path: Path, scheme: str) -> None:
    answer = proven(llama, scheme, tmp_path)
    assert answer["problems"] == []
    assert answer["ran"] == {"by_forward": 7, "by_themselves": 0, "joined": 0}


@pytest.mark.usefixtures("no_runtime_check")
def test_a_layer_that_computes_something_else_is_named(llama: Path, tmp_path: Path) -> None:
    q, k = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    problems = proven(llama, "int8", tmp_path, **{q: k, k: q})["problems"]
    assert len(problems) == 2
    assert q in problems[1]
    assert "computes something else than its codes say" in problems[0]


@pytest.mark.usefixtures("no_runtime_check")
def test_an_artifact_that_does_not_run_is_told_from_inputs_that_do_not_fit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loader_run.candidates, []

    def first_none(model: Any) -> Any:
        """Inputs that the artifact cannot take, and the original can."""
        calls.append(model)
        return iter([{"input_ids": torch.tensor([[10**6]])}]) if len(calls) == 1 else real(model)

    monkeypatch.setattr(loader_run, "candidates", first_none)
    assert "it does not run" in proven(llama, "int8", tmp_path)["problems"][0]


@pytest.mark.slow
def test_dry_run_refuses_what_the_library_would_not_load(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    folder = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "t5")
    with pytest.raises(InputError, match="reads its weight, and packed codes have none") as caught:
        convert(folder, tmp_path / "out", scheme="int4", dry_run=True)
    assert "--scheme int8, which is stored in codes that it reads" in str(caught.value.hint)
    report = convert(folder, tmp_path / "out", scheme="int8")
    assert report.details["verified"]["runtime"]["ran"]["by_forward"] > 10


@pytest.mark.slow
def test_an_artifact_of_renamed_and_absent_modules_is_run(tmp_path: Path) -> None:
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDE))
    folder = saved(model, tmp_path / "neox")
    for scheme in ("int8", "nf4"):
        runtime = convert(folder, tmp_path / scheme, scheme=scheme).details["verified"]["runtime"]
        assert runtime["ran"]["by_forward"] == 4
    told = convert(folder, tmp_path / "codes", scheme="int8", verify="codes").details["verified"]["runtime"]
    assert told["reason"] == "--verify codes"


def mixture(tmp_path: Path) -> Path:
    sizes = WIDE | {"hidden_size": 128, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)
    return saved(transformers.MixtralForCausalLM(config), tmp_path / "mixtral")


def test_a_mixture_runs_with_its_experts_left(tmp_path: Path) -> None:
    report = convert(mixture(tmp_path), tmp_path / "out", scheme="int4", group_size=32, skip=["*experts*"])
    assert report.details["verified"]["runtime"]["ran"] == {"by_forward": 8, "by_themselves": 0, "joined": 0}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"match": "*.0.block_sparse_moe.experts*", "skip": True}, "experts that stay unquantized"),
        ({"match": "*experts*w1*", "scheme": "int4", "group_size": 64}, "experts of groups of 32 and groups of 64"),
        ({"match": "*.0.block_sparse_moe.experts*", "scheme": "int8"}, "experts of int4 and int8"),
    ],
)
def test_experts_that_are_unpacked_wrongly_are_refused_before_the_work(
    tmp_path: Path, rule: dict[str, Any], said: str
) -> None:
    folder = mixture(tmp_path)
    recipe = Recipe(scheme="int4", group_size=32, rules=[rule])
    with pytest.raises(InputError, match=said) as caught:
        convert(folder, tmp_path / "out", recipe=recipe, dry_run=True)
    assert "--skip" in str(caught.value.hint)


def test_a_mixture_is_quantized_but_for_the_multi_token_prediction_that_its_class_lacks(
    tmp_path: Path,
) -> None:
    folder = mixture(tmp_path)
    weights = load_file(folder / "model.safetensors")
    further = {name.replace(".layers.1.", ".layers.2."): weight.clone() for name, weight in weights.items()}
    weights |= {name: weight for name, weight in further.items() if ".layers.2." in name}
    weights["model.layers.2.eh_proj.weight"] = torch.randn(128, 256)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    report = convert(folder, tmp_path / "out", scheme="int4", dry_run=True)
    schemes = {row.name: row.scheme for row in report.layers if "experts" in row.name}
    assert {name for name, scheme in schemes.items() if not scheme} == {name for name in schemes if ".2." in name}
    assert any("MixtralForCausalLM of transformers has no such weight" in warning for warning in report.warnings)


def test_a_service_answers_again_and_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubling.py").write_text(
        "def twice(request):\n    return {'n': 2 // request['n'] * request['n'] ** 2}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    service = Service()
    try:
        for number in (1, 2):
            service.start("doubling:twice", {"n": number})
            assert service.result(60) == {"n": 2 * number}
        service.start("doubling:twice", {"n": 0})
        with pytest.raises(ChildFailedError, match="ZeroDivisionError"):
            service.result(60)
    finally:
        service.stop()


def test_fused_experts_are_stored_as_the_library_stacks_them(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=2, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.Qwen3MoeForCausalLM(config)
    folder = tmp_path / "fused"
    model.save_pretrained(folder)
    # As it is in memory, and in the files of Qwen3.5: fused.
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    found = surveyed(folder, "int4")[1]["single"]
    assert sorted(found) == ["model.layers.0.mlp.experts.down_proj", fused]
    gate, up = found[fused][2:]
    assert gate == {"name": "model.layers.0.mlp.experts.1.gate_proj.weight", "expert": 1, "first": 0,
                    "shape": [64, 128], "turned": False}  # fmt: skip
    assert (up["name"], up["first"]) == ("model.layers.0.mlp.experts.1.up_proj.weight", 64)
    assert surveyed(folder, "nf4")[1]["single"] == {}
    planned = convert(folder, tmp_path / "out", scheme="int4", group_size=64, dry_run=True)
    assert {layer.scheme for layer in planned.layers if ".experts." in layer.name} == {"int4 group 64"}
    # vLLM and SGLang load experts by the names that they were published with, too.
    served = convert(folder, tmp_path / "out", scheme="int4", group_size=64, target="vllm", dry_run=True)
    assert [(row.name, row.scheme) for row in served.layers] == [(row.name, row.scheme) for row in planned.layers]
    left = convert(folder, tmp_path / "out", scheme="int4", group_size=64, skip=["*experts*"], dry_run=True)
    assert {layer.reason.split(";")[0] for layer in left.layers if ".experts." in layer.name} == {"skipped as asked"}


@pytest.mark.parametrize("told", [True, False, None])
def test_a_head_in_the_memory_of_the_embedding_is_stored_where_the_class_does_not_tie_it(
    tmp_path: Path, told: bool | None
) -> None:
    """In a file of torch two tensors may share memory by chance; Llama's class ties only where its config says so."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE, tie_word_embeddings=bool(told)))
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    if told is None:
        del config["tie_word_embeddings"]
    values = model.state_dict()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    torch.save(values | {"lm_head.weight": values["model.embed_tokens.weight"]}, tmp_path / "m" / "pytorch_model.bin")
    convert(tmp_path / "m", tmp_path / "out", scheme="int8")
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not told)
    served = convert(tmp_path / "m", tmp_path / "served", scheme="int8", target="vllm", dry_run=True)
    reason = next(layer.reason for layer in served.layers if layer.name == "lm_head.weight")
    assert ("stored once" in str(reason)) == bool(told)


def test_tables_that_the_class_ties_are_stored_once(models: Path, tmp_path: Path) -> None:
    """A file of torch has a name for each of an encoder-decoder's tables, and one memory for all."""
    model: Any = transformers.BartForConditionalGeneration.from_pretrained(models / "bart")
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    convert(tmp_path / "m", tmp_path / "out", scheme="nf4")
    tables = [name for name in load_file(tmp_path / "out" / "model.safetensors") if "embed_tokens" in name]
    assert tables == []
    _, info = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_layer_that_is_given_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' kernel divides by the number of rows, and ends the process: of a sound that is not there, say."""

    class Hears(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ear = torch.nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> Any:
            return self.ear(x[x[:, 0] > 9])

    save_file({"ear.weight": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "nf4.safetensors", scheme="nf4")
    quantized = open_quantized(open_checkpoint(tmp_path / "nf4.safetensors"))
    monkeypatch.setattr(loader_run, "candidates", lambda _: iter([{"x": torch.zeros(3, 64)}]))
    for crashes in (True, False):
        monkeypatch.setattr(loader_run, "_crashes_without_rows", lambda crashes=crashes: crashes)
        comparison = loader_run._Comparison(Hears(), quantized, {"ear.weight": "ear.weight"}, {})
        comparison.run()
        assert comparison.broken == ("ear.weight" if crashes else None)
        assert ("is given no rows" in str(comparison.error)) == crashes
