"""What a conversion of a graph holds in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from support.graphs import model, node, normal
from support.onnx_models import save_products

from quantcli import convert
from quantcli.conversion.onnx import pipeline
from quantcli.errors import InputError, UsageError
from quantcli.onnx.graph.external import LARGE_BYTES
from quantcli.onnx.graph.model import open_onnx
from quantcli.search.budget import Budget
from quantcli.system import memory

_CONVERT = """
import json, sys
from quantcli import convert
from quantcli.conversion.onnx import pipeline
from quantcli.system.hardware import peak_rss_bytes
peaks = []
for scheme in ("int4", "int8-dynamic"):
    report = convert(sys.argv[1], f"{sys.argv[2]}/{scheme}.onnx", scheme=scheme, max_memory=int(sys.argv[3]))
    peaks.append([peak_rss_bytes(), sum(report.details["verified"]["runtime"]["integer_kernels"].values())])
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_a_limit_is_kept_and_everything_runs(tmp_path: Path) -> None:
    """Libraries of 0.3 GB and weights of 0.3 GB: a conversion that held these all would be seen."""
    limit, layers = 540_000_000, 19
    model = save_products(tmp_path / "m.onnx", layers=layers, width=2048)
    assert model.with_name("m.onnx.data").stat().st_size > 300_000_000
    command = [sys.executable, "-c", _CONVERT, str(model), str(tmp_path), str(limit)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    for peak, kernels in found:
        assert peak < limit and kernels == layers, f"{peak / 1e6:.0f} MB, {kernels} kernels"


@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic", "int8", "fp16"])
def test_pieces_give_the_bytes_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    path = save_products(tmp_path / "m.onnx", layers=3, width=520)
    assert LARGE_BYTES < 4 * 520**2
    whole = convert(path, tmp_path / "whole.onnx", scheme=scheme)
    # A layer or two, whatever their weights are.
    monkeypatch.setattr(memory, "_PIECE_BYTES", 300_000)
    pieces = convert(path, tmp_path / "pieces.onnx", scheme=scheme)
    assert (tmp_path / "pieces.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert pieces.details["verified"] == whole.details["verified"]
    assert pieces.details["outputs"]["sqnr_db"] == pytest.approx(whole.details["outputs"]["sqnr_db"], abs=0.5)


def test_an_artifact_that_computes_something_else_is_seen_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer whose bytes are not what its codes were meant to be; it is in the second piece of the artifact."""
    path = save_products(tmp_path / "m.onnx", layers=3, width=520)
    monkeypatch.setattr(memory, "_PIECE_BYTES", 300_000)
    save = pipeline.save_graph

    def wrong(graph: ir.Model, target: Path, data: str | None) -> list[Path]:
        scale = graph.graph.initializers["w1_scale"]
        assert scale.const_value is not None
        scale.const_value = ir.tensor(-scale.const_value.numpy(), name="w1_scale")
        return save(graph, target, data)

    monkeypatch.setattr(pipeline, "save_graph", wrong)
    with pytest.raises(InputError, match="is wrong"):
        convert(path, tmp_path / "o.onnx", scheme="int8-dynamic")


def test_weights_of_the_file_itself_are_not_read_with_it(tmp_path: Path) -> None:
    import onnx

    weight = normal(8, LARGE_BYTES // 32 + 1)
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 8]}, {"y": None}, {"w": weight})
    onnx.save(proto, tmp_path / "m.onnx")
    plain, mapped = open_onnx(tmp_path / "m.onnx"), open_onnx(tmp_path / "m.onnx", mapped=True)
    assert plain.files == mapped.files == (tmp_path / "m.onnx",)
    assert (plain.size_bytes, plain.sha256()) == (mapped.size_bytes, mapped.sha256())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheme": "int8", "max_memory": 100_000_000}, "onnxruntime needs 461 MB in all"),
        ({"scheme": "int8", "max_memory": 463_000_000}, "needs 4.* MB in all"),
        ({"scheme": "int8-static"}, "runs the whole graph on the data"),
        ({"scheme": "int4", "algorithm": "gptq"}, "runs the whole graph on the data"),
        ({"scheme": "int8-dynamic", "algorithm": "qat"}, "runs the whole graph on what is trained"),
        ({"budget": Budget(max_size=1_000_000)}, "does not go with a budget"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(tmp_path: Path, options: dict[str, object], says: str) -> None:
    import numpy as np

    path = save_products(tmp_path / "m.onnx", layers=1, width=520)
    np.savez(tmp_path / "d.npz", x=normal(8, 520))
    needs = {"int8-static", "gptq", "qat"} & {*map(str, options.values())}
    options = {"max_memory": 1 << 30, "data": tmp_path / "d.npz" if needs else None} | options
    with pytest.raises(UsageError, match=rf"--max-memory.*{says}"):
        convert(path, tmp_path / "o.onnx", **options)
    assert not (tmp_path / "o.onnx").exists()
