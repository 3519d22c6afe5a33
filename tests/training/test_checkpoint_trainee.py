"""Checkpoints in training: what is trained is what transformers computes of the artifact; interruptions, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.artifacts import contents, decoded, loaded, reference, tensors_of
from support.plain_blocks import network, token_file
from support.trained_graphs import checkpoints_in_every_step, decibels, interrupting
from torch import Tensor

from quantcli import convert
from quantcli.conversion.checkpoint import calibrated
from quantcli.errors import InputError, UsageError
from quantcli.planning.recipe import Recipe, validate
from quantcli.training import loop
from quantcli.training.checkpoint_trainee import CheckpointTrainee
from quantcli.training.data import TrainingData
from quantcli.training.loop import History

pytestmark = pytest.mark.usefixtures("no_runtime_check")

INT4 = {"scheme": "int4", "group_size": 32}
ASYMMETRIC = {"weights": {"dtype": "int4", "granularity": "group", "group_size": 32, "symmetric": False}}
SCHEMES: dict[str, dict[str, Any]] = {
    "int4": INT4, "int4 asymmetric": {"scheme": ASYMMETRIC}, "int8": {"scheme": "int8"},
    "int8-dynamic": {"scheme": "int8-dynamic"}, "int8-static": {"scheme": "int8-static"},
}  # fmt: skip
RATES = {"learning_rate": 3e-2, "scale_learning_rate": 1e-3}
QAT: dict[str, Any] = {"qat": {"epochs": 4, "held_out": 0.2, "batch_size": 8, **RATES}}


def recipe(scheme: str = "int4", *steps: str | dict[str, Any], **more: Any) -> Recipe:
    return validate({**SCHEMES[scheme], "steps": list(steps or ("rtn", QAT)), **more}, "test")


def pixel_file(path: Path, count: int = 24) -> Path:
    images = np.random.default_rng(0).standard_normal((count, 3, 32, 32)).astype(np.float32)
    np.savez(path, pixel_values=images, labels=np.arange(count) % 2)
    return path


@pytest.fixture
def make(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Converts a tiny model with a recipe, in a folder of this name; small products on several threads would wait."""

    def run(name: str, wishes: Recipe, model: str = "llama", **more: Any) -> Path:
        data = pixel_file(tmp_path / "x.npz") if model == "vit" else token_file(tmp_path / "ids.npz", count=96)
        source = models / model if isinstance(model, str) else model
        convert(source, tmp_path / name, recipe=wishes, data=more.pop("data", data), threads=1, **more)
        return tmp_path / name

    return run


@dataclass
class Seen:
    """The trainee of a conversion, a batch for it, and what it computed when it had moved."""

    trainee: CheckpointTrainee | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    after: Tensor = field(default_factory=lambda: torch.zeros(0))


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Seen]]:
    """In place of training, move all that is learned at random, so far as is said."""

    def install(size: float) -> Seen:
        seen = Seen()

        def move(trainee: CheckpointTrainee, data: TrainingData, *_: object, **__: object) -> History:
            seen.trainee, seen.inputs = trainee, dict(next(data.batches(range(8))).inputs)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for kind, share in ((trainee.weights(), 1.0), (trainee.factors(), 0.1), (trainee.values(), 0.3)):
                    for each in kind:
                        each.add_(torch.randn(each.shape, generator=generator).clamp(-2, 2), alpha=size * share)
                (seen.after,) = trainee.student(seen.inputs).values()
            return History("moved")

        monkeypatch.setattr("quantcli.training.checkpoint.train", move)
        return seen

    yield install


