"""LSTM, GRU and RNN: an integer LSTM where onnxruntime has one, weights in few bits where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic
from support.graphs import model, node, normal
from support.static_graphs import Converted

from quantcli import convert
from quantcli.errors import InputError
from quantcli.models.session import Session

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN, INPUTS = 48, 32


def recurrent(
    kind: str, directions: int = 1, *, outputs: tuple[str, ...] = ("y",), extra: int = 0, **attributes: Any
) -> onnx.ModelProto:
    """A recurrent node; ``extra`` of its optional inputs behind the bias are given, too."""
    rows = GATES[kind] * HIDDEN
    held = {
        "w": normal(directions, rows, INPUTS, scale=0.15), "r": normal(directions, rows, HIDDEN, seed=1, scale=0.15),
        "b": normal(directions, 2 * rows, seed=2, scale=0.1),
        "length": np.array([5, 3], np.int32), "h0": normal(directions, 2, HIDDEN, seed=3, scale=0.3),
        "c0": normal(directions, 2, HIDDEN, seed=4, scale=0.3), "p": normal(directions, 3 * HIDDEN, seed=5, scale=0.1),
    }  # fmt: skip
    used = [*list(held)[:3], *list(held)[3 : 3 + extra]]
    attributes |= {"hidden_size": HIDDEN} | ({"direction": "bidirectional"} if directions == 2 else {})
    nodes = [node(kind, ["x", *used], list(outputs), name="net", **attributes)]
    named = [name for name in outputs if name]
    return model(nodes, {"x": [5, 2, INPUTS]}, dict.fromkeys(named), {name: held[name] for name in used})


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("extra", [0, 1, 2, 4])
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_an_lstm_runs_on_integers(tmp_path: Path, scheme: str, extra: int, directions: int) -> None:
    proto = recurrent("LSTM", directions, outputs=("y", "h", "c"), extra=extra)
    found = Converted(proto, tmp_path, None, scheme)
    assert found.kernels == {"DynamicQuantizeLSTM": 1} and found.proof.integer == {"DynamicQuantizeLSTM": 1}
    assert all(found.sqnr_db(name) > 33 for name in ("y", "h", "c"))
    assert {each.label for each in found.plan.nodes} == {"int8-dynamic"}


@pytest.mark.parametrize(("tail", "shape"), [(1, (1,)), (30, (1, 4 * HIDDEN))])
def test_one_scale_for_a_direction_where_that_is_as_precise(
    tmp_path: Path, tail: float, shape: tuple[int, ...]
) -> None:
    uniform = np.random.default_rng(0).uniform(-0.1, 0.1, (1, 4 * HIDDEN, HIDDEN)).astype(np.float32)
    uniform[0, 7] *= tail
    proto = recurrent("LSTM")
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(uniform, "r"))
    onnx.save(proto, tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", tmp_path / "out.onnx", scheme="int8-dynamic")
    held = {each.name: tuple(each.dims) for each in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert held["r_scale"] == held["r_zero_point"] == shape
    assert held["w_scale"] == (1, 4 * HIDDEN)


def test_activations_of_its_own(tmp_path: Path) -> None:
    proto = recurrent("LSTM", activations=["HardSigmoid", "Tanh", "Softsign"], activation_alpha=[0.3], clip=0.8)
    found = Converted(proto, tmp_path, None, "int8-dynamic")
    assert found.kernels == {"DynamicQuantizeLSTM": 1} and found.sqnr_db() > 33


def test_outputs_that_are_left_out(tmp_path: Path) -> None:
    found = Converted(recurrent("LSTM", outputs=("", "", "c")), tmp_path, None, "int8-dynamic")
    assert found.kernels == {"DynamicQuantizeLSTM": 1} and found.sqnr_db("c") > 33


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    ("scheme", "least"),
    [("int8", 38), ("int4", 14), ("nf4", 14), ("fp16", 65), ("bf16", 45)],
)
def test_weights_alone(tmp_path: Path, kind: str, scheme: str, least: float) -> None:
    found = Converted(recurrent(kind, 2), tmp_path, None, scheme)
    # The runtime made float weights of the codes when it loaded them: nothing is left to do in a run.
    assert found.kernels == {kind: 1} and found.pairs == (0, 0) and found.sqnr_db() > least
    assert all(each.form for each in found.plan.nodes) and len(found.plan.nodes) == 2


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_others_than_an_lstm_have_no_integer_kernel(tmp_path: Path, kind: str) -> None:
    found = Converted(recurrent(kind), tmp_path, None, "int8-dynamic")
    assert found.kernels == {kind: 1} and found.sqnr_db() > 38
    assert found.plan.nodes[0].note == f"int8 weights only: onnxruntime has no integer {kind}"


def test_an_lstm_one_of_whose_weights_is_skipped(tmp_path: Path) -> None:
    skipped = Converted(recurrent("LSTM"), tmp_path, None, "int8-dynamic", rules=[{"match": "r", "skip": True}])
    assert skipped.kernels == {"LSTM": 1} and skipped.sqnr_db() > 38
    assert [each.form for each in skipped.plan.nodes] == ["stored", None]


def test_two_layers_that_share_weights(tmp_path: Path) -> None:
    held = {"w": normal(1, 4 * HIDDEN, HIDDEN, scale=0.15), "r": normal(1, 4 * HIDDEN, HIDDEN, seed=1, scale=0.15)}
    nodes = [
        node("LSTM", ["x", "w", "r"], ["a"], hidden_size=HIDDEN), node("Squeeze", ["a", "one"], ["s"]),
        node("LSTM", ["s", "w", "r"], ["y"], hidden_size=HIDDEN),
    ]  # fmt: skip
    proto = model(nodes, {"x": [5, 2, HIDDEN]}, {"y": None}, {**held, "one": np.array([1])})
    found = Converted(proto, tmp_path, None, "int8-dynamic")
    assert found.kernels["DynamicQuantizeLSTM"] == 2 and found.sqnr_db() > 30
    assert sum(each.bytes_after for each in found.outcomes) < 0.28 * sum(each.nbytes for each in held.values())


def test_one_constant_as_both_weights(tmp_path: Path) -> None:
    nodes = [node("LSTM", ["x", "w", "w"], ["y"], hidden_size=HIDDEN)]
    proto = model(nodes, {"x": [5, 2, HIDDEN]}, {"y": None}, {"w": normal(1, 4 * HIDDEN, HIDDEN, scale=0.15)})
    found = Converted(proto, tmp_path, None, "int8-dynamic")
    assert found.kernels == {"LSTM": 1} and found.sqnr_db() > 38


@pytest.mark.parametrize("tails", [False, True])
def test_no_less_precise_than_the_runtimes_own_quantization(tmp_path: Path, tails: bool) -> None:
    """Weights as they are initialized, where a scale for each direction does; and with tails, where it does not."""
    rng = np.random.default_rng(0)
    draw = (lambda *s: rng.standard_t(4, s)) if tails else (lambda *s: rng.uniform(-1, 1, s))
    proto = recurrent("LSTM", 2)
    for tensor in list(proto.graph.initializer)[:2]:
        values = (draw(*tensor.dims) / np.sqrt(HIDDEN)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    found = Converted(proto, tmp_path, None, "int8-dynamic")
    onnx.save(proto, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "theirs.onnx", weight_type=QuantType.QInt8)
    theirs = Session(tmp_path / "theirs.onnx", threads=1).run(found.feeds)["y"]
    wanted = found.before["y"]
    noise = np.square(wanted - theirs).sum(), np.square(wanted - found.after["y"]).sum()
    assert noise[1] < noise[0] * (0.5 if tails else 1.05)


def test_a_weight_with_holes(tmp_path: Path) -> None:
    proto = recurrent("LSTM")
    values = onnx.numpy_helper.to_array(proto.graph.initializer[1]).copy()
    values[0, 3, 4] = np.nan
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(values, "r"))
    for scheme in ("int8-dynamic", "int8", "int4"):
        with pytest.raises(InputError, match="r holds NaN or infinite values"):
            Converted(proto, tmp_path, None, scheme)
