"""Quantization-aware training from the command line: sources, labels, losses, and what is refused."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper
from support import real_models
from support.graphs import model, node, normal
from support.onnx_models import halved
from support.small_nets import CLASSES, cnn
from support.trained_graphs import SCHEMES, checkpoints_in_every_step, inputs_of, interrupting

from quantcli import convert, evaluate
from quantcli.cli.app import main
from quantcli.export.export import export_to_onnx
from quantcli.models.session import Session
from quantcli.onnx.graph.model import open_onnx
from quantcli.planning.recipe import validate
from quantcli.training import loop


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The convolutional network in several forms, with data and labels; to be left as it is."""
    folder = tmp_path_factory.mktemp("nets")
    export_to_onnx("support.small_nets:cnn", folder / "cnn").path.rename(folder / "cnn.onnx")
    (port,) = Session(folder / "cnn.onnx").inputs
    images = inputs_of("cnn", 48)
    # What the network itself finds in the images, but for every fifth.
    labels = next(iter(Session(folder / "cnn.onnx").run({port.name: images}).values())).argmax(-1)
    labels[::5] = (labels[::5] + 1) % CLASSES
    np.savez(folder / "cnn.npz", **{port.name: images, "labels": labels})
    np.savez(folder / "plain.npz", **{port.name: images})
    torch.save(cnn().state_dict(), folder / "cnn.pt")
    example = torch.randn(2, 3, 12, 12)
    program = torch.export.export(cnn(), (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, folder / "cnn.pt2")
    return folder


Convert = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


def command(source: object, place: Path, scheme: str, data: object, *more: object, **options: Any) -> list[str]:
    """A command line with its recipe: two epochs unless another length is given."""
    length = {} if options.keys() & {"steps", "epochs"} else {"epochs": 2}
    wishes = {"scheme": SCHEMES.get(scheme, scheme), "steps": [{"qat": {"batch_size": 16, **length, **options}}]}
    recipe = place.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(wishes))
    words = ["convert", source, "-o", place, "--recipe", recipe, "--threads", 1]
    return [*map(str, words), *(["--data", str(data)] if data else []), *map(str, more)]


@pytest.fixture
def done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Runs `convert`, and returns its report."""

    def run(source: object, scheme: str, data: object, *more: object, name: str = "out.onnx", **options: Any) -> Any:
        capsys.readouterr()
        assert main([*command(source, tmp_path / name, scheme, data, *more, **options), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs `convert`, which must fail with one clear paragraph and leave nothing, and returns what it says."""

    def run(status: int, source: object, scheme: str, data: object, *more: object, **options: Any) -> str:
        before = {path.name for path in tmp_path.iterdir()} | {"recipe.yaml"}
        capsys.readouterr()
        assert main(command(source, tmp_path / "out.onnx", scheme, data, *more, **options)) == status
        shown = capsys.readouterr()
        assert shown.out == "" and "Traceback" not in shown.err
        assert {path.name for path in tmp_path.iterdir()} == before
        text = " ".join(shown.err.split())
        return text[text.index("Error: ") :]

    return run


def test_labels_are_learned_from_and_reported(home: Path, done: Convert) -> None:
    labelled = done(home / "cnn.onnx", "W4A8", home / "cnn.npz", epochs=6)
    told = labelled["training"]
    assert told["loss"] == "distillation + labels" and told["steps"] == 12
    assert told["models"]["original"].keys() == {"loss", "top1"} == told["models"]["qat"].keys()
    assert told["models"]["original"]["loss"] > 0.1
    assert told["models"]["qat"]["loss"] <= told["models"]["ptq"]["loss"]
    alone = done(home / "cnn.onnx", "W4A8", home / "cnn.npz", name="b.onnx", distillation=0)
    assert alone["training"]["loss"] == "labels"
    without = done(home / "cnn.onnx", "W4A8", home / "cnn.npz", name="c.onnx", labels=0)
    assert without["training"]["loss"] == "distillation"
    assert without["training"]["models"]["qat"].keys() == {"loss", "top1_agreement"}


def test_the_manifest_says_that_it_was_trained(home: Path, tmp_path: Path, done: Convert) -> None:
    done(home / "cnn.onnx", "W4A8", home / "cnn.npz")
    manifest = open_onnx(tmp_path / "out.onnx").manifest.to_json()
    assert manifest["recipe"]["steps"] == [{"qat": {"batch_size": 16, "epochs": 2}}]
    layers = [layer for layer in manifest["layers"].values() if layer["mode"] != "float"]
    assert len(layers) == 5 and all(layer["algorithm"].endswith("+ qat") for layer in layers)
    assert str(home) not in json.dumps(manifest) and str(tmp_path) not in json.dumps(manifest)


def test_a_label_out_of_range(home: Path, tmp_path: Path, refused: Refused) -> None:
    with np.load(home / "cnn.npz") as arrays:
        held = dict(arrays)
    held["labels"][7] = CLASSES
    np.savez(tmp_path / "bad.npz", **held)
    said = refused(3, home / "cnn.onnx", "W4A8", tmp_path / "bad.npz")
    assert "Sample 8 has the label 10, and the model has 10 classes, 0 to 9." in said


