"""Conversions on calibration data, whole: against a naive GPTQ on hooks, killed and resumed, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from support import oracles
from support.artifacts import contents, tensors_of
from support.plain_blocks import LISTS, hidden, network, recorded, token_file
from support.tokenizers import save_tokenizer
from torch import Tensor, nn

from quantcli import convert
from quantcli.algorithms import gptq, mse
from quantcli.algorithms.base import LinearStats
from quantcli.blocks import batches
from quantcli.cli.app import main
from quantcli.conversion.checkpoint import calibrated
from quantcli.core.numerics import decoded as values_of
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.errors import UsageError
from quantcli.planning.recipe import Recipe
from quantcli.ptq import block as at_work
from quantcli.ptq import engine
from quantcli.reporting.report import Report

pytestmark = pytest.mark.usefixtures("no_runtime_check", "one_thread", "small_batches")

GROUP = 16
INT4 = NumberFormat("int4", Granularity("group", GROUP))
ALGORITHMS = [
    {"algorithm": "gptq"},
    {"recipe": Recipe(scheme="int4", group_size=GROUP, steps=[{"autoround": {"iterations": 3}}]), "algorithm": None},
    {"recipe": Recipe(scheme="int4", group_size=GROUP, steps=["awq", "gptq"]), "algorithm": None},
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they give in models so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 48)
    monkeypatch.setattr(batches, "BATCH_PICTURES", 2)


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose blocks change much, so that what is rounded in one is seen in the next."""
    root = tmp_path_factory.mktemp("lively")
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15}
    t5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    built = {
        "llama": tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2)),
        "bert": tf.BertModel(tf.BertConfig(**sizes)),
        "t5": tf.T5ForConditionalGeneration(tf.T5Config(**t5, decoder_start_token_id=0)),
    }
    for name, model in built.items():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        save_tokenizer(root / name)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("data") / "ids.npz")


def quantize(source: Path, out: Path, data: Path, **options: Any) -> Report:
    chosen = {"scheme": "int4", "group_size": GROUP, "algorithm": "gptq", "threads": 1} | options
    return convert(source, out, data=data, **chosen)


def manifest_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "quantcli.json").read_text())
    return found


