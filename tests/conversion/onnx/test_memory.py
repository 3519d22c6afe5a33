"""What a conversion of a graph holds in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.onnx_models import save_products

_CONVERT = """
import json, sys
from quantcli import convert
from quantcli.system.hardware import peak_rss_bytes
convert(sys.argv[1], sys.argv[2], scheme="int4")
print(json.dumps(peak_rss_bytes()))
"""


@pytest.mark.slow
def test_one_model_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """The runtime with the original is the most that there is: nothing of ours, and no second model, comes on top."""
    model = save_products(tmp_path / "m.onnx", layers=4, width=4096)
    command = [sys.executable, "-c", _CONVERT, str(model), str(tmp_path / "out.onnx")]
    peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    weights = model.with_name("m.onnx.data").stat().st_size
    # Half a gigabyte for the libraries and one weight.
    assert peak < 500_000_000 + 1.3 * weights, f"{peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"