def test_labels_that_are_asked_for_and_missing_leave_nothing_in_the_way(
    home: Path, done: Convert, refused: Refused
) -> None:
    said = refused(2, home / "cnn.onnx", "W4A8", home / "plain.npz", distillation=0)
    assert "the data has no labels" in said
    done(home / "cnn.onnx", "W4A8", home / "plain.npz")


OWN = """
def loss(*, outputs, original, labels, inputs):
    (found,), (wanted,) = outputs.values(), original.values()
    return (found - wanted).abs().mean()
def broken(**_):
    raise ValueError("no idea")
def lost(*, outputs, **_):
    return sum(outputs.values()).mean() * float("nan")
"""


def test_a_loss_of_ones_own(
    home: Path, tmp_path: Path, done: Convert, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_losses.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    told = done(home / "cnn.onnx", "W4A8", home / "plain.npz", loss="my_losses:loss")["training"]
    assert told["loss"] == "my_losses:loss" and told["models"]["qat"]["loss"] <= told["models"]["ptq"]["loss"]
    (tmp_path / "out.onnx").unlink()
    said = refused(3, home / "cnn.onnx", "W4A8", home / "plain.npz", loss="my_losses:broken")
    assert "my_losses:broken failed: ValueError: no idea." in said
    said = refused(3, home / "cnn.onnx", "W4A8", home / "plain.npz", loss="my_losses:lost")
    assert "The loss became nan in step 1 of 4, before the model was better than at the start." in said
    assert "There is no module nowhere" in refused(3, home / "cnn.onnx", "W4A8", home / "plain.npz", loss="nowhere:f")


def test_programs_and_functions_are_sources(home: Path, tmp_path: Path, done: Convert) -> None:
    for name, source, more in (
        ("a", home / "cnn.pt2", ()),
        ("b", "support.small_nets:cnn", ("--weights", home / "cnn.pt")),
    ):
        export_to_onnx(source, tmp_path / name, weights=home / "cnn.pt" if more else None)
        (port,) = Session(tmp_path / name / "model.onnx").inputs
        np.savez(tmp_path / f"{name}.npz", **{port.name: inputs_of("cnn", 48)})
        report = done(source, "W4A8", tmp_path / f"{name}.npz", *more, name=f"{name}.onnx")
        models = report["training"]["models"]
        assert models["qat"]["loss"] <= models["ptq"]["loss"]
        assert report["verified"]["compared"]["sqnr_db"] > 10


def test_two_inputs_and_two_outputs(tmp_path: Path, done: Convert) -> None:
    ports = Session(export_to_onnx("support.small_nets:pair", tmp_path / "pair").path).inputs
    arrays = {port.name: normal(48, *port.shape[1:], seed=index) for index, port in enumerate(ports) if port.shape}
    np.savez(tmp_path / "data.npz", **arrays)
    for number, scheme in enumerate(("static", "dynamic", "int4")):
        report = done(tmp_path / "pair", scheme, tmp_path / "data.npz", name=f"{number}.onnx")
        models = report["training"]["models"]
        assert models["qat"]["loss"] <= models["ptq"]["loss"]
        assert models["qat"].keys() == {"loss", "top1_agreement"}


@pytest.mark.parametrize("scheme", ["static", "W4A8", "int8", "int4"])
def test_graphs_in_half_precision_are_trained_or_refused(
    home: Path, tmp_path: Path, done: Convert, refused: Refused, scheme: str
) -> None:
    onnx.save(halved(onnx.load(home / "cnn.onnx")), tmp_path / "half.onnx")
    with np.load(home / "plain.npz") as arrays:
        np.savez(tmp_path / "half.npz", **{name: each.astype(np.float16) for name, each in arrays.items()})
    said = refused(3, tmp_path / "half.onnx", scheme, tmp_path / "half.npz")
    assert "float16" in said


def test_a_model_that_cannot_be_traced(tmp_path: Path, refused: Refused) -> None:
    np.savez(tmp_path / "x.npz", x=normal(8, 64))
    said = refused(3, "support.small_nets:untraceable", "int8", tmp_path / "x.npz")
    assert "trace" in said.lower() or "export" in said.lower(), said


def test_an_operator_without_a_differentiable_form_is_named(tmp_path: Path, refused: Refused) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Det", ["h"], ["y"], name="determinant")]
    onnx.save(model(nodes, {"x": ["n", 64, 64]}, {"y": None}, {"w": normal(64, 64)}), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=normal(8, 64, 64))
    assert "Det" in refused(3, tmp_path / "m.onnx", "int8", tmp_path / "x.npz")


def test_a_model_without_float_outputs(tmp_path: Path, refused: Refused) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("ArgMax", ["h"], ["y"], axis=1)]
    proto = model(nodes, {"x": ["n", 64]}, {}, {"w": normal(64, 64)})
    proto.graph.output.append(helper.make_tensor_value_info("y", TensorProto.INT64, ["n", 1]))
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=normal(8, 64))
    assert "no output of floating point" in refused(3, tmp_path / "m.onnx", "int8", tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("status", "scheme", "more", "options", "says"),
    [
        (2, "W4A8", (), {"epoch": 1}, "unknown option 'epoch'. Did you mean 'epochs'?"),
        (3, "W4A8", ("--device", "cuda"), {}, "--device cuda"),
        (2, "W4A8", ("--device", "tpu"), {}, "--device tpu"),
        (3, "fp16", (), {}, "Nothing is quantized that could be trained"),
        (3, "W4A8", ("--samples", "1"), {}, "1 sample"),
    ],
)
def test_what_is_refused(
    home: Path, refused: Refused, status: int, scheme: str, more: tuple[str, ...], options: dict[str, Any], says: str
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert says in refused(status, home / "cnn.onnx", scheme, home / "plain.npz", *more, **options)


def test_data_is_needed(home: Path, refused: Refused) -> None:
    for scheme in ("int8", "int4"):
        assert "qat learns from data." in refused(2, home / "cnn.onnx", scheme, None)


def test_a_dry_run_writes_nothing(home: Path, tmp_path: Path, done: Convert) -> None:
    report = done(home / "cnn.onnx", "W4A8", home / "plain.npz", "--dry-run")
    assert report["dry_run"] and report["estimated"] and "training" not in report
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_was_interrupted_is_continued_by_the_same_command_alone(
    home: Path, tmp_path: Path, done: Convert, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints_in_every_step(monkeypatch)
    data, out, state = home / "plain.npz", tmp_path / "out.onnx", tmp_path / ".out.onnx.partial" / "training.pt"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_log", interrupting(3))
        assert main(command(home / "cnn.onnx", out, "W4A8", data)) == 130
    kept = state.read_bytes()
    for other, more, options in (
        (data, (), {"learning_rate": 0.01}), (data, ("--seed", 1), {}), (home / "cnn.npz", (), {}),
    ):  # fmt: skip
        capsys.readouterr()
        assert main(command(home / "cnn.onnx", out, "W4A8", other, *more, **options)) == 2
        assert "was begun with another recipe, input or version" in " ".join(capsys.readouterr().err.split())
        assert state.read_bytes() == kept
    # To look at what would be done is no way to lose what was.
    done(home / "cnn.onnx", "W4A8", data, "--dry-run")
    assert state.read_bytes() == kept
    done(home / "cnn.onnx", "W4A8", data)
    assert not state.exists()
    done(home / "cnn.onnx", "W4A8", data, name="whole.onnx")
    assert out.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_log", interrupting(3))
        assert main(command(home / "cnn.onnx", tmp_path / "new.onnx", "W4A8", data)) == 130
    told = done(home / "cnn.onnx", "W4A8", data, "--force", name="new.onnx", learning_rate=0.01)
    assert told["training"]["steps"] == 4 and not (tmp_path / ".new.onnx.partial").exists()


def test_codes_without_a_grid_are_not_trained(tmp_path: Path, refused: Refused) -> None:
    onnx.save(model([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 64]}, {"y": None}, {"w": normal(64, 64)}),
              tmp_path / "m.onnx")  # fmt: skip
    np.savez(tmp_path / "x.npz", x=normal(8, 64))
    said = refused(3, tmp_path / "m.onnx", "nf4", tmp_path / "x.npz")
    assert "Nothing is quantized that could be trained" in said


def test_what_gptq_chose_is_trained_and_continued(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there of the Hessians and of the exported graph is no obstacle to going on."""
    recipe = validate({"scheme": "int4", "group_size": 32, "steps": ["gptq", {"qat": {"steps": 6}}]}, "test")
    np.savez(tmp_path / "x.npz", x=inputs_of("cnn", 24))
    wishes: dict[str, Any] = {"recipe": recipe, "data": tmp_path / "x.npz", "weights": home / "cnn.pt", "threads": 1}
    convert("support.small_nets:cnn", tmp_path / "whole.onnx", **wishes)
    checkpoints_in_every_step(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Training, "_log", interrupting(4))
        convert("support.small_nets:cnn", tmp_path / "out.onnx", **wishes)
    convert("support.small_nets:cnn", tmp_path / "out.onnx", **wishes)
    assert (tmp_path / "whole.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    layers = open_onnx(tmp_path / "out.onnx").manifest.to_json()["layers"]
    assert {layer["algorithm"] for layer in layers.values() if "algorithm" in layer} == {"gptq + qat"}


@pytest.mark.slow
def test_four_bits_of_weights_learn_to_know_digits(tmp_path: Path, done: Convert) -> None:

    source, _, test = real_models.digits_cnn(tmp_path)
    import digits

    images, _, labels, _ = digits.images()
    np.savez(tmp_path / "train.npz", input=images, labels=labels)
    report = done(source, "W4A8", tmp_path / "train.npz", epochs=5)
    models = report["training"]["models"]
    assert models["qat"]["loss"] < models["ptq"]["loss"]
    found = [evaluate(each, data=str(test), task="classification") for each in (source, tmp_path / "out.onnx")]
    exact, quantized = (each.models[0].metrics["top1"] or 0 for each in found)
    assert quantized > exact - 0.01
