"""How far an artifact is proven: what is run, what is said of it, and that no answer is no proof."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands.convert import convert
from quantcli.conversion.checkpoint import proof, transformers_check
from quantcli.conversion.checkpoint.layout import plan_layout
from quantcli.conversion.checkpoint.loader_load import load
from quantcli.conversion.checkpoint.loader_memory import Blocks
from quantcli.conversion.checkpoint.transformers_check import RuntimeCheck
from quantcli.errors import InputError, NotProvenError
from quantcli.planning.recipe import Recipe
from quantcli.planning.resolve import resolve
from quantcli.reporting.report import Report
from quantcli.reporting.tables.convert import convert_tables

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
BLOCKS = 4
#: What the child runs in place of transformers, and without the seconds that it takes to start.
DYING = """
import os, signal

def survey(request):
    nothing = {
        "modules": {}, "absent": [], "leave": {}, "unpacked": [], "fits_nf4": True, "weights_only": [], "wide": [],
        "unknown": [], "takes_codes": True, "untied": [],
    }  # fmt: skip
    nothing["runs_narrow"] = True
    parts = {name: name.split(".", 3)[2:] for name in request["tensors"] if name.startswith("model.layers.")}
    places = {name: ("model.layers", *parts[name]) for name in parts}
    found = {"lists": {"model.layers": ["0", "1", "2", "3"]}, "places": places, "loaded": {}, "joined": {}}
    return nothing | found | {"name": "LlamaForCausalLM", "split": {}}

def load_names(request):
    return {"checked": True, "transformers": "5", "class": "LlamaForCausalLM", "problems": []}

def error(request):
    raise ValueError("no such thing")

def crash(request):
    os.kill(os.getpid(), signal.SIGSEGV)

def killed(request):
    os.kill(os.getpid(), signal.SIGKILL)

def short(request):
    raise MemoryError("of 5 GB")

def whole_is_too_much(request):
    if not request["keep"]:
        short(request)
    return load_names(request) | {"ran": {"by_forward": 14, "by_themselves": 0, "joined": 0}}
