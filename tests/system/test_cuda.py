"""`--device cuda`, where there is a GPU: every algorithm, and what is done with the artifact afterwards.

On other machines `test_devices.py` stands in for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.foreign_device import CHAINS
from support.small_nets import cnn

from quantcli import bench, convert, evaluate
from quantcli.planning.recipe import Recipe

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no GPU here"),
    pytest.mark.usefixtures("no_runtime_check"),
]


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ids.npz"
    np.savez(path, input_ids=np.random.default_rng(0).integers(0, 96, (8, 16)))
    return path


@pytest.mark.parametrize("chain", CHAINS)
def test_an_algorithm_chooses_nearly_the_codes_that_it_chooses_on_the_cpu(
    models: Path, ids: Path, tmp_path: Path, chain: str
) -> None:
    scheme, steps = CHAINS[chain]
    recipe = Recipe(scheme=scheme, steps=steps, **({"group_size": 16} if scheme == "int4" else {}))
    for device in ("cpu", "cuda"):
        convert(models / "llama", tmp_path / device, recipe=recipe, data=ids, device=device, allow_larger=True)
    near, far = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    assert near.keys() == far.keys()
    assert all(bool(values.isfinite().all()) for values in far.values() if values.is_floating_point())
    codes = [(values, far[name]) for name, values in near.items() if not values.is_floating_point()]
    same = sum(int((one.view(torch.uint8) == other.view(torch.uint8)).sum()) for one, other in codes)
    # What is rounded otherwise changes codes that lie between two, and with gptq those that make up for them.
    assert same / sum(values.nbytes for values, _ in codes) > 0.8


def test_what_a_gpu_made_is_evaluated_and_timed(models: Path, ids: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": ids, "device": "cuda", "allow_larger": True}
    convert(models / "llama", tmp_path / "out", scheme="int4", group_size=16, algorithm="gptq", **given)
    metrics = evaluate(models / "llama", [tmp_path / "out"], data=ids, task="fidelity").models[1].metrics
    assert metrics
    assert all(np.isfinite(value) for value in metrics.values() if isinstance(value, float))
    report = bench(models / "llama", [tmp_path / "out"], batch_size=1, seq_len=8, runs=5)
    assert report.models[1].metrics["latency_ms"] > 0


def test_a_graph_is_trained(tmp_path: Path) -> None:
    torch.onnx.export(cnn(), (torch.randn(1, 3, 12, 12),), tmp_path / "cnn.onnx", dynamo=True, input_names=["x"])
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((24, 3, 12, 12)).astype(np.float32))
    recipe = Recipe(scheme="int8-static", steps=[{"qat": {"steps": 3, "batch_size": 8}}])
    given: dict[str, Any] = {"data": tmp_path / "x.npz", "device": "cuda", "allow_larger": True}
    convert(tmp_path / "cnn.onnx", tmp_path / "out.onnx", recipe=recipe, **given)
    metrics = evaluate(tmp_path / "cnn.onnx", [tmp_path / "out.onnx"], data=tmp_path / "x.npz").models[1].metrics
    assert metrics
