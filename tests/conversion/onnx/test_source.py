"""What a conversion to ONNX starts from: messages about a graph that was exported speak of the user's model."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantcli.commands.convert import convert
from quantcli.errors import InputError

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