def weights_of(out: Path) -> dict[str, Tensor]:
    """Every parameter of an artifact in float32, codes times scales not rounded to its 16 bits."""
    tensors = tensors_of(out)
    found = {}
    for name, part in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            nibbles = torch.stack([part >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(1)
            scale = tensors[f"{stem}.weight_scale"].float()
            found[f"{stem}.weight"] = (nibbles - 8) * scale.repeat_interleave(nibbles.shape[1] // scale.shape[1], 1)
        elif leaf not in ("weight_scale", "weight_shape"):
            found[name] = part.float()
    return found


# The naive way: the whole model runs for every block, in plain transformers.


def model_inputs(model: nn.Module, data: Path) -> dict[str, Tensor]:
    ids = torch.from_numpy(np.load(data)["input_ids"])
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        given["decoder_input_ids"] = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
    return given


def naive_gptq(
    source: Path, data: Path, artifact: dict[str, Tensor], lists: list[str], *, hand_on: bool
) -> dict[str, float]:
    """The share of each layer's weights in which an artifact differs from GPTQ in float64.

    With ``hand_on`` every block sees what the artifact's blocks before it return, else what the original ones do.
    """
    model = network(source)
    given = model_inputs(model, data)
    off: dict[str, float] = {}
    for path in lists:
        for number, block in enumerate(model.get_submodule(path).children()):
            linears = {name: each for name, each in block.named_modules() if isinstance(each, nn.Linear)}
            seen = {}
            for name, linear in linears.items():
                with recorded([linear]) as calls, torch.no_grad():
                    model(**given)
                tokens = torch.cat([args[0].reshape(-1, linear.in_features) for args, _, _ in calls]).double()
                seen[name] = tokens.T @ tokens
            for name, linear in linears.items():
                full = f"{path}.{number}.{name}.weight"
                grid = mse.clipped(linear.weight.detach(), INT4, torch.bfloat16)
                expected = oracles.gptq(linear.weight.detach(), seen[name], grid, 0.01)
                step = grid.scale.repeat_interleave(GROUP, 1).double().numpy()
                off[full] = float(np.mean(np.abs(artifact[full].double().numpy() - expected) > 0.5 * np.abs(step)))
            if hand_on:
                for name, parameter in block.named_parameters():
                    parameter.data = artifact[f"{path}.{number}.{name}"]
    return off


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_equals_a_naive_gptq_that_sees_quantized_blocks(lively: Path, tmp_path: Path, data: Path, name: str) -> None:
    quantize(lively / name, tmp_path / "out", data)
    artifact = weights_of(tmp_path / "out")
    off = naive_gptq(lively / name, data, artifact, LISTS[name], hand_on=True)
    # In float32 a value between two codes may tip, and what comes after it in its row.
    assert max(off.values()) < 0.01
    # The same comparison tells that a block did not see what the original's blocks before it return.
    others = naive_gptq(lively / name, data, artifact, LISTS[name], hand_on=False)
    firsts = tuple(f"{path}.0." for path in LISTS[name])
    affected = [key for key in off if not key.startswith(firsts) or "EncDecAttention.k" in key]
    assert len(affected) > 10
    assert min(others[key] for key in affected) > 0.02


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_blocks_learn_from_what_the_original_returns(
    lively: Path, tmp_path: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets: list[Tensor] = []
    original = at_work.round_block

    def round_block(block: nn.Module, layers: Any, calls: Any, wanted: Any, *others: Any) -> Any:
        targets.append(torch.cat([wanted[number] for number in range(len(calls))]))
        return original(block, layers, calls, wanted, *others)

    monkeypatch.setattr(at_work, "round_block", round_block)
    quantize(lively / name, tmp_path / "out", data, **ALGORITHMS[1])
    model = network(lively / name)
    blocks = [block for path in LISTS[name] for block in model.get_submodule(path).children()]
    with recorded(blocks) as calls, torch.no_grad():
        model(**model_inputs(model, data))
    assert len(targets) == len(calls)
    for target, (_, _, output) in zip(targets, calls, strict=True):
        torch.testing.assert_close(target, hidden(output), rtol=0, atol=1e-4)


# Equal work gives equal bytes.


@pytest.mark.parametrize("options", ALGORITHMS, ids=["gptq", "autoround", "awq and gptq"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_again_and_from_disk(
    lively: Path, tmp_path: Path, data: Path, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spilled: list[int] = []
    original = engine.Activations.__setitem__

    def put(self: engine.Activations, index: int, values: Tensor) -> None:
        original(self, index, values)
        spilled.append(len(self._spilled))

    monkeypatch.setattr(engine.Activations, "__setitem__", put)
    for out in ("one", "two", "disk"):
        if out == "disk":
            assert not any(spilled)
            monkeypatch.setattr(calibrated, "spare_memory", lambda *_: 0)
        quantize(lively / name, tmp_path / out, data, **options)
    assert max(spilled) > 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "one", "two"]


def interrupted(monkeypatch: pytest.MonkeyPatch, place: str, after: int) -> Callable[[], None]:
    """Let a function of `calibrated` raise at one of its calls; returns what puts it right again."""
    owner = calibrated.CalibratedWork if place == "_write" else calibrated
    original = getattr(owner, place)
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, place, call)
    return lambda: monkeypatch.setattr(owner, place, original)


#: Quantized layers, and parameters in all, of a block of the small llama.
CODED, PARAMETERS = 7, 9


@pytest.mark.parametrize("options", ALGORITHMS, ids=["gptq", "autoround", "awq and gptq"])
@pytest.mark.parametrize(
    ("place", "after", "blocks"), [("_write", 0, 0), ("_write", 2, 2), ("write_codes", CODED + 3, 1)]
)
def test_an_interrupted_run_continues(
    lively: Path,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    place: str,
    after: int,
    blocks: int,
) -> None:
    quantize(lively / "llama", tmp_path / "wanted", data, **options)
    restore = interrupted(monkeypatch, place, after)
    with pytest.raises(KeyboardInterrupt):
        quantize(lively / "llama", tmp_path / "out", data, **options)
    restore()
    assert not (tmp_path / "out").exists()
    lines = (tmp_path / ".out.partial" / "journal.jsonl").read_text().splitlines()
    names = Counter(json.loads(line)["name"].split(".")[2] for line in lines[1:])
    assert names == {str(number): PARAMETERS for number in range(blocks)}
    chosen: list[str] = []
    original = at_work.round_block
    monkeypatch.setattr(at_work, "round_block", lambda *args: chosen.append("block") or original(*args))
    quantize(lively / "llama", tmp_path / "out", data, **options)
    assert len(chosen) == 3 - blocks  # finished blocks only run
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wanted"]


def test_an_interrupted_run_leaves_no_hidden_states(
    lively: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / ".out.partial" / "scratch"
    monkeypatch.setattr(calibrated, "spare_memory", lambda *_: 0)
    seen: list[int] = []
    original = at_work.round_block
    monkeypatch.setattr(at_work, "round_block", lambda *args: seen.append(len([*scratch.iterdir()])) or original(*args))
    interrupted(monkeypatch, "_write", 1)
    with pytest.raises(KeyboardInterrupt):
        quantize(lively / "t5", tmp_path / "out", data)
    assert seen[0] > 0 and not [*scratch.iterdir()]
    assert (tmp_path / ".out.partial" / "journal.jsonl").exists()


def test_another_recipe_or_other_data_does_not_continue(
    lively: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restore = interrupted(monkeypatch, "_write", 1)
    with pytest.raises(KeyboardInterrupt):
        quantize(lively / "llama", tmp_path / "out", data)
    restore()
    before = contents(tmp_path / ".out.partial")
    other = token_file(tmp_path / "other.npz", seed=1)
    for chosen, options in (
        (data, {"group_size": 32}),
        (data, {"algorithm": "autoround"}),
        (other, {}),
        (data, {"samples": 4}),
    ):
        with pytest.raises(UsageError, match="begun with another recipe, input or version"):
            quantize(lively / "llama", tmp_path / "out", chosen, **options)
        assert contents(tmp_path / ".out.partial") == before
    command = ["convert", str(lively / "llama"), "-o", str(tmp_path / "out"), "--scheme", "int4", "--algorithm", "gptq"]
    assert main([*command, "--group-size", "16", "--data", str(other)]) == 2
    assert "begun with another recipe" in capsys.readouterr().err


# What blocks look like to a user: notes, progress, threads.


def blanked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a layer see no token."""
    original = at_work.observe

    def observe(*args: Any) -> dict[str, LinearStats]:
        return original(*args) | {name: LinearStats()}

    monkeypatch.setattr(at_work, "observe", observe)


@pytest.mark.parametrize("steps", [["gptq"], ["awq"], ["smoothquant", "gptq"], [{"autoround": {"iterations": 2}}]])
def test_a_layer_that_sees_no_token_falls_back(
    lively: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Any]
) -> None:
    blanked(monkeypatch, "mlp.down_proj")
    recipe = Recipe(scheme="int4", group_size=GROUP, steps=steps)
    report = convert(lively / "llama", tmp_path / "out", data=data, recipe=recipe, threads=1)
    rounding_name = next(iter(steps[-1])) if isinstance(steps[-1], dict) else steps[-1]
    assert f"3 layers: no token seen: mse in place of {rounding_name}." in report.warnings
    layers = manifest_of(tmp_path / "out")["layers"]
    assert layers["model.layers.1.mlp.down_proj.weight"]["algorithm"] == "mse"
    assert layers["model.layers.1.mlp.up_proj.weight"]["algorithm"] == rounding_name
    name = "model.layers.0.mlp.down_proj.weight"
    expected = mse.run(tensors_of(lively / "llama")[name], INT4, torch.bfloat16)
    torch.testing.assert_close(weights_of(tmp_path / "out")[name], values_of(expected), rtol=0, atol=0)


def test_a_singular_hessian_is_damped_more_and_said(lively: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "constant.npz", input_ids=np.full((4, 12), 7))
    recipe = Recipe(scheme="int4", group_size=GROUP, steps=[{"gptq": {"damping": 1e-9}}])
    report = convert(lively / "llama", tmp_path / "out", data=tmp_path / "constant.npz", recipe=recipe, threads=1)
    said = [warning for warning in report.warnings if "for a Hessian that is nearly singular" in warning]
    assert said and all(" damping " in warning for warning in said)
    layer = manifest_of(tmp_path / "out")["layers"]["model.layers.0.self_attn.q_proj.weight"]
    assert layer["algorithm"] == "gptq" and layer["note"].startswith("damping ")
    plain = convert(
        lively / "llama", tmp_path / "plain", data=tmp_path / "constant.npz", scheme="int4", algorithm="gptq", threads=1
    )
    assert not any("singular" in warning for warning in plain.warnings)


def test_a_hessian_that_cannot_be_factored_falls_back(
    lively: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "_factor", lambda *_: None)
    report = quantize(lively / "llama", tmp_path / "out", data)
    assert "21 layers: singular Hessian: mse in place of gptq." in report.warnings


def test_layers_outside_the_blocks_are_rounded_without_data(lively: Path, tmp_path: Path, data: Path) -> None:
    report = quantize(lively / "bert", tmp_path / "out", data)
    assert "1 layer: outside the blocks: mse in place of gptq." in report.warnings
    assert manifest_of(tmp_path / "out")["layers"]["pooler.dense.weight"]["algorithm"] == "mse"


@pytest.mark.parametrize("options", ALGORITHMS[:2], ids=["gptq", "autoround"])
def test_progress_moves_within_blocks(lively: Path, tmp_path: Path, data: Path, options: dict[str, Any]) -> None:
    told: list[tuple[int, int]] = []
    quantize(lively / "llama", tmp_path / "out", data, progress=lambda *each: told.append(each), **options)
    done, total = [each for each, _ in told], told[0][1]
    assert done == sorted(done) and done[-1] == total and all(each == total for _, each in told)
    blocks = [each / total for each in done]
    # Several steps in each third, none of them large.
    assert min(np.histogram(blocks, 3, (0, 1))[0]) >= 5
    assert max(np.diff([0, *blocks])) < 0.15


def test_threads_are_those_asked_for(lively: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.system.parallel.os.sched_getaffinity", lambda _: range(3), raising=False)
    seen: list[int] = []
    original = at_work.round_block
    monkeypatch.setattr(at_work, "round_block", lambda *args: seen.append(torch.get_num_threads()) or original(*args))
    for threads, expected in ((2, 2), (None, 3)):
        seen.clear()
        quantize(lively / "llama", tmp_path / f"out{threads}", data, threads=threads)
        assert set(seen) == {expected}
        assert torch.get_num_threads() == 1
    assert contents(tmp_path / "out2").keys() == contents(tmp_path / "outNone").keys()


def test_layers_of_one_input_with_different_schemes(lively: Path, tmp_path: Path, data: Path) -> None:
    """Query, key and value share a Hessian, which serves them one after the other where their grids differ."""
    names = ["q_proj", "k_proj", "v_proj"]
    one_scale = {"weights": {"dtype": "int8", "granularity": "tensor"}}
    rules = [
        {"match": f"*.{names[0]}", "scheme": "int8"},
        {"match": [f"*.{each}" for each in names[1:]], "scheme": one_scale},
    ]
    recipe = Recipe.model_validate({"scheme": "int4", "algorithm": "gptq", "rules": rules})
    quantize(lively / "llama", tmp_path / "out", data, recipe=recipe, scheme=None, algorithm=None)
    layers = manifest_of(tmp_path / "out")["layers"]
    found = {name: layers[f"model.layers.0.self_attn.{name}.weight"] for name in names}
    assert all(each["algorithm"] == "gptq" and each["sqnr_db"] > 30 for each in found.values())
    assert [each["scheme"] for each in found.values()] == ["int8, channel", "int8, tensor", "int8, tensor"]


def test_images(models: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "pixels.npz", pixel_values=pixels)
    quantize(models / "vit", tmp_path / "out", tmp_path / "pixels.npz")
    weights = weights_of(tmp_path / "out")
    model = network(models / "vit")
    query = model.get_submodule("vit.layers.0.attention.q_proj")
    with recorded([query]) as calls, torch.no_grad():
        model(pixel_values=torch.from_numpy(pixels))
    tokens = calls[0][0][0].reshape(-1, 64).double()
    base = mse.clipped(query.weight.detach(), INT4, torch.bfloat16)
    expected = oracles.gptq(query.weight.detach(), tokens.T @ tokens, base, 0.01)
    found = weights["vit.encoder.layer.0.attention.attention.query.weight"].double().numpy()
    assert np.mean(np.abs(found - expected) > 1e-3) < 0.01
    assert manifest_of(tmp_path / "out")["calibration"].keys() == {"data_sha256", "samples"}


# What is refused, before anything is written.


def refused(source: Path, out: Path, *arguments: str) -> int:
    """The exit status of a conversion that must leave nothing behind."""
    status = main(["convert", str(source), "-o", str(out), "--scheme", "int4", "--algorithm", "gptq", *arguments])
    assert not out.exists() and not (out.parent / f".{out.name}.partial").exists()
    return status


def test_text_that_does_not_suffice(lively: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3 w4")
    data = ["--data", str(tmp_path / "short.txt"), "--seq-len", "16"]
    assert refused(lively / "llama", tmp_path / "out", *data) == 3
    assert "short.txt" in capsys.readouterr().err


def test_a_tokenizer_of_another_model(lively: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((lively / "llama" / "config.json").read_text()) | {"vocab_size": 40}
    tensors = {
        name: part[:40] if name in ("model.embed_tokens.weight", "lm_head.weight") else part
        for name, part in tensors_of(lively / "llama").items()
    }
    tf.LlamaForCausalLM(tf.LlamaConfig(**config)).save_pretrained(tmp_path / "small", state_dict=tensors)
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in range(60)))
    data = ["--data", str(tmp_path / "text.txt"), "--seq-len", "8", "--tokenizer", str(lively / "llama")]
    assert refused(tmp_path / "small", tmp_path / "out", *data) == 3
    error = capsys.readouterr().err
    assert "and the model knows 40: they do not belong together" in error and "--tokenizer" in error


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--device", "cuda"], 3, "--device cuda: torch .* sees no such device"),
        (["--device", "tpu"], 2, "--device tpu is not known. Use cpu or cuda."),
        (["--max-memory", "1MB"], 2, r"--max-memory 1 MB is too little: with model\.layers\.0, .* are needed"),
    ],
)
def test_machines_that_do_not_suffice(
    lively: Path,
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(lively / "llama", tmp_path / "out", "--data", str(data), *arguments) == status
    assert re.search(message, capsys.readouterr().err)
