"""Devices: what is computed beside the CPU mixes nothing of the two, and comes to the same codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import foreign_device

from quantcli.system.child import is_out_of_memory

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_algorithm_stays_on_the_device_it_is_given(tmp_path: Path) -> None:
    """As on a GPU, an operation on tensors of two devices fails; see `support.foreign_device`."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, "-m", "support.foreign_device", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    equal = json.loads(done.stdout.splitlines()[-1])
    assert equal.keys() == foreign_device.CHAINS.keys()
    # A text is the error that a chain ended with. What lies otherwise in memory may be summed up in another order.
    assert {name: share for name, share in equal.items() if not isinstance(share, float) or share < 0.5} == {}


def test_a_gpu_without_memory_is_told_from_a_defect() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB"
    assert is_out_of_memory(said)
    assert not is_out_of_memory("CUDA error: an illegal memory access was encountered")
