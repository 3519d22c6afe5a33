"""`inspect` of models that are code: functions, and programs of torch.export."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from quantcli.commands.convert import convert
from quantcli.commands.inspect import inspect
from quantcli.errors import InputError

_MODULE = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32))

def traced():
    return net()

traced.example_inputs = (torch.ones(1, 64),)
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inspected_nets.py").write_text(_MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "inspected_nets", raising=False)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))
    torch.export.save(torch.export.export(net, (torch.ones(2, 64),)), tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


WEIGHTS = {"0.weight": [256, 64], "0.bias": [256], "2.weight": [32, 256], "2.bias": [32]}
COUNT = 256 * 64 + 256 + 32 * 256 + 32


@pytest.mark.usefixtures("functions")
def test_the_weights_of_a_function_are_listed_without_an_export() -> None:
    report = inspect("inspected_nets:net")
    (row,) = report.models
    assert (row.format, row.scheme, row.size_bytes, row.details["architecture"]) == (
        "torch", "fp32", 4 * COUNT, "Sequential",
    )  # fmt: skip
    assert {layer.name: layer.details["shape"] for layer in report.layers} == WEIGHTS
    assert row.details["parameters"] == COUNT and row.details["dtypes"] == {"F32": {"tensors": 4, "bytes": 4 * COUNT}}
    with pytest.raises(InputError, match=r"what inputs inspected_nets:net is to be traced with"):
        inspect("inspected_nets:net", ["int8"])
    with pytest.raises(InputError, match="has no other"):
        inspect("inspected_nets:other")


def test_the_weights_of_a_program_are_listed(program: Path) -> None:
    report = inspect(program)
    (row,) = report.models
    assert (row.format, row.size_bytes, row.details["files"]) == ("torch.export", program.stat().st_size, 1)
    assert {layer.name: layer.details["shape"] for layer in report.layers} == WEIGHTS
    assert row.details["inputs"] == ["input: float32 2 x 64"]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("kind", ["program", "function"])
def test_a_scheme_is_planned_as_convert_carries_it_out(program: Path, tmp_path: Path, kind: str) -> None:
    subject = str(program) if kind == "program" else "inspected_nets:traced"
    report = inspect(subject, ["int8", "int8-dynamic"])
    for planned in report.details["schemes"]:
        assert planned["applies"] and planned["quantized_tensors"] == 2
        made = convert(subject, tmp_path / f"{planned['scheme']}.onnx", scheme=planned["scheme"], allow_larger=True)
        after = {layer.name: layer.bytes_after for layer in made.layers}
        found = [layer for layer in report.layers if layer.details["plan"] == planned["scheme"]]
        assert {layer.name for layer in found} == after.keys()
        assert sum(layer.bytes_after for layer in found) == pytest.approx(sum(after.values()), rel=0.02)
