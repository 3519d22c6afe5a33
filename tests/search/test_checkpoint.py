"""Budgets on checkpoints: ceilings that hold, layers that are protected, searches that are repeated and kept."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from support.artifacts import contents
from support.plain_blocks import token_file

from quantcli import convert
from quantcli.cli.app import main
from quantcli.errors import InputError, UsageError
from quantcli.planning.recipe import Recipe
from quantcli.reporting.report import Report
from quantcli.search import sensitivity
from quantcli.search.budget import Budget
from quantcli.search.checkpoint import CheckpointSearch
from quantcli.search.choices import Mix, total
from quantcli.search.subject import CheckpointSubject
from quantcli.search.trials import CheckpointTrials

pytestmark = pytest.mark.usefixtures("no_runtime_check", "float32_products")

VOCABULARY = 96
FRAGILE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, whose eight matrices are eight choices; in one of them a column has outliers that inputs meet."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.15,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        made.get_submodule(FRAGILE).weight[:, ::32] *= 40
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("data") / "ids.npz", count=24, length=24, vocabulary=VOCABULARY)


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def trials(model: Path, data: Path | None, budget: Budget, **recipe: object) -> CheckpointTrials:
    from quantcli.checkpoint.checkpoint import open_checkpoint
    from quantcli.data.request import DataRequest

    wishes = Recipe(**recipe)  # type: ignore[arg-type]
    request = None if data is None else DataRequest(str(data))
    checked = budget.checked(onnx=False, data=data is not None)
    subject = CheckpointSubject(open_checkpoint(model), None, wishes, request, Path("out"))
    return subject.trials(checked)


def within(model: Path, output: Path, data: Path | None, budget: Budget, **more: object) -> Report:
    return convert(model, output, data=data, budget=budget, algorithm="mse", verify="codes", **more)  # type: ignore[arg-type]


def test_a_ceiling_on_bytes_holds_and_the_fragile_layer_is_protected(model: Path, data: Path, tmp_path: Path) -> None:
    output, limit, file = tmp_path / "out", 62_000, tmp_path / "kept.json"
    report = within(model, output, data, Budget(max_size=limit, sensitivity=file))
    costs = {name: max(each.values()) for name, each in json.loads(file.read_text())["costs"].items()}
    assert max(costs, key=lambda name: costs[name]) == f"{FRAGILE}.weight"
    assert report.passed
    assert total_bytes(output) <= limit
    budget = report.details["budget"]
    # Planned before the work, and no less than what came of it.
    assert total_bytes(output) <= budget["chosen"]["size_bytes"] <= limit
    schemes = {row.name.removesuffix(".weight"): row.scheme for row in report.layers}
    assert schemes[FRAGILE] == "int8"
    assert any(scheme is not None and scheme.startswith("int4") for scheme in schemes.values())


def test_the_recipe_makes_the_same_bytes_without_a_search(model: Path, data: Path, tmp_path: Path) -> None:
    output, again = tmp_path / "out", tmp_path / "again"
    within(model, output, data, Budget(max_size=62_000))
    recipe = tmp_path / "out.recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["rules"]
    convert(model, again, recipe=recipe, verify="codes")
    assert contents(again) == contents(output)
    assert not list(tmp_path.glob(".*"))


def test_no_mix_of_a_small_model_is_better_at_the_same_bytes(model: Path, data: Path) -> None:
    budget = Budget(max_size=62_000, allow=("int4", "int8"))
    tried = trials(model, data, budget, group_size=32)
    mix = CheckpointSearch(tried, tried.budget)._for_size()
    assert len(tried.groups) == 8
    every = product(*(range(len(group.choices)) for group in tried.groups))
    fitting = [other for other in every if tried.nbytes(other) <= tried.nbytes(mix)]
    assert len(fitting) > 20
    least = min(tried.distance(other) for other in fitting)
    assert tried.distance(mix) == pytest.approx(least)


def test_estimates_are_near_to_what_is_measured(model: Path, data: Path) -> None:
    tried = trials(model, data, Budget(max_size=62_000), group_size=32)
    assert tried.model is not None
    for number, ((name,), group) in enumerate(zip(tried.ways.groups, tried.groups, strict=True)):
        labels = [choice.label for choice in group.choices]
        mix = tuple(
            labels.index("int4 group 32") if place == number else len(other.choices) - 1
            for place, other in enumerate(tried.groups)
        )
        stored = tried.stored(name, "int4 group 32")
        assert stored is not None
        measured = tried.model.distance({name: stored})
        # Probes alone come near; each layer of this model is a kind of its own, so that corrected they are exact.
        assert tried.store.found.costs[name]["int4 group 32"] == pytest.approx(measured, rel=0.6), group.name
        assert total(tried.groups, mix, "cost") == pytest.approx(measured, rel=1e-4), group.name


def test_a_limit_on_divergence_is_kept_by_the_artifact_itself(model: Path, data: Path, tmp_path: Path) -> None:
    from quantcli import evaluate

    limit = 0.02
    report = within(model, tmp_path / "out", data, Budget(max_kl=limit))
    assert report.passed
    [gate] = report.gates
    assert gate.require == "max_kl<=0.02"
    assert gate.value is not None and 0.2 * limit < gate.value <= limit
    measured = evaluate(model, [tmp_path / "out"], data=data).models[1].metrics["kl_nats"]
    assert measured is not None and measured <= limit
    smaller = within(model, tmp_path / "smaller", data, Budget(max_kl=10 * limit))
    assert total_bytes(tmp_path / "smaller") < total_bytes(tmp_path / "out")
    assert smaller.passed


def test_what_was_learned_serves_the_next_budget(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sensitivity.json"
    first = within(model, tmp_path / "a", data, Budget(max_size=62_000, sensitivity=file), dry_run=True)

    def never(*_: object) -> None:
        raise AssertionError("probed again")

    monkeypatch.setattr(sensitivity, "Probes", never)
    monkeypatch.setattr(sensitivity.Estimator, "_correct", never)
    again = within(model, tmp_path / "b", data, Budget(max_size=62_000, sensitivity=file), dry_run=True)
    assert again.details["budget"]["recipe"] == first.details["budget"]["recipe"]
    within(model, tmp_path / "c", data, Budget(max_size=70_000, sensitivity=file), dry_run=True)


def test_an_interrupted_search_goes_on(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    budget = Budget(max_size=62_000, sensitivity=file)
    within(model, tmp_path / "a", data, budget, dry_run=True)
    whole = json.loads(file.read_text())
    part = whole | {"costs": dict(list(whole["costs"].items())[:3]), "factors": {}, "measured": {}}
    file.write_text(json.dumps(part))
    within(model, tmp_path / "a", data, budget, dry_run=True)
    assert json.loads(file.read_text()) == whole


def test_sensitivities_of_something_else_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    within(model, tmp_path / "a", data, Budget(max_size=62_000, sensitivity=file), dry_run=True)
    other = token_file(tmp_path / "other.npz", count=24, length=24, seed=1, vocabulary=VOCABULARY)
    with pytest.raises(InputError, match="holds what was learned for other data"):
        within(model, tmp_path / "a", other, Budget(max_size=62_000, sensitivity=file), dry_run=True)
    with pytest.raises(InputError, match="for other schemes"):
        within(model, tmp_path / "a", data, Budget(max_size=90_000, sensitivity=file, allow=("int8", "bf16")))
    file.write_text(file.read_text()[:100])
    with pytest.raises(InputError, match="is damaged"):
        within(model, tmp_path / "a", data, Budget(max_size=62_000, sensitivity=file), dry_run=True)


@pytest.mark.parametrize("asked", [["--max-size", "20kB"], ["--max-kl", "1e-9"], ["--max-drop", "0.0001"]])
def test_what_cannot_be_met_is_told_with_what_can(
    model: Path, data: Path, tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> int:
        common = ["--data", str(data), "--algorithm", "mse", "--allow", "int4,int8", "--verify", "codes", "--json"]
        return main(["convert", str(model), "-o", str(tmp_path / "out"), *common, *options])

    assert run(*asked) == 1
    assert not list(tmp_path.iterdir())
    document = json.loads(capsys.readouterr().out)
    assert [gate["passed"] for gate in document["gates"]] == [False]
    hint = document["budget"]["hint"]
    assert hint in document["warnings"][0]
    command = shlex.split(document["budget"]["command"])
    assert command[:2] == ["quantcli", "convert"]
    assert main(command[1:]) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_too_few_samples_are_an_answer(model: Path, data: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "few.npz"
    ids = np.load(data)["input_ids"][:3]
    np.savez(labelled, input_ids=ids)
    budget = Budget(max_drop=0.01, metric="argmax_agreement", eval_data=str(labelled))
    report = within(model, tmp_path / "out", data, budget)
    assert not report.passed
    assert "samples are too few" in report.warnings[0] or "cannot be met" in report.warnings[0]
    assert report.details["budget"]["nearest"]


def test_a_mix_is_one_that_its_target_takes(model: Path, tmp_path: Path) -> None:
    """vLLM takes a head only in a scheme that no other layer has, and stores fused layers alike."""
    report = within(model, tmp_path / "out", None, Budget(max_size=66_000), target="vllm")
    schemes = {row.name: row.scheme for row in report.layers}
    assert report.passed and schemes["lm_head.weight"] is None
    assert len({schemes[f"model.layers.0.self_attn.{each}_proj.weight"] for each in "qkv"}) == 1


def test_one_scheme_is_chosen_of_for_sglang(model: Path, data: Path, tmp_path: Path) -> None:
    """SGLang looks for exceptions of fused layers under a name that the files do not have."""
    with pytest.raises(UsageError, match=r"one scheme for all of these.*int4 group 128, int4 group 32"):
        assert trials(model, data, Budget(max_size=66_000), target="sglang").ways
    budget = Budget(max_size=75_000, allow=("int4", "bf16"))
    report = within(model, tmp_path / "out", None, budget, target="sglang", group_size=32)
    schemes = {row.name: row.scheme for row in report.layers}
    assert report.passed and len(set(filter(None, schemes.values()))) == 1
    assert None in {schemes[f"model.layers.0.mlp.{each}_proj.weight"] for each in ("gate", "up", "down")}
    assert len({schemes[f"model.layers.0.self_attn.{each}_proj.weight"] for each in "qkv"}) == 1


def test_without_data_errors_of_weights_decide_and_that_is_said(model: Path, tmp_path: Path) -> None:
    report = within(model, tmp_path / "out", None, Budget(max_size=62_000))
    assert total_bytes(tmp_path / "out") <= 62_000
    assert any("There is no --data" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(metric="top1", max_size=1), "--metric goes with --max-drop"),
        (Budget(eval_data="x.txt"), "--eval-data goes with a budget"),
        (Budget(max_latency_p50=5.0), "is for ONNX"),
        (Budget(max_kl=0.1), "needs data"),
        (Budget(max_size=0), "must be more than 0"),
    ],
)
def test_options_that_do_not_go_together(model: Path, tmp_path: Path, budget: Budget, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert(model, tmp_path / "out", budget=budget)


def test_a_result_is_not_judged_on_what_it_was_fitted_to(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="learns from all of --data"):
        convert(model, tmp_path / "out", data=data, budget=Budget(max_kl=0.1))


@pytest.mark.parametrize("wins", [True, False])
def test_a_uniform_scheme_wins_where_it_loses_less(
    model: Path, data: Path, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = trials(model, data, Budget(max_size=62_000), group_size=32)
    monkeypatch.setattr(CheckpointTrials, "measured_count", lambda _: 1)
    asked: list[int] = []

    def alone(self: CheckpointTrials, mix: Mix, _: object, count: int) -> list[float]:
        asked.append(count)
        return [0.5 * ((mix in self.uniforms()) != wins) + 0.01 * number for number in range(count)]

    assert tried.evidence is not None
    monkeypatch.setattr(tried.evidence.held_out.task, "METRICS", ("perplexity",))
    monkeypatch.setattr(CheckpointTrials, "_alone", alone)
    mix = CheckpointSearch(tried, tried.budget)._for_size()
    assert (mix in tried.uniforms()) == wins
    # Where each sample says the same, three are enough.
    assert max(asked) <= 3


def test_what_lost_less_than_a_uniform_scheme_speaks_for_mixes_that_should_lose_even_less(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(max_size=62_000, sensitivity=tmp_path / "kept.json")
    asked: list[Mix] = []

    def alone(self: CheckpointTrials, mix: Mix, _: object, count: int) -> list[float]:
        asked.append(mix)
        self.seen[mix] = None
        values = [0.5 * (mix in self.uniforms()) + 0.01 * number for number in range(count)]
        self.store.found.measured[f"alone {self._held_out_key(mix)}"] = {str(n): each for n, each in enumerate(values)}
        self.store.save()
        return values

    monkeypatch.setattr(CheckpointTrials, "measured_count", lambda _: 1)
    monkeypatch.setattr(CheckpointTrials, "_alone", alone)
    runs = []
    for size in (64_000, 66_000, 62_000):
        tried = trials(model, data, replace(budget, max_size=size), group_size=32)
        assert tried.evidence is not None
        monkeypatch.setattr(tried.evidence.held_out.task, "METRICS", ("perplexity",))
        asked.clear()
        found = CheckpointSearch(tried, replace(tried.budget, max_size=size)).run()
        assert found.recipe.rules
        runs.append(len(set(asked)))
    # More bytes and less loss by estimate need no run; fewer bytes and more loss do.
    assert runs == [2, 0, 2]


def test_the_frontier_goes_from_the_smallest_to_the_best(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "pareto.json"
    within(model, tmp_path / "out", data, Budget(max_size=62_000, pareto=file), dry_run=True)
    points = json.loads(file.read_text())["frontier"]
    sizes = [point["size_bytes"] for point in points]
    losses = [point["held_out"]["kl_nats"] for point in points]
    assert sizes == sorted(sizes) and len(points) > 4
    assert losses[0] == max(losses) and losses[-1] == min(losses)
    assert "Size against loss" in file.with_suffix(".md").read_text()
    assert "<svg" in file.with_suffix(".svg").read_text()
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_is_told_before_it_is_loaded(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcli.search.trials.free_memory_bytes", lambda: 100_000)
    with pytest.raises(InputError, match="holds the model in float32"):
        within(model, tmp_path / "out", data, Budget(max_size=62_000))
    assert not list(tmp_path.iterdir())


def test_what_is_planned_holds_for_a_calibrated_artifact(model: Path, data: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out", data=data, budget=Budget(max_size=66_000), verify="codes")
    planned = report.details["budget"]["chosen"]["size_bytes"]
    assert report.models[1].details["algorithm"] == "gptq"
    # How many hashes a sketch of little data has is not known before.
    assert total_bytes(tmp_path / "out") <= planned <= total_bytes(tmp_path / "out") + 6_000
