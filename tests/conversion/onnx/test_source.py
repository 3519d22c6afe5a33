"""What a conversion to ONNX starts from: a graph, or an export whose messages speak of the user's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from quantcli.commands.convert import convert
from quantcli.conversion.onnx.source import open_source
from quantcli.errors import InputError
from quantcli.export import export
from quantcli.planning.recipe import Recipe

CODE = """
import torch

def small():
    return torch.nn.Linear(3, 1)
small.example_inputs = (torch.zeros(1, 3),)
"""


def test_messages_name_the_function_and_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_network.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="int8 applies to nothing in small_network:small: too small") as refused:
        convert("small_network:small", tmp_path / "out.onnx", scheme="int8")
    assert str(tmp_path) not in str(refused.value)


def without_cache(model: Path, folder: Path, *, cache: bool = False, **others: Any) -> export.Exported:
    """An exporter that cannot trace a cache."""
    if cache:
        raise InputError("torch.onnx cannot export it: a cache is in the way.")
    folder.mkdir()
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "graph", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), folder / "model.onnx")
    return export.Exported(folder / "model.onnx", None)


def test_a_model_that_torch_traces_with_no_cache_is_scored_or_refused_where_a_target_wants_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export_to_onnx", without_cache)
    found = open_source(str(models / "gpt2"), None, Recipe(), None, tmp_path / "a", cache=True)
    assert not found.cached
    assert any("has no key-value cache" in warning and "in the way" in warning for warning in found.warnings)
    wanted = Recipe(target="onnxruntime-genai")
    with pytest.raises(InputError, match="in the way"):
        open_source(str(models / "gpt2"), None, wanted, None, tmp_path / "b", cache=True)