class OneToken(torch.nn.Module):
    """A head that is given rows one by one: of a table, compressed-tensors takes every entry for a token of its own."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.head(values.unsqueeze(1)).squeeze(1)
        return found


def reloaded(folder: Path, model: str, inputs: dict[str, Tensor]) -> Tensor:
    """What transformers computes of an artifact."""
    if (folder / "decoded").exists():
        module: Any = loaded(folder / "decoded", model, dtype=torch.float32)
    elif model == "vit":
        module = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
        module.classifier = OneToken(module.classifier)
    else:
        module = loaded(folder, model, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = module(**inputs)[0].float()
    return found


CASES = [("llama", each) for each in SCHEMES] + [
    (model, scheme) for model in ("bert", "vit") for scheme in ("int4", "int8-dynamic", "int8-static")
]


@pytest.mark.parametrize("size", [0.0, 1.0], ids=["as it begins", "moved"])
@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_what_is_trained_is_what_transformers_computes(
    make: Callable[..., Path], moved: Callable[[float], Seen], model: str, scheme: str, size: float
) -> None:
    seen = moved(size)
    steps: tuple[Any, ...] = (QAT,) if scheme.startswith("int8-") else ()
    out = make("out", recipe(scheme, *steps, rest="keep"), model)
    if scheme == "int4 asymmetric":
        # transformers does not load the packed zero points of so few rows.
        reference(out, model, out / "decoded")
    found = reloaded(out, model, seen.inputs)
    near = sorted(decibels(*(each.numpy() for each in pair)) for pair in zip(seen.after, found, strict=True))
    # An input next to the middle of two codes may tip, in a sample or two; codes of weights may not.
    assert near[4 if scheme.startswith("int8-") else 0] > 90 and near[0] > 30, near


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trained_codes_and_scales_are_those_of_the_artifact(
    models: Path, make: Callable[..., Path], moved: Callable[[float], Seen], scheme: str
) -> None:
    """Also where scales and norms are stored in bfloat16."""
    seen = moved(1.0)
    out = make("out", recipe(scheme, rest="bf16"))
    trainee = seen.trainee
    assert trainee is not None and len(trainee._linears) == 14
    weights, tensors, original = decoded(out), tensors_of(out), tensors_of(models / "llama")
    rows = json.loads((out / "quantcli.json").read_text())["layers"]
    for name, linear in trainee._linears.items():
        wanted = linear.weight.values().detach()
        assert torch.equal(weights[f"{name}.weight"].float(), wanted.bfloat16().float()) or torch.equal(
            weights[f"{name}.weight"].float(), wanted
        )
        exact = original[f"{name}.weight"].double()
        expected = 10 * torch.log10(exact.square().sum() / (exact - wanted.double()).square().sum())
        assert rows[f"{name}.weight"]["sqnr_db"] == pytest.approx(float(expected), abs=0.01)
        if scheme == "int8-static":
            learned: Any = linear.inputs
            assert float(tensors[f"{name}.input_scale"]) == float(learned.values())
    for name, values in trainee._values.items():
        assert torch.equal(tensors[name], values.values().detach().bfloat16())
    assert len(trainee._values) == 4


def divergence(reference: torch.nn.Module, folder: Path, ids: Tensor) -> float:
    with torch.no_grad():
        ours = reference(ids).logits.double().log_softmax(-1)
        theirs = loaded(folder, "llama")(ids).logits.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def test_codes_move_and_outputs_come_nearer(models: Path, tmp_path: Path, make: Callable[..., Path]) -> None:
    # With nothing held out the last state is kept, be it the best one or not.
    options = {**QAT["qat"], "held_out": 0, "learning_rate": 5e-2}
    plain, trained = (
        make("plain", recipe("int4", "rtn"), data=None),
        make("trained", recipe("int4", "rtn", {"qat": options})),
    )
    before, after = tensors_of(plain), tensors_of(trained)
    assert before.keys() == after.keys()
    for name, values in before.items():
        if not name.endswith("weight_packed"):
            assert torch.equal(values, after[name]) != name.endswith(("weight_scale", "layernorm.weight")), name
        assert (values.dtype, values.shape) == (after[name].dtype, after[name].shape)
    codes = [name for name in before if name.endswith("weight_packed")]
    assert any(not torch.equal(before[name], after[name]) for name in codes)
    with np.load(tmp_path / "ids.npz") as arrays:
        ids = torch.from_numpy(arrays["input_ids"])
    reference = network(models / "llama")
    assert divergence(reference, trained, ids) < 0.7 * divergence(reference, plain, ids)


def test_the_report_and_the_manifest_tell_of_it(models: Path, tmp_path: Path) -> None:
    data = token_file(tmp_path / "ids.npz", count=96)
    report = convert(models / "llama", tmp_path / "out", recipe=recipe(), data=data, threads=1)
    told = report.details["training"]
    assert told["models"]["qat"]["loss"] < told["models"]["ptq"]["loss"]
    assert told["models"]["original"]["loss"] == pytest.approx(0, abs=1e-6)
    assert told["loss"] == "distillation" and told["curve"][0]["step"] == 0
    manifest = json.loads((tmp_path / "out" / "quantcli.json").read_text())
    assert manifest["calibration"]["training"] == {key: told[key] for key in ("loss", "steps", "best_step", "stopped")}
    assert told["steps"] == 36 and told["stopped"] == "finished"
    layers = [layer for layer in manifest["layers"].values() if layer.get("scheme")]
    assert {layer["algorithm"] for layer in layers} == {"rtn + qat"}


def interrupted_in(monkeypatch: pytest.MonkeyPatch, place: str, placed: int = 5) -> None:
    def stops_after(calls: int, original: Callable[..., Any]) -> Callable[..., Any]:
        left = iter(range(calls))

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    if place == "training":
        monkeypatch.setattr(loop.Training, "_log", interrupting(25))
    elif place == "blocks":
        monkeypatch.setattr(calibrated, "write_codes", stops_after(9, calibrated.write_codes))
    elif place == "between":
        monkeypatch.setattr(calibrated, "load_trained", stops_after(0, calibrated.load_trained))
    else:
        monkeypatch.setattr(calibrated, "write_codes", stops_after(placed, calibrated.write_codes))


def test_runs_are_equal_also_when_they_were_interrupted_anywhere(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, again = make("whole", recipe()), make("again", recipe())
    assert contents(whole) == contents(again)
    checkpoints_in_every_step(monkeypatch)
    for place in ("blocks", "training", "between", "placing"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupted_in(patch, place)
            make("resumed", recipe())
        left = tmp_path / ".resumed.partial"
        assert not (tmp_path / "resumed").exists() and (left / "journal.jsonl").exists()
    assert contents(make("resumed", recipe())) == contents(whole)
    assert not left.exists()
    # Interrupted once, while it was placed: nothing of it is trained twice.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_in(patch, "placing", 14 + 5)
        make("once", recipe())
    assert contents(make("once", recipe())) == contents(whole)


def test_what_was_begun_with_another_recipe_is_refused(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoints_in_every_step(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_in(patch, "training")
        make("out", recipe())
    other = recipe("int4", "rtn", {"qat": {**QAT["qat"], "learning_rate": 0.1}})
    for wishes, seed in ((other, 0), (recipe(), 1)):
        with pytest.raises(UsageError, match="begun with another recipe, input or version"):
            make("out", wishes, seed=seed)
    assert (make("out", other, force=True) / "model.safetensors").exists()
    assert contents(make("fresh", other)) == contents(tmp_path / "out")


def test_a_classifier_learns_from_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(0).integers(3, 96, (24, 16))
    np.savez(tmp_path / "d.npz", input_ids=ids, labels=ids.sum(-1) % 3)
    report = convert(tmp_path / "model", tmp_path / "out", recipe=recipe(), data=tmp_path / "d.npz", threads=1)
    told = report.details["training"]
    assert told["loss"] == "distillation + labels" and told["models"]["qat"].keys() == {"loss", "top1"}
    assert told["models"]["qat"]["loss"] < told["models"]["ptq"]["loss"]
    np.savez(tmp_path / "bad.npz", input_ids=ids, labels=np.full(24, 3))
    with pytest.raises(InputError, match="has the label 3, and the model has 3 classes"):
        convert(tmp_path / "model", tmp_path / "bad", recipe=recipe(), data=tmp_path / "bad.npz", threads=1)
    assert not (tmp_path / "bad").exists() and not (tmp_path / ".bad.partial").exists()


def test_smoothed_and_scaled_models_are_trained_too(models: Path, make: Callable[..., Path]) -> None:
    for name, scheme, first in (("smooth", "int8-dynamic", "smoothquant"), ("awq", "int4", "awq")):
        out = make(name, recipe(scheme, first, QAT))
        assert json.loads((out / "quantcli.json").read_text())["calibration"]["training"]["steps"] == 36


def test_too_little_memory_is_foreseen(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.training.checkpoint_trainee.free_memory_bytes", lambda: 1 << 20)
    monkeypatch.setattr(calibrated, "spare_memory", lambda *_: 1 << 30)
    monkeypatch.setattr("quantcli.training.data.free_memory_bytes", lambda: 1 << 20)
    with pytest.raises(InputError, match=r"Training needs .* of memory for the model and what it learns by") as caught:
        make("out", recipe())
    assert "Use tune" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"scheme": "nf4", "steps": ["rtn", QAT]}, "nf4"),
        ({**INT4, "steps": ["gptq", "tune", QAT]}, "qat learns scales, too"),
        ({**INT4, "steps": ["gptq", {"qat": {"rate": 1}}]}, "unknown option 'rate'"),
    ],
)
def test_recipes_that_cannot_be_meant(make: Callable[..., Path], wishes: dict[str, Any], says: str) -> None:
    with pytest.raises((UsageError, InputError)) as caught:
        make("out", validate(wishes, "test"))
    assert says in str(caught.value)


def test_data_is_needed(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        convert(models / "llama", tmp_path / "out", recipe=recipe())


@pytest.mark.parametrize("container", ["gptq", "awq"])
def test_other_containers_hold_what_was_trained(
    make: Callable[..., Path], moved: Callable[[float], Seen], container: str
) -> None:
    """Their scales are float16, and codes are laid out otherwise."""
    seen = moved(1.0)
    wishes = validate({"scheme": ASYMMETRIC, "format": container, "steps": ["gptq", QAT]}, "test")
    out = make("out", wishes)
    assert seen.trainee is not None
    weights = decoded(out)
    for name, linear in seen.trainee._linears.items():
        torch.testing.assert_close(weights[f"{name}.weight"], linear.weight.values().detach(), rtol=1e-6, atol=1e-7)
