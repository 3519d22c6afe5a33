"""Graphs in training: what is trained is what onnxruntime computes of the file, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from support.graphs import with_accuracy_level
from support.oracles import pair_sum
from support.small_nets import CLASSES, SHAPES
from support.trained_graphs import SCHEMES, checkpoints_in_every_step, decibels, inputs_of, interrupting

from quantcli import convert
from quantcli.export.export import export_to_onnx
from quantcli.models.session import Session
from quantcli.planning.recipe import Recipe, validate
from quantcli.reporting.report import Report
from quantcli.training import loop
from quantcli.training.data import TrainingData
from quantcli.training.loop import History
from quantcli.training.onnx_trainee import GraphTrainee

#: Which of these are tried on which model: convolutions have no dynamic form.
CASES = [("cnn", each) for each in ("static", "W4A8", "per tensor", "int8", "int4")]
CASES += [("encoder", each) for each in SCHEMES]
QAT = {"epochs": 2, "batch_size": 16}
#: Twenty steps, at rates that suit these models.
LEARNS = {"epochs": 4, "learning_rate": 0.02, "scale_learning_rate": 2e-3, "optimizer": "adam"}


def recipe(scheme: str, *before: str, **options: Any) -> Recipe:
    return validate({"scheme": SCHEMES[scheme], "steps": [*before, {"qat": QAT | options}]}, "test")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as ONNX, and data for them; to be left as they are."""
    folder = tmp_path_factory.mktemp("nets")
    for name in SHAPES:
        export_to_onnx(f"support.small_nets:{name}", folder / name).path.rename(folder / f"{name}.onnx")
        (port,) = Session(folder / f"{name}.onnx").inputs
        labels = np.arange(96) % CLASSES
        np.savez(folder / f"{name}.npz", **{port.name: inputs_of(name, 96), "labels": labels})
        np.savez(folder / f"{name}-plain.npz", **{port.name: inputs_of(name, 96)})
    return folder


def converted(
    home: Path, out: Path, name: str, scheme: str, *before: str, labels: bool = False, **options: Any
) -> Report:
    """Train a model; small products on several threads wait for each other most of the time."""
    data = home / (f"{name}.npz" if labels else f"{name}-plain.npz")
    return convert(home / f"{name}.onnx", out, recipe=recipe(scheme, *before, **options), data=data, threads=1)


@dataclass
class Seen:
    """The trainee of a conversion, and what it computed before and when it had moved."""

    trainee: GraphTrainee | None = None
    before: np.ndarray | None = None
    after: np.ndarray | None = None


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Seen]]:
    """In place of training, move all that is learned at random, so far as is said."""

    def install(size: float) -> Seen:
        seen = Seen()

        def move(trainee: GraphTrainee, data: TrainingData, *_: object, **__: object) -> History:
            seen.trainee = trainee
            inputs = next(data.batches(range(32))).inputs
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                (seen.before,) = (values.numpy() for values in trainee.student(inputs).values())
                small = min(size, 1.0)
                kinds = (trainee.weights(), size), (trainee.factors(), 0.1 * small), (trainee.values(), 0.3 * small)
                for kind, far in kinds:
                    for each in kind:
                        each.add_(torch.randn(each.shape, generator=generator).clamp(-2, 2), alpha=far)
                (seen.after,) = (values.numpy() for values in trainee.student(inputs).values())
            return History("moved")

        monkeypatch.setattr("quantcli.training.onnx.train", move)
        return seen

    yield install


def float_products(path: Path) -> bytes:
    """The artifact, its n-bit products computed in float32: what its codes and scales stand for."""
    return with_accuracy_level(onnx.load(path), 1).SerializeToString()  # type: ignore[no-any-return]


def agreement(home: Path, name: str, out: Path, found: np.ndarray | None) -> list[float]:
    """How near in dB onnxruntime comes to what was trained, sample by sample; by the graph as written, or its kernels.

    The lower of the two; in ascending order.
    """
    assert found is not None
    model = float_products(out)
    session = Session(model, threads=1, optimize=False)
    fed = {session.inputs[0].name: inputs_of(name, 96)[: len(found)]}
    outputs = [next(iter(each.run(fed).values())) for each in (session, Session(model, threads=1))]
    return sorted(min(decibels(row, each[number]) for each in outputs) for number, row in enumerate(found))


@pytest.mark.parametrize("size", [0.0, 1.0], ids=["as it begins", "moved"])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_what_is_trained_is_what_the_runtime_computes(
    home: Path, tmp_path: Path, moved: Callable[[float], Seen], name: str, scheme: str, size: float
) -> None:
    seen, out = moved(size), tmp_path / "out.onnx"
    converted(home, out, name, scheme)
    assert seen.before is not None and seen.after is not None
    near = agreement(home, name, out, seen.after)
    # A value next to the middle of two codes of an activation may tip, in a sample or two; codes of weights may not.
    quantizes = any(part in scheme for part in ("static", "A8", "tensor", "dynamic"))
    assert near[3 if quantizes else 0] > 100 and near[0] > 35, near
    if size:
        assert decibels(seen.before, seen.after) < 20
    else:
        assert np.array_equal(seen.before, seen.after)


