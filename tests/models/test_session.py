"""onnxruntime behind one class: inputs and outputs as ports, errors as ours, options that reach the runtime."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.tiny_onnx import HALF, classifier, save, weights

from quantcli.core.ports import Port
from quantcli.errors import InputError
from quantcli.models.session import Session


def test_ports_and_values(tmp_path: Path) -> None:
    weight, bias = weights()
    session = Session(classifier(tmp_path / "m.onnx", weight, bias, batch="n"))
    assert session.inputs == (Port("x", np.dtype(np.float32), ("n", 8)),)
    assert session.outputs == (Port("logits", np.dtype(np.float32), ("n", 7)),)
    x = np.random.default_rng(0).standard_normal((3, 8), np.float32)
    np.testing.assert_allclose(session.run({"x": x})["logits"], x @ weight + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64), (TensorProto.INT64, np.int64),
        (TensorProto.UINT8, np.uint8), (TensorProto.BOOL, np.bool_), (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.STRING, object),
    ],
)  # fmt: skip
def test_dtypes(tmp_path: Path, kind: int, dtype: type) -> None:
    info = [helper.make_tensor_value_info(name, kind, [2, None]) for name in ("x", "y")]
    session = Session(save(tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], info[:1], info[1:], {}))
    assert session.inputs[0].dtype == np.dtype(dtype) == session.outputs[0].dtype
    assert session.inputs[0].shape == (2, None)


def test_chosen_outputs_and_bytes(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["b"])]
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xab"}
    path = save(tmp_path / "m.onnx", nodes, [infos["x"]], [infos["a"], infos["b"]], {})
    session = Session(path.read_bytes())
    x = np.array([-1, 2], np.float32)
    assert {name: value.tolist() for name, value in session.run({"x": x}).items()} == {"a": [0, 2], "b": [1, -2]}
    assert list(session.run({"x": x}, ["b"])) == ["b"]


@pytest.mark.parametrize("optimize", [True, False])
def test_the_runtimes_graph_is_optimized_unless_asked_not_to(tmp_path: Path, optimize: bool) -> None:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    nodes = [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("Relu", ["same"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, info[:1], info[1:], {})
    Session(path, optimize=optimize, dump=tmp_path / "dump.onnx")
    kernels = [node.op_type for node in onnx.load(tmp_path / "dump.onnx").graph.node]
    assert kernels == (["Relu"] if optimize else ["Identity", "Relu"])


def test_errors_are_ours(tmp_path: Path) -> None:
    session = Session(classifier(tmp_path / "m.onnx", *weights(), kind=HALF))
    with pytest.raises(InputError, match="onnxruntime could not run the model"):
        session.run({"x": np.zeros((1, 8), np.float32)})
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"broken\.onnx cannot be loaded by onnxruntime \d"):
        Session(tmp_path / "broken.onnx")
    with pytest.raises(InputError, match="The model cannot be loaded"):
        Session(b"nothing")


def test_a_type_that_has_no_kernel_on_the_cpu(tmp_path: Path) -> None:
    kind = TensorProto.BFLOAT16
    inputs = [helper.make_tensor_value_info(name, kind, [2, 2]) for name in ("a", "b")]
    output = [helper.make_tensor_value_info("y", kind, [2, 2])]
    path = save(tmp_path / "m.onnx", [helper.make_node("MatMul", ["a", "b"], ["y"])], inputs, output, {})
    with pytest.raises(InputError, match="MatMul") as caught:
        Session(path)
    assert (
        caught.value.hint == "It has no such kernel on the CPU for these types. Export the model in float32 or float16."
    )
