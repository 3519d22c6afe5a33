"""Runners: every kind of MODEL takes and returns arrays by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.tiny_onnx import HALF, classifier, weights

from quantcli.core.ports import Port
from quantcli.errors import InputError
from quantcli.models.inputs import fit
from quantcli.models.outputs import floats, paired
from quantcli.models.runner import open_runner

X = np.random.default_rng(5).standard_normal((3, 8)).astype(np.float32)
USER_MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 7)

    def forward(self, x):
        return self.linear(x), {"other": 1}, x.sum(1)

def build():
    return Net()

def dictionary():
    class Named(Net):
        def forward(self, x):
            return {"scores": self.linear(x), "none": None}
    return Named()

def broken():
    raise ValueError("no such thing")

def number():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runner_user.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "runner_user", raising=False)
    return tmp_path


def test_onnx_by_name_and_in_its_own_dtype(tmp_path: Path) -> None:
    weight, bias = weights()
    expected = X.astype(np.float64) @ weight + bias
    single = open_runner(classifier(tmp_path / "a.onnx", weight, bias), threads=1)
    assert np.allclose(single.run({"x": X, "unused": X})["logits"], expected, atol=1e-5)
    half = open_runner(classifier(tmp_path / "b.onnx", weight, bias, kind=HALF), threads=1)
    found = half.run({"x": X})
    assert found["logits"].dtype == np.float16
    assert np.allclose(floats(found)["logits"], expected, atol=0.05)
    assert np.allclose(single.run({"other_name": X})["logits"], expected, atol=1e-5), "by position"
    for wrong in (X[:, :5], X[None]):
        with pytest.raises(InputError, match=r"a\.onnx takes other inputs than these. Expected x: float32 n x 8; got"):
            single.run({"x": wrong})
    (tmp_path / "folder").mkdir()
    classifier(tmp_path / "folder" / "model.onnx", weight, bias)
    assert np.allclose(open_runner(tmp_path / "folder").run({"x": X})["logits"], expected, atol=1e-5)


def test_functions_take_weights_and_name_what_they_return(here: Path) -> None:
    weight, bias = weights()
    state = {"linear.weight": torch.from_numpy(weight.T.copy()), "linear.bias": torch.from_numpy(bias)}
    save_file(state, here / "w.safetensors")
    torch.save(state, here / "w.pt")
    for file in ("w.safetensors", "w.pt"):
        runner = open_runner("runner_user:build", weights=here / file)
        assert [port.name for port in runner.inputs] == ["x"]
        found = runner.run({"x": X})
        assert list(found) == ["output_0", "output_2"]
        assert np.allclose(found["output_0"], X @ weight + bias, atol=1e-5)
        assert np.allclose(found["output_2"], X.sum(1), atol=1e-5)
    assert list(open_runner("runner_user:dictionary").run({"x": X})) == ["scores"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("broken", "ValueError: no such thing"),
        ("number", "returned int, not a torch module"),
        ("absent", "has no absent"),
    ],
)
def test_functions_that_give_no_model_are_refused(here: Path, spec: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_runner(f"runner_user:{spec}")


def test_weights_that_do_not_fit_are_refused(here: Path) -> None:
    save_file({"linear.weight": torch.zeros(7, 9)}, here / "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors does not fit Net.*linear\.bias"):
        open_runner("runner_user:build", weights=here / "w.safetensors")


def test_exported_programs(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def forward(self, a: torch.Tensor, *, b: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": a + 2 * b}

    batch = torch.export.Dim("batch")
    sizes = {"a": {0: batch}, "b": {0: batch}}
    program = torch.export.export(Net(), (torch.zeros(2, 3),), {"b": torch.zeros(2, 3)}, dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "net.pt2")
    runner = open_runner(tmp_path / "net.pt2")
    assert [(port.name, port.dtype, (port.shape or ())[1]) for port in runner.inputs] == [
        ("a", np.float32, 3),
        ("b", np.float32, 3),
    ]
    a, b = np.ones((4, 3), np.float32), np.full((4, 3), 5, np.float32)
    assert np.array_equal(runner.run({"b": b, "a": a})["sum"], np.full((4, 3), 11))
    with pytest.raises(InputError, match=r"net\.pt2 cannot be run on a \[4, 2\]"):
        runner.run({"a": a[:, :2], "b": b[:, :2]})
    (tmp_path / "bad.pt2").write_bytes(b"PK not a program")
    with pytest.raises(InputError, match="cannot be loaded by torch"):
        open_runner(tmp_path / "bad.pt2")
    with pytest.raises(InputError, match="does not exist"):
        open_runner(tmp_path / "no.pt2")


def test_inputs_are_cast_only_where_they_keep_their_meaning() -> None:
    port, ids = Port("x", np.dtype(np.float16), None), Port("input_ids", np.dtype(np.int32), None)
    assert fit({"x": X}, [port], "M")["x"].dtype == np.float16
    assert fit({"input_ids": np.array([7])}, [ids], "M")["input_ids"].dtype == np.int32
    with pytest.raises(InputError, match="M expects x: float16"):
        fit({"x": np.array([1])}, [port], "M")
    with pytest.raises(InputError, match="do not fit"):
        fit({"input_ids": np.array([1 << 40])}, [ids], "M")
    with pytest.raises(InputError, match=r"Expected x: float16.*got a, b"):
        fit({"a": X, "b": X}, [port], "M")


def test_token_inputs_follow_from_ids() -> None:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    ports = [Port(name, np.dtype(np.int64), None) for name in names]
    found = fit({"input_ids": np.array([[5, 6, 7]])}, ports, "M")
    assert [found[name].tolist() for name in names] == [[[5, 6, 7]], [[1, 1, 1]], [[0, 0, 0]], [[0, 1, 2]]]


def test_outputs_pair_by_name_else_by_position() -> None:
    one, two = X[:1], X[1:2]
    by_name = paired({"a": one, "b": two}, {"b": two, "a": one}, "M")
    assert np.array_equal(by_name["a"][1], one)
    by_position = paired({"a": one, "n": np.array([1])}, {"output_0": one.astype(np.float16)}, "M")
    assert by_position.keys() == {"a"}
    assert by_position["a"][1].dtype == np.float32
    with pytest.raises(InputError, match=r"M returns c, d, e, which do not correspond to the reference's a, b"):
        paired({"a": one, "b": two}, {"c": one, "d": one, "e": one}, "M")
    with pytest.raises(InputError, match=r"M returns a of shape \[1, 7\], the reference one of \[1, 8\]"):
        paired({"a": one}, {"a": one[:, :7]}, "M")