"""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=BLOCKS, num_key_value_heads=4)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def dies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str = "loader_run:prove") -> None:
    """Let the child end in one of its functions."""
    (tmp_path / "dying.py").write_text(DYING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def start(self: RuntimeCheck, function: str, request: dict[str, Any]) -> None:
        assert self._service is not None
        self._service.start(f"dying:{name if function == of else function.partition(':')[2]}", request)

    monkeypatch.setattr(RuntimeCheck, "_start", start)


def told(report: Report) -> dict[str, Any]:
    """What a report says of transformers, which its table and its manifest say as well."""
    runtime: dict[str, Any] = report.details["verified"]["runtime"]
    assert ("Runtime", runtime["summary"]) in convert_tables(report)[-1].rows
    manifest = Path(report.models[1].path, "quantcli.json").read_text(encoding="utf-8")
    assert json.loads(manifest)["verified"]["runtime"] == runtime
    return runtime


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("end", "says", "way"),
    [
        ("error", "ValueError: no such thing", "--verify codes"),
        ("crash", "it crashed (SIGSEGV)", "--verify codes"),
        ("killed", "killed, as systems do where memory is short", "Free memory"),
        ("short", "MemoryError: of 5 GB", "Free memory"),
    ],
)
def test_a_run_without_an_answer_is_no_proof(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, says: str, way: str
) -> None:
    dies(end, tmp_path, monkeypatch)
    out = tmp_path / "out"
    with pytest.raises(NotProvenError) as caught:
        convert(llama, out, scheme="int8")
    assert says in caught.value.message
    assert way in str(caught.value.hint)
    assert caught.value.exit_code == 3
    assert not out.exists()
    # What is written is kept, and --verify codes goes on with it.
    written = next((tmp_path / ".out.partial").rglob("*.safetensors")).stat().st_ino
    runtime = told(convert(llama, out, scheme="int8", verify="codes"))
    assert (out / "model.safetensors").stat().st_ino == written
    assert (runtime["run"], runtime["reason"], runtime["foreseen"]) == ("none", "--verify codes", True)


def test_a_run_that_memory_does_not_allow_is_a_smaller_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies("whole_is_too_much", tmp_path, monkeypatch)
    report = convert(llama, tmp_path / "out", scheme="int8")
    runtime = told(report)
    assert runtime["run"] == "part"
    assert runtime["blocks"] == {"model.layers": {"run": ["0", "3"], "of": 4}}
    assert "runs 14 of 28 quantized layers of LlamaForCausalLM" in runtime["summary"]
    assert "too little memory for the whole model" in runtime["summary"]
    assert "The artifact was run only in part: there was too little memory for the whole model." in report.warnings


@pytest.mark.parametrize("of", ["loader_survey:survey", "loader_load:load_names"])
def test_a_look_without_an_answer_ends_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    dies("error", tmp_path, monkeypatch, of)
    with pytest.raises(InputError, match=r"gave no answer as .*ValueError: no such thing") as caught:
        convert(llama, tmp_path / "out", scheme="int8", dry_run=True)
    assert "--verify codes" in str(caught.value.hint)
    runtime = told(convert(llama, tmp_path / "out", scheme="int8", verify="codes"))
    assert "neither loaded nor run by transformers: transformers gave no answer" in runtime["summary"]
    assert not runtime["foreseen"]


def not_run(report: Report, reason: str, *, foreseen: bool) -> None:
    runtime = told(report)
    assert (runtime["checked"], runtime["run"], runtime["foreseen"]) == (False, "none", foreseen)
    assert reason in runtime["summary"]
    assert runtime["summary"].startswith("neither loaded nor run by transformers: ")
    assert any(warned.startswith("The artifact was not run: ") for warned in report.warnings) is not foreseen


@pytest.mark.parametrize("package", ["transformers", "compressed_tensors"])
def test_it_is_said_that_a_package_is_missing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    real = transformers_check.importlib.util.find_spec
    found = lambda name: None if name == package else real(name)  # noqa: E731
    monkeypatch.setattr(transformers_check.importlib.util, "find_spec", found)
    not_run(convert(llama, tmp_path / "out", scheme="int8"), f"{package} is not installed", foreseen=False)


def test_it_is_said_that_a_format_has_no_loader_here(llama: Path, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "out", scheme="int4", format="gptq", group_size=32)
    not_run(report, "gptqmodel is not installed", foreseen=False)


def test_it_is_said_that_another_runtime_is_meant(llama: Path, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "out", scheme="int4", group_size=32, target="vllm")
    not_run(report, "the target is vllm, which is not run here", foreseen=True)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "nonesuch"}, "transformers does not make the original"),
        pytest.param(
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            "transformers does not make the original",
            marks=pytest.mark.slow,
        ),
        ({"model_type": None}, "config.json names no model type"),
    ],
)
def test_it_is_said_that_a_model_is_not_known(
    llama: Path, tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    config = json.loads((llama / "config.json").read_text(encoding="utf-8")) | changed
    kept = {key: value for key, value in config.items() if value is not None}
    (llama / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    not_run(convert(llama, tmp_path / "out", scheme="int8"), reason, foreseen=False)


def test_plain_weights_have_no_runtime(llama: Path, tmp_path: Path) -> None:
    (llama / "config.json").unlink()
    not_run(convert(llama, tmp_path / "out", scheme="int8"), "without config.json", foreseen=True)
    report = convert(llama / "model.safetensors", tmp_path / "out.safetensors", scheme="int8")
    assert report.details["verified"]["runtime"]["reason"] == "a bare file has no runtime of its own"


def test_dry_run_says_what_will_be_run(llama: Path, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "out", scheme="int8", dry_run=True)
    assert "is to run 28 quantized layers of LlamaForCausalLM" in report.details["runtime"]["summary"]
    assert ("Runtime", report.details["runtime"]["summary"]) in convert_tables(report)[-1].rows


def blocks(folder: Path, tmp_path: Path, **recipe: Any) -> Blocks:
    """The blocks of a llama as the library tells them."""
    checkpoint = open_checkpoint(folder)
    plan = resolve(Recipe(scheme="int8", **recipe), checkpoint.infos(), checkpoint.config)
    places = {}
    for layer in plan.layers:
        if layer.info.name.startswith("model.layers."):
            key, _, leaf = layer.info.name.removeprefix("model.layers.").partition(".")
            places[layer.info.name] = ("model.layers", key, leaf)
    layout = plan_layout(plan, checkpoint, tmp_path / "out")
    return Blocks(plan, layout, {"model.layers": [str(number) for number in range(BLOCKS)]}, places)


def test_one_block_of_each_kind_is_run_and_the_last(llama: Path, tmp_path: Path) -> None:
    assert blocks(llama, tmp_path).one_of_each_kind() == {"model.layers": ["0", "3"]}
    odd = blocks(llama, tmp_path, rules=[{"match": "*.layers.2.mlp.*", "skip": True}])
    assert odd.one_of_each_kind() == {"model.layers": ["0", "2", "3"]}
    assert odd.ends() == {"model.layers": ["0", "3"]}
    assert odd.counts({}) == (25, 25)
    assert odd.counts({"model.layers": ["0", "2"]}) == (11, 25)


def test_what_fits_into_memory_is_run(llama: Path, tmp_path: Path) -> None:
    model = blocks(llama, tmp_path, rules=[{"match": "*.layers.2.mlp.*", "skip": True}])
    whole, kinds, ends = (model.needed_bytes(keep) for keep in ({}, model.one_of_each_kind(), model.ends()))
    assert ends < kinds < whole
    assert proof.choose_scope(model, None, whole).layers == (25, 25)
    some = proof.choose_scope(model, None, whole - 1)
    assert (some.run, some.keep, some.layers) == (True, model.one_of_each_kind(), (18, 25))
    assert "more than --max-memory allows" in some.reason
    assert proof.choose_scope(model, None, ends).keep == model.ends()
    none = proof.choose_scope(model, None, ends - 1)
    assert not none.run
    assert "and so do its first and last blocks" in none.reason
    assert proof.choose_scope(model, "run", 1) == proof.Scope(layers=(25, 25))
    assert not proof.choose_scope(model, "codes", whole).run


def test_half_of_the_free_memory_is_the_limit(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = blocks(llama, tmp_path)
    monkeypatch.setattr(proof, "free_memory_bytes", lambda: 2 * model.needed_bytes({}) - 2)
    some = proof.choose_scope(model, None, None)
    assert some.keep == {"model.layers": ["0", "3"]}
    assert some.reason.endswith("more than half of the free memory")


@pytest.mark.parametrize("scheme", [pytest.param("int8", marks=pytest.mark.slow), "int4", "nf4"])
def test_a_model_larger_than_memory_is_run_in_part(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    real = proof.choose_scope

    def scarce(model: Blocks, verify: str | None, limit: int | None) -> proof.Scope:
        monkeypatch.setattr(proof, "free_memory_bytes", lambda: 2 * model.needed_bytes({}) - 2)
        return real(model, verify, limit)

    monkeypatch.setattr(transformers_check, "choose_scope", scarce)
    rules = [{"match": "*.layers.2.mlp.*", "skip": True}]
    options: dict[str, Any] = {} if scheme != "int4" else {"group_size": 32}
    report = convert(llama, tmp_path / "out", recipe=Recipe(rules=rules), scheme=scheme, **options)
    runtime = told(report)
    assert runtime["ran"] == {"by_forward": 18, "by_themselves": 0, "joined": 0}
    assert runtime["blocks"] == {"model.layers": {"run": ["0", "2", "3"], "of": 4}}
    assert "runs 18 of 25 quantized layers" in runtime["summary"]
    assert "(blocks 0, 2, 3 of 4 in model.layers)" in runtime["summary"]


@pytest.mark.parametrize("named", [True, False])
def test_blocks_that_are_left_out_are_not_made(llama: Path, *, named: bool) -> None:
    """The others keep their names, and so their values; nothing is missing, and the class is what it was."""
    whole: Any = transformers.LlamaForCausalLM.from_pretrained(llama)
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    path = "model.layers" if named else "layers"
    if not named:
        (llama / "config.json").write_text(json.dumps(config | {"architectures": None}), encoding="utf-8")
    model, answer = load(str(llama), str(llama), None, keep={path: ["0", "3"]})
    assert (answer["checked"], answer["problems"]) == (True, [])
    assert answer["class"] == type(model).__name__ == ("LlamaForCausalLM" if named else "LlamaModel")
    made, values = model.state_dict(), (whole if named else whole.model).state_dict()
    assert made.keys() == {name for name in values if not name.startswith((f"{path}.1.", f"{path}.2."))}
    assert all(torch.equal(made[name], values[name]) for name in made)
    for key in ("2", "1"):
        del whole.model.layers[int(key)]
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.equal(model(ids)[0], (whole if named else whole.model)(ids)[0])


def test_layers_that_are_not_compared_are_not_called_run() -> None:
    said = {"transformers": "5", "class": "C", "ran": {"by_forward": 3, "by_themselves": 1, "joined": 2}}
    whole = proof.Scope(layers=(6, 6))
    assert proof.described(said, whole, None)["run"] == "all"
    assert proof.described(said, whole, None)["summary"] == (
        "transformers 5 runs 6 quantized layers of C as the codes say (1 called by themselves, 2 joined)"
    )
    some = proof.described(said, replace(whole, layers=(7, 7)), None)
    assert some["run"] == "part"
    assert "runs 6 of 7 quantized layers" in some["summary"]
    assert str(proof.warning(some)).endswith("run only in part: transformers holds the others in a form of its own.")


def test_a_model_that_runs_on_no_made_up_inputs_is_warned_of() -> None:
    ran = {"by_forward": 0, "by_themselves": 6, "joined": 0, "forward": "no forward pass with made-up inputs"}
    runtime = proof.described({"transformers": "5", "class": "C", "ran": ran}, proof.Scope(layers=(6, 6)), None)
    assert runtime["run"] == "all"
    assert proof.warning(runtime) == "The artifact was run layer by layer only: no forward pass with made-up inputs."
