"""The registry of forms: one from outside the package is planned, written and proven like our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.onnx_models import cnn, feeds

from quantcli.cli.app import main
from quantcli.models.session import Session
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.plan.forms import FORMS


def converted(source: Path, target: Path) -> dict[str, Any]:
    """What the command line makes of a model with ranges at run time: the layers of its manifest."""
    assert main(["convert", str(source), "-o", str(target), "--scheme", "int8-dynamic", "--force", "--quiet"]) == 0
    manifest = open_onnx(target).manifest.to_json()
    assert manifest is not None
    layers: dict[str, Any] = manifest["layers"]
    return layers


def test_a_form_from_outside_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, data = tmp_path / "cnn.onnx", tmp_path / "out.onnx", feeds("cnn")
    onnx.save(cnn(), source)
    ours = converted(source, target)
    assert {name: layer["mode"] for name, layer in ours.items()} == {
        "stem.weight": "weights", "body.weight": "weights", "head.weight": "dynamic",
    }  # fmt: skip
    assert "many times slower" in ours["body.weight"]["note"]
    monkeypatch.setitem(FORMS, "conv-integer", "support.conv_integer")
    capsys.readouterr()
    layers = converted(source, target)
    assert {name: layer["mode"] for name, layer in layers.items()} == {
        "stem.weight": "conv-integer", "body.weight": "conv-integer", "head.weight": "dynamic",
    }  # fmt: skip
    assert {layer["scheme"] for layer in layers.values()} == {"int8-dynamic"}
    assert "note" not in layers["body.weight"] and layers["body.weight"]["sqnr_db"] > 35
    onnx.checker.check_model(target)
    assert [node.op_type for node in onnx.load(target).graph.node].count("ConvInteger") == 2
    before, after = (Session(path).run(data)["y"] for path in (source, target))
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)
    capsys.readouterr()
    assert main(["inspect", str(source), "--scheme", "int8-dynamic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schemes"][0]["quantized_tensors"] == 3


def test_planning_asks_forms_without_torch(tmp_path: Path) -> None:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    code = (
        "import sys; from quantcli.cli.app import main\n"
        "assert main(['inspect', sys.argv[1], '--scheme', 'int8-static', '--scheme', 'int4', '--quiet']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "cnn.onnx")], check=True)
