"""A kind of DATA from outside the package works from the command line like those inside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny_onnx import classifier, weights

from quantcli.cli.app import main
from quantcli.data import sources

SOURCE = """
from pathlib import Path

import numpy as np

from quantcli.data.fitting import converted
from quantcli.data.sources.base import Sample, evenly, hash_samples

DESCRIPTION, IS_TEXT, OPTIONS = "a .csv file of rows", False, ()


def accepts(data):
    return data.endswith(".csv") and Path(data).is_file()


def open_source(request, ports, folder):
    return Rows(request.data, ports[0])


class Rows:
    fixed_batch, warnings = None, []

    def __init__(self, path, port):
        table = np.loadtxt(path, delimiter=",", ndmin=2)
        self.rows, self.classes, self.port, self.labels = table[:, :-1], table[:, -1].astype(int), port, True

    def choose(self, wanted, seed):
        return evenly(len(self.rows), wanted)

    def iterate(self, chosen):
        for index in chosen:
            row = converted(self.rows[index : index + 1], self.port, f"Row {index}")
            yield Sample({self.port.name: row}, int(self.classes[index]))

    def digest(self, chosen):
        return hash_samples(self.iterate(chosen))
"""


def test_a_kind_of_data_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_source.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    weight, bias = weights()
    model = str(classifier(tmp_path / "model.onnx", weight, bias))
    rows = np.random.default_rng(0).standard_normal((10, 8))
    best = np.argmax(rows.astype(np.float32) @ weight + bias, 1)
    best[:2] = (best[:2] + 1) % 7
    np.savetxt(tmp_path / "data.csv", np.c_[rows, best], delimiter=",")
    data = ["--data", str(tmp_path / "data.csv")]
    assert main(["eval", model, *data]) == 3
    assert "is of no known kind" in capsys.readouterr().err
    monkeypatch.setitem(sources.SOURCES, "rows", "own_source")
    assert main(["eval", model, *data, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == "classification" and report["models"][0]["metrics"]["top1"] == 0.8
    assert main(["bench", model, *data, "--runs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == data[1]
    assert main(["calibrate", model, *data, "--samples", "4", "-o", str(tmp_path / "s.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 4
    assert main(["eval", model, *data, "--seq-len", "4"]) == 2
    assert main(["eval", model, "--data", "missing"]) == 3
    assert "a .csv file of rows" in " ".join(capsys.readouterr().err.split())
