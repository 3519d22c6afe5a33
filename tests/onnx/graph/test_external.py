"""Weights beside the file, in every arrangement: found, checked, and a part of what is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import set_external_data
from onnx_ir import ExternalTensor
from support.graphs import model, node, normal, run

import quantcli
from quantcli.errors import InputError
from quantcli.models.kernels import prove
from quantcli.models.session import Session
from quantcli.onnx.graph.external import external_files
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.prepare import prepare
from quantcli.onnx.graph.save import save_graph

X = {"x": normal(3, 64)}


def build() -> onnx.ModelProto:
    """Weights of the graph, of a body and of a Constant, and small ones that stay what they are."""
    then = onnx.helper.make_graph(
        [node("MatMul", ["h", "inner"], ["t"])], "then", [], [onnx.helper.make_tensor_value_info("t", 1, None)],
        [onnx.numpy_helper.from_array(normal(64, 64, seed=3), "inner")],
    )  # fmt: skip
    other = onnx.helper.make_graph(
        [node("Identity", ["h"], ["e"])], "else", [], [onnx.helper.make_tensor_value_info("e", 1, None)]
    )
    nodes = [
        node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(normal(64, 64, seed=4), "c")),
        node("MatMul", ["x", "w"], ["a"]), node("LayerNormalization", ["a", "g", "b"], ["n"]),
        node("MatMul", ["n", "c"], ["h"]), node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Less", ["s", "most"], ["l"]), node("If", ["l"], ["z"], then_branch=then, else_branch=other),
        node("Reshape", ["z", "shape"], ["y"]),
    ]  # fmt: skip
    constants = {"w": normal(64, 64, seed=1), "g": normal(64), "b": normal(64, seed=2), "most": np.float32(1e9)}
    return model(nodes, {"x": ["n", 64]}, {"y": None}, constants | {"shape": np.array([-1, 32])})


def keep_beside(path: Path, where: Callable[[str], str], gap: int = 0) -> None:
    """Save the model with every tensor in the file that ``where`` gives for its name, ``gap`` bytes apart."""
    proto, files = build(), dict[str, bytearray]()
    branch = next(a.g for each in proto.graph.node if each.op_type == "If" for a in each.attribute if a.g.initializer)
    value = next(a.t for each in proto.graph.node for a in each.attribute if a.name == "value")
    for tensor in (*proto.graph.initializer, *branch.initializer, value):
        content = files.setdefault(where(tensor.name), bytearray())
        content += b"?" * gap
        set_external_data(tensor, where(tensor.name), len(content), len(tensor.raw_data))
        content += tensor.raw_data
        tensor.ClearField("raw_data")
    for name, content in files.items():
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).write_bytes(content)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("where", "gap"),
    [(lambda name: "all.data", 0), (lambda name: "all.data", 52), (lambda name: f"{name}.bin", 0),
     (lambda name: f"deep/er/{name}.bin", 4)],
)  # fmt: skip
def test_what_is_written_needs_no_other_file(where: Callable[[str], str], gap: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    keep_beside(tmp_path / "in" / "m.onnx", where, gap)
    source = open_onnx(tmp_path / "in" / "m.onnx")
    assert len(source.files) == 1 + len({where(name) for name in ("w", "g", "b", "most", "shape", "inner", "c")})
    expected = run(build(), X)["y"]
    for number, graph in enumerate((source.ir.clone(), prepare(source))):
        target = tmp_path / f"{number}.onnx"
        assert save_graph(graph, target) == [target]
        assert not external_files(open_onnx(target).ir)
        np.testing.assert_allclose(Session(target).run(X)["y"], expected, rtol=1e-4, atol=1e-4)


def test_large_weights_stay_in_their_file_until_they_are_written(tmp_path: Path) -> None:
    keep_beside(tmp_path / "m.onnx", lambda name: "all.data")
    constants = prepare(open_onnx(tmp_path / "m.onnx")).graph.initializers
    assert isinstance(constants["w"].const_value, ExternalTensor)
    assert not isinstance(constants["shape"].const_value, ExternalTensor), "its values tell a shape"


def test_a_cache_of_links_is_read(tmp_path: Path) -> None:
    """As a hub's cache lays files out: both are links to files of one folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "one"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    keep_beside(blobs / "m.onnx", lambda name: "all.data")
    for name in ("m.onnx", "all.data"):
        (blobs / name).rename(blobs / f"{name}-hash")
        (snapshot / name).symlink_to(blobs / f"{name}-hash")
    graph = prepare(open_onnx(snapshot / "m.onnx"))
    save_graph(graph, tmp_path / "out.onnx")
    np.testing.assert_allclose(Session(tmp_path / "out.onnx").run(X)["y"], run(build(), X)["y"], rtol=1e-4, atol=1e-4)


def test_a_file_of_two_names_is_read(tmp_path: Path) -> None:
    keep_beside(tmp_path / "m.onnx", lambda name: "all.data")
    os.link(tmp_path / "all.data", tmp_path / "backup.data")
    save_graph(prepare(open_onnx(tmp_path / "m.onnx")), tmp_path / "out.onnx")


def test_a_constants_file_that_is_missing_is_named(tmp_path: Path) -> None:
    keep_beside(tmp_path / "m.onnx", lambda name: f"{name}.bin")
    (tmp_path / "c.bin").unlink()
    with pytest.raises(InputError, match=r"m\.onnx keeps its weights in c\.bin, which is missing"):
        open_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int8-dynamic", "int8-static"])
def test_shapes_that_the_runtime_does_not_look_for_in_a_file(tmp_path: Path, scheme: str) -> None:
    """onnxruntime does not load such a model; the same graph with its shapes inside is run in its place."""
    path, out, data = tmp_path / "m.onnx", tmp_path / "o.onnx", tmp_path / "d.npz"
    keep_beside(path, lambda name: "all.bin")
    np.savez(data, **X)
    with pytest.raises(InputError, match="Cannot parse data from external tensors"):
        Session(path)
    given = {"data": data} if scheme == "int8-static" else {}
    report = quantcli.convert(path, out, scheme=scheme, **given)
    assert report.details["outputs"]["sqnr_db"] > 25
    found = quantcli.evaluate(path, [out], data=data).models[1].metrics["sqnr_db"]
    assert found > 25
    assert prove(path).to_json()["float_kernels"]
