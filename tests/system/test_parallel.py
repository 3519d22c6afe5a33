"""What does not depend on the number of threads, as docs/trust.md promises it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantcli import convert

#: The number of layers, or of slabs of the one large weight, is more than one: there is work for two threads.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rtn": ("llama", "", {"scheme": "int4", "group_size": 32, "algorithm": "rtn"}),
    "mse": ("llama", "", {"scheme": "int4", "group_size": 32, "algorithm": "mse"}),
    "rtn of a large weight": ("large.safetensors", ".safetensors", {"scheme": "int4", "algorithm": "rtn"}),
    "mse of a large weight": ("large.safetensors", ".safetensors", {"scheme": "int8", "algorithm": "mse"}),
    "nf4": ("llama", "", {"scheme": "nf4"}),
    "cast": ("large.safetensors", ".safetensors", {"scheme": "bf16"}),
    "dynamic graph": ("cnn.onnx", ".onnx", {"scheme": "int8-dynamic"}),
    "dynamic graph of products": ("products.onnx", ".onnx", {"scheme": "int8-dynamic"}),
    "graph in blocks": ("products.onnx", ".onnx", {"scheme": "int4"}),
}


@pytest.mark.usefixtures("no_runtime_check")
@pytest.mark.parametrize("name", CASES)
def test_one_thread_and_two_write_the_same_bytes(name: str, inputs: Path, tmp_path: Path) -> None:
    model, suffix, wishes = CASES[name]
    written = []
    for threads in (1, 2):
        place = tmp_path / str(threads)
        place.mkdir()
        convert(str(inputs / model), output=place / f"out{suffix}", threads=threads, **wishes)
        files = (path for path in sorted(place.rglob("*")) if path.is_file())
        written.append({path.relative_to(place).as_posix(): path.read_bytes() for path in files})
    assert written[0] == written[1] and written[0]