def stored_codes(path: Path, name: str) -> np.ndarray:
    """Codes of a file, as they lie in it."""
    (tensor,) = (each for each in onnx.load(path).graph.initializer if each.name == name)
    return numpy_helper.to_array(tensor)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_trained_codes_are_those_of_the_file(
    home: Path, tmp_path: Path, moved: Callable[[float], Seen], name: str, scheme: str
) -> None:
    seen, out = moved(1.0), tmp_path / "out.onnx"
    report = converted(home, out, name, scheme)
    assert seen.trainee is not None
    weights = list(seen.trainee._weights.values())
    assert len(weights) == 5
    for weight in weights:
        tensor, origin = weight.learned.tensor(), weight.origin
        codes, found = tensor.codes.numpy(), stored_codes(out, weight.codes.name or "")
        if weight.nbits:
            bits = tensor.number_format.bits
            flat = found.reshape(len(codes), -1)
            unpacked = np.stack([flat & 15, flat >> 4], -1).reshape(len(codes), -1) if bits == 4 else flat
            assert np.array_equal(unpacked.astype(int) - (1 << (bits - 1)), codes)
        else:
            axis = 1 - origin.axis if origin.turned else origin.axis
            assert np.array_equal(np.moveaxis(found.astype(int), axis, 0).reshape(codes.shape), codes)
        scales = stored_codes(out, weight.scale.name or "")
        assert np.array_equal(scales.reshape(tensor.scale.shape), tensor.scale.numpy())
    rows = {row.name: row for row in report.layers}
    for weight in weights:
        restored = weight.learned.values().detach().double()
        exact = seen.trainee._original(weight.origin, restored.shape[1]).double()
        expected = 10 * torch.log10(exact.square().sum() / (exact - restored).square().sum())
        assert rows[weight.origin.name].sqnr_db == pytest.approx(float(expected), abs=0.01)


@pytest.mark.parametrize(("name", "scheme"), [("cnn", "static"), ("encoder", "static"), ("encoder", "dynamic")])
def test_no_product_of_trained_codes_can_saturate(
    home: Path, tmp_path: Path, moved: Callable[[float], Seen], name: str, scheme: str
) -> None:
    """On processors without VNNI; others would not show it."""
    seen = moved(20.0)
    converted(home, tmp_path / "out.onnx", name, scheme)
    assert seen.trainee is not None
    kinds = set()
    for weight in seen.trainee._weights.values():
        tensor, origin = weight.learned.tensor(), weight.origin
        if origin.pairs is not None:
            kinds.add(origin.pairs)
            assert pair_sum(tensor, origin.pairs, origin.shape) <= 128
    assert kinds == ({"filter", "matrix"} if name == "cnn" else {"matrix"})


@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_four_bit_codes_of_integer_layers_take_four_bits_and_run_on_their_kernels(
    home: Path, tmp_path: Path, moved: Callable[[float], Seen], name: str
) -> None:
    moved(1.0)
    for scheme in ("static", "W4A8"):
        report = converted(home, tmp_path / scheme, name, scheme)
        kernels = report.details["verified"]["runtime"]
        wanted = {"QLinearConv": 4, "QGemm": 1} if name == "cnn" else {"MatMulIntegerToFloat": 4, "QGemm": 1}
        assert {key: kernels["integer_kernels"].get(key) for key in wanted} == wanted, kernels
        assert kernels["float_kernels"] == {}
    kinds = [
        {each.name: each.data_type for each in onnx.load(tmp_path / scheme / "model.onnx").graph.initializer}
        for scheme in ("static", "W4A8")
    ]
    narrow = {key for key, kind in kinds[1].items() if kind == TensorProto.INT4}
    assert len(narrow) == 5 and {kinds[0][key] for key in narrow} == {TensorProto.INT8}


@pytest.mark.parametrize("scheme", ["static", "W4A8", "per tensor", "int8"])
def test_biases_are_those_that_were_trained(
    home: Path, tmp_path: Path, moved: Callable[[float], Seen], scheme: str
) -> None:
    seen, out = moved(1.0), tmp_path / "out.onnx"
    converted(home, out, "cnn", scheme)
    trainee = seen.trainee
    assert trainee is not None
    if scheme != "int8":
        assert len(trainee._biases) == 5
    for bias in trainee._biases.values():
        codes, scale = (stored_codes(out, each.name or "").astype(np.float64) for each in (bias.codes, bias.scale))
        wanted = bias.learned.values().detach().double().numpy()
        product = bias.inputs.scale.values().double() * bias.weight.learned.scales.values().double().reshape(-1)
        np.testing.assert_allclose(scale, np.broadcast_to(product.detach().numpy().reshape(-1), scale.shape), rtol=1e-6)
        assert (np.abs(codes * scale - wanted) <= 0.5001 * scale).all()
    for key, values in trainee._values.items():
        assert np.array_equal(stored_codes(out, key), values.values().detach().numpy())
    assert len(trainee._biases) + len(trainee._values) == 5


@pytest.mark.parametrize(("name", "scheme"), [("cnn", "W4A8"), ("encoder", "int4"), ("encoder", "dynamic int4")])
def test_training_brings_outputs_nearer_and_equal_runs_are_equal(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    report = converted(home, tmp_path / "first.onnx", name, scheme, "rtn", **LEARNS)
    models = report.details["training"]["models"]
    assert models["qat"]["loss"] < 0.95 * models["ptq"]["loss"]
    assert models["original"]["loss"] == pytest.approx(0, abs=1e-6)
    assert report.details["training"]["best_step"] > 0
    converted(home, tmp_path / "second.onnx", name, scheme, "rtn", **LEARNS)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    # And so is one that was interrupted, twice.
    checkpoints_in_every_step(monkeypatch)
    for stop in (7, 15):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop.Training, "_log", interrupting(stop))
            converted(home, tmp_path / "third.onnx", name, scheme, "rtn", **LEARNS)
        assert (tmp_path / ".third.onnx.partial" / "training.pt").exists()
        assert not (tmp_path / "third.onnx").exists()
    again = converted(home, tmp_path / "third.onnx", name, scheme, "rtn", **LEARNS)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "third.onnx").read_bytes()
    assert again.details["training"] == report.details["training"]
    assert not (tmp_path / ".third.onnx.partial").exists()
